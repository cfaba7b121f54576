"""The whole way from text to instances, with real MPI ranks: the same bytes, nothing lost, pairs as promised."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.config import DataBuildConfig
from data_pipeline.loader import InstanceDataset
from data_pipeline.pairs import Corpus, document_pairs
from data_pipeline.sentences import split_sentences
from data_pipeline.shards import read_dataset
from data_pipeline.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from launcher.start import megacore_command, mpi_command
from megacore.errors import DataError
from megacore.settings import load
from tests.data.corpora import documents, write_config, write_jsonl

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=30)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, DataBuildConfig]]:
    """Run all steps with 1, 2 and 4 ranks."""
    results = {}
    for ranks in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        config = write_config(folder, write_jsonl(folder / "corpus.jsonl", documents()))
        for command in (
            megacore_command("data", "tokenizer", config),
            mpi_command(ranks, "data", "build", config),
            mpi_command(ranks, "data", "instances", config),
        ):
            result = call(command)
            assert result.returncode == 0, result.stdout + result.stderr
        results[ranks] = (folder, load(DataBuildConfig, config))
    return results


def test_any_number_of_ranks_writes_the_same_bytes(built: Any) -> None:
    first, second, third = (digests(folder / "data") for folder, _ in built.values())
    assert first == second == third
    assert len([name for name in first if name.startswith("sentences/train")]) > 4


def test_no_token_is_lost_on_the_way(built: Any) -> None:
    _, config = built[2]
    tokenizer = Tokenizer(config.tokenizer_path)
    expected = sum(len(ids) for text in documents() for ids in tokenizer.encode(split_sentences(text)))
    sentences = read_dataset(config.sentences_path, "sentences").manifest
    assert sentences.total("tokens") == expected
    assert sentences.total("documents") == len(documents())
    used = 0
    for split in ("train", "validation"):
        used += read_dataset(config.instances_path(split), "instances").manifest.total("corpus_tokens")
    assert used == expected * config.duplicates


def test_the_splits_share_no_document(built: Any) -> None:
    _, config = built[1]
    dataset = read_dataset(config.sentences_path, "sentences")
    seen: dict[str, set[bytes]] = {}
    for split in ("train", "validation"):
        corpus = Corpus(dataset, split)
        seen[split] = {corpus.document(number)[0].tobytes() for number in range(len(corpus))}
    assert not seen["train"] & seen["validation"]  # also where the corpus holds a document twice
    assert 0.1 < len(seen["validation"]) / len(documents()) < 0.35


def test_pairs_use_every_token_once_in_order_and_foreign_segments_are_foreign(built: Any) -> None:
    _, config = built[1]
    corpus = Corpus(read_dataset(config.sentences_path, "sentences"), "train")
    everything = [corpus.document(number)[0].tolist() for number in range(len(corpus))]
    labels = []
    for number, tokens in enumerate(everything):
        used: list[int] = []
        for pair in document_pairs(corpus, number, 45, 0.1, (0,), config.seed):
            assert len(pair.first) >= 1 and len(pair.second) >= 1
            assert len(pair.first) + len(pair.second) <= 45
            used += pair.first.tolist()
            second = pair.second.tolist()
            if pair.is_random:
                at = [other for other, text in enumerate(everything) if contains(text, second)]
                assert any(other != number for other in at)
            else:
                used += second
            labels.append(pair.is_random)
        assert used == tokens
    assert abs(np.mean(labels) - 0.5) < 4 * np.sqrt(0.25 / len(labels))


def contains(text: list[int], part: list[int]) -> bool:
    return any(text[start : start + len(part)] == part for start in range(len(text) - len(part) + 1))


def test_labels_restore_the_sequence(built: Any) -> None:
    """An instance with its labels put back is [CLS] first [SEP] second [SEP] of the pairs, in their order."""
    _, config = built[1]
    corpus = Corpus(read_dataset(config.sentences_path, "sentences"), "validation")
    expected = []
    for copy in range(config.duplicates):
        for number in range(len(corpus)):
            pairs = document_pairs(corpus, number, config.sequence_length - 3, 0.1, (copy,), config.seed)
            for pair in pairs:
                sequence = [2, *pair.first.tolist(), 3, *pair.second.tolist(), 3]
                expected.append((sequence, len(pair.first) + 2, int(pair.is_random)))
    dataset = InstanceDataset(config.instances_path("validation"))
    assert len(dataset) == len(expected) > 50
    for number, (sequence, middle, label) in enumerate(expected):
        instance = dataset[number]
        restored = instance["input_ids"].astype(np.int64)
        restored[instance["masked_positions"]] = instance["masked_labels"]
        assert restored.tolist() == sequence
        assert (instance["segment_b_start"], instance["next_sentence_label"]) == (middle, label)


def test_a_second_run_finds_its_work_done_and_another_config_is_refused(built: Any) -> None:
    folder, _ = built[2]
    again = call(mpi_command(2, "data", "instances", folder / "data.yaml"))
    assert again.returncode == 0 and again.stdout.count("already built") == 2
    other = call(mpi_command(2, "data", "instances", folder / "data.yaml", "masking_rate=0.3"))
    assert_one_error(other, "masking_rate=0.15", "0.3")


def assert_one_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode != 0
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("content", "part"),
    [(b"", "empty"), (b"\n \n", "no documents"), (b"One. Two.\n\nbad \xff\n", "not UTF-8"), (None, "no such file")],
)
def test_bad_text_ends_the_job_with_one_error_and_no_output(
    built: Any, tmp_path: Path, content: bytes | None, part: str
) -> None:
    corpus = tmp_path / "corpus.txt"
    if content is not None:
        corpus.write_bytes(content)
    config = write_config(tmp_path, corpus)
    data = tmp_path / "data"
    for command in ("tokenizer", "build"):
        if command == "build":  # with a tokenizer in place, the text is read by two ranks
            data.mkdir(exist_ok=True)
            (data / "tokenizer.model").write_bytes(built[1][1].tokenizer_path.read_bytes())
        assert_one_error(call(mpi_command(2, "data", command, config)), part)
        assert not data.exists() or [path.name for path in data.iterdir()] == ["tokenizer.model"]


def test_a_vocabulary_larger_than_the_text_allows_is_refused_with_the_largest(tmp_path: Path) -> None:
    config = write_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", documents(20)), vocab_size=30000)
    result = call(megacore_command("data", "tokenizer", config))
    assert_one_error(result, "vocab_size=30000 is more than the text allows; at most ")
    assert not (tmp_path / "data" / "tokenizer.model").exists()
    largest = int(result.stderr.split("at most ")[1])
    train_tokenizer([s for text in documents(20) for s in split_sentences(text)], largest, tmp_path / "t.model")
    assert Tokenizer(tmp_path / "t.model").vocab_size == largest


def test_the_tokenizer_keeps_special_ids_and_text(built: Any, tmp_path: Path) -> None:
    _, config = built[1]
    tokenizer = Tokenizer(config.tokenizer_path)
    assert tokenizer.vocab_size == 400
    text = "Bake lomi nusa — été 中文!"
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text  # byte fallback: no unknown tokens
    assert min(ids) >= len(SPECIAL_TOKENS)
    (tmp_path / "bad.model").write_bytes(b"no model")
    for name, what in (("bad.model", "not a sentencepiece model"), ("none.model", "no tokenizer")):
        with pytest.raises(DataError, match=what):
            Tokenizer(tmp_path / name)


def test_one_document_is_not_enough_for_pairs(tmp_path: Path) -> None:
    config = write_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", documents(1)), vocab_size=300)
    (tmp_path / "c.jsonl").write_text('{"text": "' + " ".join(documents(40)) + '"}\n')
    assert call(megacore_command("data", "tokenizer", config)).returncode == 0
    assert call(megacore_command("data", "build", config, "validation_fraction=0")).returncode == 0
    result = call(mpi_command(2, "data", "instances", config, "validation_fraction=0"))
    assert_one_error(result, "1 documents", "objective=mlm_nsp needs 2")
