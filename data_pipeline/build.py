"""From text to tokenised sentences, in parallel over ranks; the same bytes for any number of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from data_pipeline.config import DataBuildConfig
from data_pipeline.sentences import split_sentences
from data_pipeline.shards import Columns, DatasetManifest, already_built, write_dataset
from data_pipeline.sources import Unit, documents, file_digest, units
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from megacore.communicator import Communicator, together
from megacore.errors import DataError
from megacore.random import random_bits, stream_key

SPLITS = ("train", "validation")
_BATCH = 512
"""Documents that are tokenised at once."""

Progress = Callable[[int], None]


def build_tokenizer(config: DataBuildConfig, on_progress: Progress = lambda size: None) -> None:
    """Train the tokenizer on a sample of the corpus.

    Raises:
        DataError: the corpus cannot be read, is empty, or does not allow the vocabulary size.
    """
    sentences = _sampled_sentences(config, on_progress)
    train_tokenizer(sentences, config.vocab_size, config.tokenizer_path, config.num_sentinels)


def _sampled_sentences(config: DataBuildConfig, on_progress: Progress) -> list[str]:
    """Take the sentences whose random numbers are smallest: a fixed sample, whatever the order of reading."""
    key, limit = stream_key(config.seed, "tokenizer"), config.tokenizer_sentences
    sentences: list[str] = []
    order = np.empty(0, np.uint64)
    seen = 0
    for unit in units(config.inputs, _block_bytes(config)):
        new = [sentence for text in documents(unit) for sentence in split_sentences(text)]
        sentences += new
        order = np.append(order, random_bits(key, np.arange(seen, seen + len(new))))
        seen += len(new)
        if len(sentences) > limit:  # after each unit, so that memory does not grow with the corpus
            chosen = np.sort(np.argpartition(order, limit)[:limit])
            sentences, order = [sentences[number] for number in chosen], order[chosen]
        on_progress(unit.stop - unit.start)
    if not sentences:
        raise DataError(f"the corpus has no documents: {', '.join(map(str, config.inputs))}")
    return sentences


def build_sentences(
    config: DataBuildConfig, group: Communicator, on_progress: Progress = lambda size: None
) -> DatasetManifest | None:
    """Split and tokenise the corpus; return ``None`` if this was done before.

    A file holds the documents of one split of one unit: ``tokens`` (flat), ``sentence_lengths`` (tokens of each
    sentence) and ``document_sentences`` (sentences of each document).

    Raises:
        DataError: on every rank, if any rank failed.
    """
    with together(group):
        tokenizer = Tokenizer(config.tokenizer_path, config.vocab_size, config.num_sentinels)
        blocks = units(config.inputs, _block_bytes(config))
        about = _about(config, tokenizer)
        done = already_built(config.sentences_path, "sentences", about)
    if done:
        return None
    written: list[DatasetManifest] = []

    def check(manifest: DatasetManifest) -> None:
        if not manifest.total("documents"):
            raise DataError(f"the corpus has no documents: {', '.join(map(str, config.inputs))}")
        written.append(manifest)

    own = [(number, block) for number, block in enumerate(blocks) if number % group.size == group.rank]
    shards = _shards(config, tokenizer, own, on_progress)
    write_dataset(config.sentences_path, group, "sentences", about, shards, check)
    return written[0]


def _about(config: DataBuildConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "inputs": [f"{path.name}: {file_digest(path)}" for path in config.inputs],
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "validation_fraction": config.validation_fraction,
        "block_size_mb": config.block_size_mb,
        "seed": config.seed,
    }


def _block_bytes(config: DataBuildConfig) -> int:
    return max(1, int(config.block_size_mb * 1e6))


def _shards(
    config: DataBuildConfig, tokenizer: Tokenizer, own: list[tuple[int, Unit]], on_progress: Progress
) -> Iterator[tuple[str, Columns, dict[str, int]]]:
    for number, unit in own:
        collected: dict[str, list[list[list[int]]]] = {split: [] for split in SPLITS}
        texts = documents(unit)
        while batch := list(islice(texts, _BATCH)):
            for text, tokens in zip(batch, _tokenised(tokenizer, batch), strict=True):
                if tokens:
                    collected[_split_of(text, config)].append(tokens)
        for split, tokenised in collected.items():
            if tokenised:
                yield f"{split}-{number:06d}", *_columns(tokenizer, tokenised)
        on_progress(unit.stop - unit.start)


def _split_of(text: str, config: DataBuildConfig) -> str:
    """Decide by the text itself, so that equal documents are never on both sides."""
    held_out = stream_key(config.seed, "split", text) < config.validation_fraction * 2**64
    return SPLITS[int(held_out)]


def _tokenised(tokenizer: Tokenizer, texts: list[str]) -> Iterator[list[list[int]]]:
    """Yield the sentences of each text as ids; one call of the tokenizer for all."""
    sentences = [split_sentences(text) for text in texts]
    ids = iter(tokenizer.encode([sentence for document in sentences for sentence in document]))
    for document in sentences:
        yield [tokens for tokens in islice(ids, len(document)) if tokens]


def _columns(tokenizer: Tokenizer, tokenised: list[list[list[int]]]) -> tuple[Columns, dict[str, int]]:
    sentences = [sentence for document in tokenised for sentence in document]
    lengths = np.array([len(sentence) for sentence in sentences], np.int32)
    columns: Columns = {
        "tokens": np.fromiter((i for sentence in sentences for i in sentence), tokenizer.id_dtype, int(lengths.sum())),
        "sentence_lengths": lengths,
        "document_sentences": np.array([len(document) for document in tokenised], np.int32),
    }
    counts = {"documents": len(tokenised), "sentences": len(sentences), "tokens": int(lengths.sum())}
    return columns, counts
