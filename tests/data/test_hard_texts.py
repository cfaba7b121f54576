"""What a large or careless corpus brings: odd bytes and texts, long runs, words without spaces, one-word documents."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_pipeline.embedded as embedded
from data_pipeline.build import SPLITS, build_sentences, build_tokenizer
from data_pipeline.config import DataBuildConfig
from data_pipeline.instances import build_instances
from data_pipeline.masking import mask_tokens
from data_pipeline.pairs import Corpus, document_pairs
from data_pipeline.sentences import split_sentences
from data_pipeline.shards import Columns, read_dataset, write_dataset
from data_pipeline.sources import documents, units
from data_pipeline.tokenizer import CLS, MASK, PAD, SEP, SPECIAL_TOKENS, Tokenizer, train_tokenizer
from megacore.communicator import Alone
from megacore.errors import DataError
from megacore.random import random_bits
from megacore.settings import load
from tests.data.corpora import TEXTS, build_all, write_config, write_jsonl


def read(path: Path, block: int) -> list[str]:
    return [text for unit in units([path], block) for text in documents(unit)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataBuildConfig:
    return build_all(tmp_path_factory.mktemp("built"))


# Reading text.


@settings(max_examples=40, deadline=None)
@given(
    paragraphs=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    gap=st.sampled_from(["\n\n", "\n\n\n\n", "\n" + " " * 40 + "\n", "\r\n\t\r\n", "\n" + " " * 9000 + "\n"]),
    block=st.integers(1, 12000),
)
def test_blank_lines_of_any_length_separate_documents(
    tmp_path_factory: pytest.TempPathFactory, paragraphs: list[int], gap: str, block: int
) -> None:
    path = tmp_path_factory.mktemp("txt") / "c.txt"
    texts = [f"{number} " + "word\n" * size + "end" for number, size in enumerate(paragraphs)]
    path.write_bytes(gap.join(texts).encode())
    assert read(path, max(block, path.stat().st_size // 60)) == texts


def test_units_cover_every_byte_once_whatever_reads_them(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.txt", "empty.jsonl", "b.jsonl")]
    for path, size in zip(paths, (1000, 0, 77), strict=True):
        path.write_bytes(b"x" * size)
    blocks = units(paths, 100)
    for path in paths:
        ends = [(unit.start, unit.stop) for unit in blocks if unit.path == path]
        assert [start for start, _ in ends] == [0, *(stop for _, stop in ends)][: len(ends)]
        assert sum(stop - start for start, stop in ends) == path.stat().st_size


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl"])
def test_control_characters_become_spaces_and_a_byte_order_mark_goes(tmp_path: Path, name: str) -> None:
    text = "a\x00b\x1bc\x7fd"
    path = tmp_path / name
    line = json.dumps({"text": text}) if name.endswith("jsonl") else text
    path.write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\n")
    assert read(path, 10) == ["a b c d"]


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000 + "]" * 100_000], ids=["long number", "deep nesting"])
def test_json_that_python_cannot_hold_is_refused_with_its_place(tmp_path: Path, value: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "a", "other": ' + value + "}\n")
    with pytest.raises(DataError, match=r"c\.jsonl line 2 \(byte 17\): not JSON"):
        read(path, 1000)


@pytest.mark.parametrize("text", ["." * 200_000, "a" + "!?" * 100_000 + "b", "." + "'" * 100_000, "\n " * 100_000])
def test_splitting_takes_linear_time(text: str) -> None:
    began = time.process_time()
    split_sentences(text)
    assert time.process_time() - began < 2  # quadratic would be minutes


@settings(max_examples=200)
@given(st.text(alphabet="ab .!?A\n\"'。”x1", max_size=60))
def test_long_runs_are_split_as_a_plain_reading_of_the_rule(text: str) -> None:
    """No sentence but the last ends without an end mark or an empty line, and none begins with white space."""
    sentences = split_sentences(text)
    for sentence in sentences:
        assert sentence == " ".join(sentence.split()) != ""
    flat = " ".join(text.split())
    if "\n" not in text and "。" not in text:
        assert " ".join(sentences) == flat
        assert all(re.search(r"[.!?][\"'”]*$", sentence) for sentence in sentences[:-1])


# The tokenizer.


def test_special_tokens_written_in_a_text_are_plain_text(config: DataBuildConfig) -> None:
    tokenizer = Tokenizer(config.tokenizer_path)
    (ids,) = tokenizer.encode(["[CLS] bake [MASK] lomi [SEP] [PAD] <0x41>"])
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert tokenizer.decode(ids) == "[CLS] bake [MASK] lomi [SEP] [PAD] <0x41>"


def test_training_on_a_sample_takes_that_many_sentences_of_all_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"Sentence number {number}." for number in range(3000)]
    path = write_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", texts))
    taken: dict[float, list[str]] = {}
    for block in (0.001, 0.01, 10.0):
        sample = load(DataBuildConfig, path, [f"block_size_mb={block}", "tokenizer_sentences=300"])
        monkeypatch.setattr("data_pipeline.build.train_tokenizer", lambda s, *rest, b=block: taken.update({b: list(s)}))
        build_tokenizer(sample)
    first = taken[0.001]
    assert taken[0.01] == first == taken[10.0]
    numbers = [int(sentence.rstrip(".").split()[-1]) for sentence in first]
    assert len(numbers) == 300 and numbers == sorted(set(numbers))
    assert abs(np.mean(numbers) - 1500) < 5 * 3000 / np.sqrt(12 * 300)


def test_a_tokenizer_of_another_size_is_refused(config: DataBuildConfig) -> None:
    other = config.model_copy(update={"vocab_size": 500})
    for step in (lambda: build_sentences(other, Alone()), lambda: build_instances(other, "train", Alone())):
        with pytest.raises(DataError, match=r"tokenizer\.model has 400 pieces, not vocab_size=500"):
            step()


# Sentences and pairs.


def test_the_stored_sentences_are_the_tokenised_text(config: DataBuildConfig) -> None:
    tokenizer = Tokenizer(config.tokenizer_path)
    expected = [tokenizer.encode(split_sentences(text)) for text in TEXTS]
    stored = []
    dataset = read_dataset(config.sentences_path, "sentences")
    for split in SPLITS:
        corpus = Corpus(dataset, split)
        for number in range(len(corpus)):
            tokens, ends = corpus.document(number)
            stored.append([part.tolist() for part in np.split(tokens, ends[:-1])])
    assert sorted(stored) == sorted(expected)


def numbered_corpus(folder: Path, lengths: list[list[int]]) -> Corpus:
    """Write sentences of these lengths; a token is its document's number times 1000 plus its place."""
    tokens = [1000 * number + place for number, document in enumerate(lengths) for place in range(sum(document))]
    columns: Columns = {
        "tokens": np.array(tokens, np.uint32),
        "sentence_lengths": np.array([length for document in lengths for length in document], np.int32),
        "document_sentences": np.array([len(document) for document in lengths], np.int32),
    }
    shards = [("train-000000", columns, {"documents": len(lengths)})]
    write_dataset(folder / "sentences", Alone(), "sentences", {}, shards)
    return Corpus(read_dataset(folder / "sentences", "sentences"), "train")


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=12), min_size=2, max_size=12),
    capacity=st.integers(5, 70),
    short=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_pairs_keep_every_token_and_never_take_the_same_document(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], capacity: int, short: float, seed: int
) -> None:
    corpus = numbered_corpus(tmp_path_factory.mktemp("c"), lengths)
    for number, document in enumerate(lengths):
        own: list[int] = []
        for pair in document_pairs(corpus, number, capacity, short, (0,), seed):
            first, second = pair.first.tolist(), pair.second.tolist()
            assert first and second and len(first) + len(second) <= capacity
            own += first + ([] if pair.is_random else second)
            if pair.is_random:
                source = {token // 1000 for token in second}
                assert len(source) == 1 and source != {number}
                begins = {1000 * next(iter(source)) + int(end) for end in np.cumsum([0, *lengths[next(iter(source))]])}
                assert second[0] in begins  # at a sentence
                assert second == list(range(second[0], second[0] + len(second)))
        assert own == list(range(1000 * number, 1000 * number + sum(document)))


def test_half_of_the_pairs_are_foreign_and_come_from_all_documents(tmp_path: Path) -> None:
    corpus = numbered_corpus(tmp_path, [[10] * 30] * 100)
    pairs = [pair for number in range(100) for pair in document_pairs(corpus, number, 40, 0.1, (0,), 1)]
    share = np.mean([pair.is_random for pair in pairs])
    assert abs(share - 0.5) < 4 * np.sqrt(0.25 / len(pairs))
    sources = np.bincount([int(pair.second[0]) // 1000 for pair in pairs if pair.is_random], minlength=100)
    expected = sources.sum() / 100
    assert ((sources - expected) ** 2 / expected).sum() < 99 + 4 * np.sqrt(2 * 99)  # chi square
    other_copy = [pair for number in range(100) for pair in document_pairs(corpus, number, 40, 0.1, (1,), 1)]
    assert [len(pair.first) for pair in pairs] != [len(pair.first) for pair in other_copy]


# Masking.


def test_whole_word_masking_of_text_without_spaces_keeps_the_rate(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["".join(chr(0x4E00 + int(c)) for c in rng.integers(0, 200, rng.integers(1, 3))) for _ in range(300)]
    texts = ["".join(rng.choice(words, 30)) + "。" for _ in range(400)]
    train_tokenizer(texts, 650, tmp_path / "t.model")
    tokenizer = Tokenizer(tmp_path / "t.model")
    ids = np.full((100, 80), PAD)
    for row, (first, second) in zip(ids, zip(texts[::4], texts[1::4], strict=True), strict=True):
        a, b = (part[:38] for part in tokenizer.encode([first, second]))
        sequence = [CLS, *a, SEP, *b, SEP]
        row[: len(sequence)] = sequence
    masked = mask_tokens(ids, random_bits(3, np.arange(100)), 0.15, tokenizer.vocab_size, tokenizer.starts_word)
    shares = masked.chosen.sum(1) / (ids > MASK).sum(1)
    assert 0.12 < shares.mean() < 0.16 and shares.max() < 0.2 and shares.min() > 0.08


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10)),
    word=st.integers(1, 8),
    rate=st.floats(0.01, 0.95),
    key=st.integers(0, 2**64 - 1),
)
def test_masks_of_any_kind_spare_special_tokens_and_padding(
    lengths: tuple[int, int, int], word: int, rate: float, key: int
) -> None:
    first, second, padding = lengths
    ids = np.array([[CLS, *range(5, 5 + first), SEP, *range(5, 5 + second), SEP, *[PAD] * padding]])
    starts_word = np.arange(100) % word == 0
    for words in (None, starts_word):
        masked, chosen = mask_tokens(ids, np.array([key], np.uint64), rate, 100, words)
        assert chosen.any() and not chosen[ids < 5].any()
        assert np.array_equal(masked[ids < 5], ids[ids < 5])
        if words is None:
            assert chosen.sum() == max(1, round(rate * (first + second)))
        else:  # more only if the first word drawn is longer; short by less than the word that did not fit
            assert chosen.sum() <= max(8, round(rate * (first + second)))
            assert chosen.sum() > round(rate * (first + second)) - 8


# The embedded corpus.


def test_the_embedded_corpus_keeps_its_size_and_takes_whole_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "modules"
    sources.mkdir()
    prose = "This is the {0}{1} sentence of the text, and it says what the module is for in plain words."
    for number in range(60):
        sentences = " ".join(prose.format(chr(97 + number // 10), chr(97 + number % 10)) for _ in range(4))
        (sources / f"m{number}.py").write_text(f'"""{sentences}"""\n')
    (sources / "same.py").write_text((sources / "m0.py").read_text())
    (sources / "latin.py").write_bytes(b'"""caf\xe9"""\n')
    monkeypatch.setattr(embedded, "_modules", lambda: iter(sorted(sources.iterdir())))
    everything = list(embedded.embedded_documents())
    assert len(everything) == len(set(everything)) == 60
    for max_mb in (0.01, 1.0):
        out = tmp_path / "corpus.jsonl"
        count = embedded.write_embedded_corpus(out, max_mb)
        texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
        assert len(texts) == count and set(texts) <= set(everything)
        assert out.stat().st_size <= max_mb * 1e6
        assert count == 60 if max_mb == 1.0 else 10 < count < 40
    with pytest.raises(DataError, match=r"at most 0\.0001 MB"):
        embedded.write_embedded_corpus(out, 0.0001)
