"""Pieces for LM and span corruption: no token is lost or doubled, counts are exact, ranks do not matter."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build import SPLITS
from data_pipeline.config import DataBuildConfig
from data_pipeline.instances import build_instances
from data_pipeline.loader import Instance, InstanceDataset
from data_pipeline.pairs import Corpus
from data_pipeline.pieces import piece_offsets
from data_pipeline.sentences import split_sentences
from data_pipeline.shards import read_dataset
from data_pipeline.span_corruption import corrupt, noise_counts, noise_mask, piece_length, sentinels_needed
from data_pipeline.tokenizer import CLS, SEP, Tokenizer
from launcher.start import megacore_command, mpi_command
from megacore.communicator import Alone
from megacore.errors import ConfigError, DataError
from megacore.settings import load
from tests.data.corpora import TEXTS, build_all, write_config, write_jsonl
from tests.data.test_text_to_instances import assert_one_error, call, digests

SPANS = {"objective": "span_corruption", "num_sentinels": 6, "vocab_size": 406}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> DataBuildConfig:
    return build_all(tmp_path_factory.mktemp("lm"), objective="lm")


@pytest.fixture(scope="module")
def spans(tmp_path_factory: pytest.TempPathFactory) -> DataBuildConfig:
    return build_all(tmp_path_factory.mktemp("spans"), **SPANS)


def instances(config: DataBuildConfig, split: str) -> list[Instance]:
    dataset = InstanceDataset(config.instances_path(split))
    return [dataset[number] for number in range(len(dataset))]


def tokenised_texts(config: DataBuildConfig) -> list[list[int]]:
    """Return the tokens of each document, from the text itself."""
    tokenizer = Tokenizer(config.tokenizer_path)
    return [[token for ids in tokenizer.encode(split_sentences(text)) for token in ids] for text in TEXTS]


# Pieces.


@given(length=st.integers(1, 200), capacity=st.integers(3, 60))
def test_pieces_follow_each_other_and_are_as_long_as_can_be(length: int, capacity: int) -> None:
    sizes = np.diff(piece_offsets(length, capacity)).tolist()
    assert sum(sizes) == length and max(sizes) <= capacity
    assert len(sizes) == -(-length // capacity)
    assert min(sizes) >= min(2, length)


# Causal and prefix LM.


def test_lm_instances_without_special_tokens_are_the_documents(lm: DataBuildConfig) -> None:
    documents: list[list[int]] = []
    for split in SPLITS:
        current: list[int] = []
        for instance in instances(lm, split):
            ids = instance["input_ids"].tolist()
            assert ids[0] == CLS and 2 <= len(ids) <= lm.sequence_length
            ends = ids[-1] == SEP
            text = ids[1:-1] if ends else ids[1:]
            assert text and CLS not in text and SEP not in text
            assert ends or len(ids) >= lm.sequence_length - 1  # only a document's last piece may be short
            current += text
            if ends:
                documents.append(current)
                current = []
        assert not current
    assert sorted(documents) == sorted(tokenised_texts(lm) * lm.duplicates)
    manifests = [read_dataset(lm.instances_path(split), "instances").manifest for split in SPLITS]
    assert sum(manifest.total("corpus_tokens") for manifest in manifests) == sum(map(len, documents))


def test_prefixes_are_uniform_leave_an_output_and_differ_between_copies(lm: DataBuildConfig) -> None:
    everything = instances(lm, "train")
    prefix = np.array([instance["prefix_length"] for instance in everything])
    length = np.array([len(instance["input_ids"]) for instance in everything])
    assert (prefix >= 1).all() and (prefix < length).all()
    full = prefix[length == lm.sequence_length]
    expected = len(full) / (lm.sequence_length - 1)
    counts = np.bincount(full, minlength=lm.sequence_length)[1:]
    freedom = lm.sequence_length - 2
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom)  # chi square
    first, second = np.split(prefix, 2)  # the two copies hold the same pieces
    assert np.array_equal(*np.split(length, 2)) and (first != second).mean() > 0.5


# Span corruption.


def restored(input_ids: list[int], target_ids: list[int], vocab_size: int, sentinels: int) -> list[int]:
    """Put the spans of a target back into the places of their sentinels."""
    first = vocab_size - sentinels
    assert input_ids[-1] == target_ids[-1] == SEP
    parts = [list(part) for _, part in groupby(target_ids[:-1], key=lambda token: token >= first)]
    names, taken = [part for part in parts if part[0] >= first], [part for part in parts if part[0] < first]
    used = [name for (name,) in names]  # no two sentinels follow each other: no span is empty
    assert used == [vocab_size - 1 - place for place in range(len(used))] and len(taken) == len(used) - 1
    assert [token for token in input_ids if token >= first] == used[:-1]
    spans = dict(zip(used, taken, strict=False))
    return [token for name in input_ids[:-1] for token in spans.get(name, [name])]


def test_spans_put_back_into_the_input_restore_the_text(spans: DataBuildConfig) -> None:
    longest = pieces = 0
    sentences = read_dataset(spans.sentences_path, "sentences")
    for split in SPLITS:
        corpus = Corpus(sentences, split)
        documents = [corpus.document(number)[0].tolist() for number in range(len(corpus))] * spans.duplicates
        text: list[int] = []
        for instance in instances(spans, split):
            inputs, targets = instance["input_ids"].tolist(), instance["target_ids"].tolist()
            longest, pieces = max(longest, len(inputs)), pieces + 1
            assert max(len(inputs), len(targets)) <= spans.sequence_length
            piece = restored(inputs, targets, spans.vocab_size, spans.num_sentinels)
            noise = max(1, round(len(piece) * 0.15))
            count = max(1, round(noise / 3))
            assert len(targets) == noise + count + 2 and len(inputs) == len(piece) - noise + count + 1
            text += piece
            if len(text) >= len(documents[0]):  # a piece never reaches into the next document
                assert text == documents.pop(0)
                text = []
        assert not text and not documents
    assert longest == spans.sequence_length  # the room is used
    manifests = [read_dataset(spans.instances_path(split), "instances").manifest for split in SPLITS]
    expected = spans.duplicates * sum(map(len, tokenised_texts(spans)))
    assert sum(manifest.total("corpus_tokens") for manifest in manifests) == expected
    assert sum(manifest.total("instances") for manifest in manifests) == pieces


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(1, 300),
    density=st.floats(0.01, 0.99),
    mean=st.floats(1, 20),
    key=st.integers(0, 2**64 - 1),
)
def test_noise_has_exact_counts_and_is_a_function_of_its_key(
    length: int, density: float, mean: float, key: int
) -> None:
    noise, count = noise_counts(length, density, mean)
    mask = noise_mask(length, noise, count, key)
    runs = [is_noise for is_noise, _ in groupby(mask.tolist())]
    assert len(mask) == length and mask.sum() == noise == max(1, round(length * density))
    assert sum(runs) == count
    assert count == max(1, round(noise / mean)) or count == length - noise + 1  # as many as can be kept apart
    assert np.array_equal(mask, noise_mask(length, noise, count, key))
    tokens = np.arange(5, 5 + length)
    vocab = 5 + length + count + 1
    corrupted = corrupt(tokens, mask, vocab)
    assert restored(corrupted.input_ids.tolist(), corrupted.target_ids.tolist(), vocab, count + 1) == tokens.tolist()


def test_all_masks_are_equally_likely() -> None:
    """All ways to place 4 tokens of noise in 2 spans among 9 tokens, counted one by one."""
    possible = [taken for taken in combinations(range(9), 4) if sum(place + 1 not in taken for place in taken) == 2]
    drawn = Counter(tuple(np.flatnonzero(noise_mask(9, 4, 2, key)).tolist()) for key in range(20_000))
    assert drawn.keys() == set(possible)
    expected = 20_000 / len(possible)
    statistic = sum((count - expected) ** 2 / expected for count in drawn.values())
    freedom = len(possible) - 1
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)


@settings(max_examples=100, deadline=None)
@given(sequence_length=st.integers(8, 400), density=st.floats(0.01, 0.99), mean=st.floats(1, 20))
def test_the_longest_piece_fits_and_one_token_more_does_not(sequence_length: int, density: float, mean: float) -> None:
    def sizes(length: int) -> tuple[int, int]:
        noise = max(1, round(length * density))
        count = min(max(1, round(noise / mean)), length - noise + 1)
        return length - noise + count + 1, noise + count + 2

    longest = piece_length(sequence_length, density, mean)
    assert all(max(sizes(length)) <= sequence_length for length in range(1, longest + 1))
    assert max(sizes(longest + 1)) > sequence_length
    needed = [sentinels_needed(length, density, mean) for length in range(1, longest + 1)]
    assert max(needed) == needed[-1]


def test_too_few_sentinels_are_refused_with_the_number_needed(tmp_path: Path) -> None:
    path = write_config(tmp_path, tmp_path / "c.jsonl", **SPANS, sequence_length=512)
    # 568 tokens have 85 of noise in 28 spans: 568 - 85 + 28 + 1 = 512; the last sentinel ends the target.
    with pytest.raises(ConfigError, match=r"num_sentinels=28 .* needs 29 for sequence_length=512"):
        load(DataBuildConfig, path, ["num_sentinels=28"])
    assert load(DataBuildConfig, path, ["num_sentinels=29"]).num_sentinels == 29
    with pytest.raises(ConfigError, match=r"vocab_size=406 is too few with num_sentinels=200; at least 462"):
        load(DataBuildConfig, path, ["num_sentinels=200"])


# Both.


@pytest.mark.parametrize("objective", ["lm", "span_corruption"])
def test_any_number_of_ranks_and_this_process_write_the_same_bytes(
    lm: DataBuildConfig, spans: DataBuildConfig, tmp_path: Path, objective: str
) -> None:
    built = {"lm": lm, "span_corruption": spans}[objective]
    expected = {name: digest for name, digest in digests(built.output_dir).items() if name.startswith("instances")}
    assert len([name for name in expected if "train-" in name]) > 4
    changes: dict[str, Any] = SPANS if objective == "span_corruption" else {"objective": "lm"}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        (folder / "data").mkdir(parents=True)
        for name in ("tokenizer.model", "sentences"):
            (folder / "data" / name).symlink_to(built.output_dir / name)
        config = write_config(folder, built.inputs[0], **changes)
        result = call(mpi_command(ranks, "data", "instances", config))
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"with {ranks} ranks" in result.stdout
        assert {f"instances/{k}": v for k, v in digests(folder / "data" / "instances").items()} == expected


def test_instances_of_another_objective_are_not_taken_for_these(lm: DataBuildConfig) -> None:
    assert build_instances(lm, "train", Alone()) is None
    for objective in ("mlm_nsp", "span_corruption"):
        with pytest.raises(DataError, match=f"was built with objective='lm', now it is '{objective}'"):
            build_instances(lm.model_copy(update={"objective": objective}), "train", Alone())


def test_one_document_is_enough_and_none_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", [" ".join(TEXTS)]), vocab_size=300)
    words = ("objective=lm", "validation_fraction=0")
    for command in ("tokenizer", "build", "instances"):
        result = call(megacore_command("data", command, config, *words))
        assert result.returncode == 0, result.stderr
    settings_ = load(DataBuildConfig, config, words)
    with pytest.raises(DataError, match="the validation split has 0 documents; objective=lm needs 1"):
        build_instances(settings_, "validation", Alone())
    assert_one_error(call(megacore_command("data", "instances", config, *words, "objective=cooking")), "objective")
