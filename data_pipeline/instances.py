"""From tokenised sentences to MLM + NSP pretraining instances, in parallel over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from data_pipeline.config import DataBuildConfig
from data_pipeline.masking import mask_tokens
from data_pipeline.pairs import Corpus, Pair, document_pairs
from data_pipeline.shards import Columns, DatasetManifest, already_built, read_dataset, write_dataset
from data_pipeline.tokenizer import CLS, PAD, SEP, Tokenizer
from megacore.communicator import Communicator, together
from megacore.errors import DataError
from megacore.random import random_bits, stream_key

_SPECIAL = 3
"""[CLS] first [SEP] second [SEP]."""
_BATCH = 256
"""Instances that are masked at once."""


def build_instances(
    config: DataBuildConfig, split: str, group: Communicator, on_progress: Callable[[int], None] = lambda count: None
) -> DatasetManifest | None:
    """Write the instances of a split; return ``None`` if this was done before.

    A file holds the instances of one sentence file in one copy of the corpus: ``input_ids`` (flat, masked),
    ``offsets`` [n + 1], ``segment_b_start``, ``next_sentence_label`` (0: follows, 1: from elsewhere) [n], and
    ``masked_positions``, ``masked_labels`` (flat) with ``masked_offsets`` [n + 1].

    Raises:
        DataError: on every rank, if any rank failed.
    """
    path = config.instances_path(split)
    with together(group):
        tokenizer = Tokenizer(config.tokenizer_path, config.vocab_size)
        sentences = read_dataset(config.sentences_path, "sentences")
        about = _about(config, split, tokenizer, sentences.manifest)
        done = already_built(path, "instances", about)
        corpus = Corpus(sentences, split)
        if len(corpus) < 2:
            raise DataError(
                f"{config.sentences_path}: the {split} split has {len(corpus)} documents; next-sentence pairs need two "
                "(documents are separated by blank lines in .txt; see also validation_fraction)"
            )
    if done:
        return None
    written: list[DatasetManifest] = []
    jobs = [(copy, file) for copy in range(config.duplicates) for file in range(len(corpus.files))]
    own = (job for number, job in enumerate(jobs) if number % group.size == group.rank)
    shards = _shards(config, corpus, tokenizer, own, on_progress)
    write_dataset(path, group, "instances", about, shards, written.append)
    return written[0]


def _about(config: DataBuildConfig, split: str, tokenizer: Tokenizer, sentences: DatasetManifest) -> dict[str, Any]:
    if sentences.about["tokenizer_sha256"] != tokenizer.sha256:
        raise DataError(f"{config.sentences_path} was built with another tokenizer than {config.tokenizer_path}")
    for key in ("seed", "validation_fraction"):
        before, now = sentences.about[key], getattr(config, key)
        if before != now:
            raise DataError(f"{config.sentences_path} was built with {key}={before}, now it is {now}; build it again")
    keys = ("sequence_length", "duplicates", "short_sequence_probability", "masking", "masking_rate", "seed")
    return {
        "split": split,
        "sentences": sentences.digest,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        **{key: getattr(config, key) for key in keys},
    }


def _shards(
    config: DataBuildConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    jobs: Iterable[tuple[int, int]],
    on_progress: Callable[[int], None],
) -> Iterator[tuple[str, Columns, dict[str, int]]]:
    for copy, file in jobs:
        pairs = _pairs(config, corpus, copy, file)
        key = stream_key(config.seed, "masking", copy, corpus.files[file])
        batches: list[Columns] = []
        counts = {"instances": 0, "tokens": 0, "corpus_tokens": 0, "masked": 0, "random_next": 0}
        while batch := list(islice(pairs, _BATCH)):
            keys = random_bits(key, np.arange(counts["instances"], counts["instances"] + len(batch)))
            columns = _masked_columns(config, tokenizer, batch, keys)
            batches.append(columns)
            counts["instances"] += len(batch)
            counts["tokens"] += len(columns["input_ids"])
            # Every token of the corpus is used once: a foreign second segment is extra.
            counts["corpus_tokens"] += sum(len(p.first) + (0 if p.is_random else len(p.second)) for p in batch)
            counts["masked"] += len(columns["masked_labels"])
            counts["random_next"] += int(columns["next_sentence_label"].sum())
            on_progress(len(batch))
        yield f"copy{copy:03d}-{corpus.files[file].removesuffix('.safetensors')}", _joined(batches), counts


def _pairs(config: DataBuildConfig, corpus: Corpus, copy: int, file: int) -> Iterator[Pair]:
    capacity = config.sequence_length - _SPECIAL
    for number in range(int(corpus.first_documents[file]), int(corpus.first_documents[file + 1])):
        yield from document_pairs(corpus, number, capacity, config.short_sequence_probability, (copy,), config.seed)


def _masked_columns(config: DataBuildConfig, tokenizer: Tokenizer, pairs: list[Pair], keys: Any) -> Columns:
    sizes = np.array([len(pair.first) + len(pair.second) + _SPECIAL for pair in pairs])
    ids = np.full((len(pairs), config.sequence_length), PAD, np.int64)
    for row, pair in zip(ids, pairs, strict=True):
        middle = len(pair.first) + 1
        row[0] = CLS
        row[1:middle] = pair.first
        row[middle] = SEP
        end = middle + 1 + len(pair.second)
        row[middle + 1 : end] = pair.second
        row[end] = SEP
    whole_words = tokenizer.starts_word if config.masking == "whole_word" else None
    masked = mask_tokens(ids, keys, config.masking_rate, tokenizer.vocab_size, whole_words)
    real = np.arange(config.sequence_length) < sizes[:, None]
    return {
        "input_ids": masked.input_ids[real].astype(tokenizer.id_dtype),
        "lengths": sizes,
        "segment_b_start": np.array([len(pair.first) + 2 for pair in pairs], np.uint16),
        "next_sentence_label": np.array([pair.is_random for pair in pairs], np.uint8),
        "masked_counts": masked.chosen.sum(1),
        "masked_positions": np.nonzero(masked.chosen)[1].astype(np.uint16),
        "masked_labels": ids[masked.chosen].astype(tokenizer.id_dtype),
    }


def _joined(batches: list[Columns]) -> Columns:
    columns = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    columns["offsets"] = np.cumsum([0, *columns.pop("lengths")], dtype=np.int64)
    columns["masked_offsets"] = np.cumsum([0, *columns.pop("masked_counts")], dtype=np.int64)
    return columns
