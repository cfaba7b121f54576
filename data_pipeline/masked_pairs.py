"""The instances of MLM + NSP: masked pairs of segments (Devlin et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from data_pipeline.config import DataBuildConfig
from data_pipeline.masking import mask_tokens
from data_pipeline.pairs import Corpus, Pair, document_pairs
from data_pipeline.shards import Columns
from data_pipeline.tokenizer import CLS, PAD, SEP, Tokenizer
from megacore.random import random_bits, stream_key

_SPECIAL = 3
"""[CLS] first [SEP] second [SEP]."""
_BATCH = 256
"""Instances that are masked at once."""


def masked_pairs(
    config: DataBuildConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    copy: int,
    file: int,
    on_progress: Callable[[int], None],
) -> tuple[Columns, dict[str, int]]:
    """Return the instances of one sentence file in one copy of the corpus.

    ``input_ids`` (flat, masked) with ``offsets`` [n + 1], ``segment_b_start``, ``next_sentence_label`` (0: follows,
    1: from elsewhere) [n], and ``masked_positions``, ``masked_labels`` (flat) with ``masked_offsets`` [n + 1].
    """
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
    return _joined(batches), counts


def _pairs(config: DataBuildConfig, corpus: Corpus, copy: int, file: int) -> Iterator[Pair]:
    capacity = config.sequence_length - _SPECIAL
    for number in corpus.file_documents(file):
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
    masked = mask_tokens(ids, keys, config.masking_rate, tokenizer.text_vocab_size, whole_words)
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
