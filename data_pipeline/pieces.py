"""The instances of causal LM, prefix LM and span corruption: consecutive pieces of documents, every token once.

Batches are not padded, so a short piece costs nothing: a piece never holds tokens of two documents.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import DataBuildConfig
from data_pipeline.pairs import Corpus
from data_pipeline.shards import Columns
from data_pipeline.span_corruption import Corrupted, corrupt, noise_counts, noise_mask, piece_length
from data_pipeline.tokenizer import CLS, SEP, Tokenizer
from megacore.random import stream_key, uniform


def piece_offsets(length: int, capacity: int) -> NDArray[np.int64]:
    """Return where the pieces of at most ``capacity`` (3 or more) tokens begin and end [pieces + 1].

    A last piece of one token takes one more from the piece before it, if there is one.
    """
    offsets = np.append(np.arange(0, length, capacity), length)
    if len(offsets) > 2 and offsets[-1] - offsets[-2] == 1:
        offsets[-2] -= 1
    return offsets


def language_model_pieces(
    config: DataBuildConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    copy: int,
    file: int,
    on_progress: Callable[[int], None],
) -> tuple[Columns, dict[str, int]]:
    """Return the instances of one sentence file in one copy of the corpus, for causal and prefix LM.

    ``input_ids`` (flat) with ``offsets`` [n + 1]: [CLS] and a piece, [SEP] after the last piece of a document; and
    ``prefix_length`` [n]: uniform between 1 and the length less 1, so that the output part has a token.
    """
    sequences: list[NDArray[np.int64]] = []
    prefixes: list[NDArray[np.uint16]] = []
    lengths: list[NDArray[np.int64]] = []
    for number in corpus.file_documents(file):
        text = np.append(corpus.document(number)[0].astype(np.int64), SEP)
        offsets = piece_offsets(len(text), config.sequence_length - 1)
        sequences.append(np.insert(text, offsets[:-1], CLS))
        lengths.append(np.diff(offsets) + 1)
        draws = uniform(stream_key(config.seed, "prefix", copy, number), np.arange(len(offsets) - 1))
        prefixes.append((1 + draws * (lengths[-1] - 1)).astype(np.uint16))
        on_progress(len(offsets) - 1)
    columns: Columns = {
        "input_ids": np.concatenate(sequences).astype(tokenizer.id_dtype),
        "offsets": np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64),
        "prefix_length": np.concatenate(prefixes),
    }
    instances, tokens = len(columns["prefix_length"]), len(columns["input_ids"])
    special = instances + len(sequences)
    return columns, {"instances": instances, "tokens": tokens, "corpus_tokens": tokens - special}


def corrupted_pieces(
    config: DataBuildConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    copy: int,
    file: int,
    on_progress: Callable[[int], None],
) -> tuple[Columns, dict[str, int]]:
    """Return the instances of one sentence file in one copy of the corpus, for span corruption.

    ``input_ids`` (flat) with ``offsets`` [n + 1], what the encoder reads; ``target_ids`` (flat) with
    ``target_offsets`` [n + 1], what the decoder is to write.
    """
    noise = config.noise_density, config.mean_noise_span_length
    capacity = piece_length(config.sequence_length, *noise)
    pieces: list[Corrupted] = []
    counts = {"corpus_tokens": 0, "noise": 0, "spans": 0}
    for number in corpus.file_documents(file):
        text, _ = corpus.document(number)
        offsets = piece_offsets(len(text), capacity)
        for place, (start, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            tokens, spans = noise_counts(stop - start, *noise)
            mask = noise_mask(stop - start, tokens, spans, stream_key(config.seed, "spans", copy, number, place))
            pieces.append(corrupt(text[start:stop], mask, tokenizer.vocab_size))
            counts["noise"] += tokens
            counts["spans"] += spans
        counts["corpus_tokens"] += len(text)
        on_progress(len(offsets) - 1)
    columns: Columns = {
        "input_ids": np.concatenate([piece.input_ids for piece in pieces]).astype(tokenizer.id_dtype),
        "offsets": np.cumsum([0, *(len(piece.input_ids) for piece in pieces)], dtype=np.int64),
        "target_ids": np.concatenate([piece.target_ids for piece in pieces]).astype(tokenizer.id_dtype),
        "target_offsets": np.cumsum([0, *(len(piece.target_ids) for piece in pieces)], dtype=np.int64),
    }
    sizes = {"tokens": len(columns["input_ids"]), "target_tokens": len(columns["target_ids"])}
    return columns, {"instances": len(pieces), **sizes, **counts}
