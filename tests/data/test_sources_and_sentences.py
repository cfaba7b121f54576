"""Text is read completely, in any blocks, and split into sentences without loss."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.embedded import _docstrings, _prose
from data_pipeline.sentences import split_sentences
from data_pipeline.sources import documents, units
from megacore.errors import DataError

LINES = st.lists(st.sampled_from(["", "  ", "word", "two words", "x" * 70, "été 中文"]), max_size=30)


def read(path: Path, block: int) -> list[str]:
    return [text for unit in units([path], block) for text in documents(unit)]


@settings(max_examples=150, deadline=None)
@given(lines=LINES, ending=st.sampled_from(["\n", "\r\n"]), block=st.integers(1, 200), last=st.booleans())
def test_text_blocks_of_any_size_give_every_document_once(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ending: str, block: int, last: bool
) -> None:
    path = tmp_path_factory.mktemp("txt") / "c.txt"
    text = ending.join([*lines, "end"]) + (ending if last else "")
    path.write_bytes(text.encode())
    expected = [part.strip() for part in re.split(r"(?:\r?\n[ \t]*)+\r?\n", text) if part.strip()]
    assert read(path, block) == expected


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=80), min_size=1, max_size=20), block=st.integers(1, 300))
def test_json_blocks_of_any_size_give_every_document_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], block: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "c.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    cleaned = [re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", " ", text).strip() for text in texts]
    assert read(path, block) == [text for text in cleaned if text]


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("c.txt", b"fine\n\nbad \xff byte\n", r"c\.txt line 3 \(byte 10\): byte 0xff is not UTF-8"),
        ("c.jsonl", b'{"text": "a"}\n{"text": \n', r"c\.jsonl line 2 \(byte 14\): not JSON"),
        ("c.jsonl", b'{"txt": "a"}\n', r'c\.jsonl line 1 \(byte 0\): no "text"'),
        ("c.jsonl", b'{"text": 3}\n', r'no "text" field with a string'),
        ("c.jsonl", b'{"text": "\\ud800"}\n', r"line 1 .*surrogate"),
        ("c.txt", b"", "empty"),
        ("c.pdf", b"x", r"unknown kind of file '\.pdf'"),
    ],
)
def test_bad_text_is_refused_with_its_place(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=what):
        read(path, 1000)


def test_a_missing_file_or_a_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    for name in ("absent.txt", "folder.txt"):
        with pytest.raises(DataError, match=rf"{name}: no such file"):
            units([tmp_path / name], 10)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One here. Two there! Three?", ["One here.", "Two there!", "Three?"]),
        ("See Dr. Smith, e.g. Monday. Then go.", ["See Dr. Smith, e.g. Monday.", "Then go."]),
        ("It costs 3.5 dollars. J. R. Smith paid.", ["It costs 3.5 dollars.", "J. R. Smith paid."]),
        ('He said "stop." Then he left.', ['He said "stop."', "Then he left."]),
        ("lower case. after a stop", ["lower case. after a stop"]),
        ("A line\nbreak. Next\n\nparagraph", ["A line break.", "Next", "paragraph"]),
        ("今天很好。明天呢？“好！”他说。", ["今天很好。", "明天呢？", "“好！”", "他说。"]),
        ("   ", []),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


@given(st.text(alphabet="ab .!?A\n\"'。x1", max_size=80))
def test_splitting_loses_nothing_but_white_space(text: str) -> None:
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


def test_only_the_prose_of_docstrings_is_kept() -> None:
    source = '''
def f(x):
    """Return the largest of all values that the caller has given.

    >>> f([1, 2])
    2

    Parameters
    ----------
    x : list of numbers

    The values are compared by :class:`~a.b.Order`, which is total, so the result is unique.
    """
    y = """not a docstring, since it does not begin a line: it is assigned here"""
'''
    found = [paragraph for docstring in _docstrings(source) for paragraph in _prose(docstring)]
    assert found == [
        "Return the largest of all values that the caller has given.",
        "The values are compared by a.b.Order, which is total, so the result is unique.",
    ]
