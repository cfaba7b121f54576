"""Packed batches of pretraining instances: which ones is a function of the global sample counter alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipeline.sampler import sample_order
from data_pipeline.shards import read_dataset
from data_pipeline.tokenizer import PAD
from megacore.errors import ConfigError, DataError

Objective = Literal["mlm_nsp", "mlm", "causal_lm", "prefix_lm", "span_corruption"]
"""What a model is trained for; `OBJECTIVES` says with which data."""
OBJECTIVES: dict[str, tuple[Objective, ...]] = {
    "mlm_nsp": ("mlm_nsp", "mlm"),
    "lm": ("causal_lm", "prefix_lm"),
    "span_corruption": ("span_corruption",),
}
"""The objective that a data set was built for -> what it can be read for; the first is the default."""
_OFFSETS = {
    "input_ids": "offsets",
    "masked_positions": "masked_offsets",
    "masked_labels": "masked_offsets",
    "target_ids": "target_offsets",
}
"""Flat columns, and the columns that say where an instance begins and ends in them."""

Instance = dict[str, Any]
"""One instance: its part of each flat column (an array), and its value in each other column (an int)."""


class InstanceDataset:
    """The instances of one directory, by number.

    Raises:
        DataError: there is no such data set, it is empty, it is damaged, or its objective is unknown.
    """

    def __init__(self, path: Path) -> None:
        dataset = read_dataset(path, "instances")
        self.path = path
        self.verify = dataset.verify
        # As plain arrays: a slice of a np.memmap costs several times as much.
        self._shards = [
            {key: np.asarray(column) for key, column in dataset.columns(name).items()}
            for name in dataset.manifest.shards
        ]
        self._first = np.cumsum([0, *(len(shard["offsets"]) - 1 for shard in self._shards)])
        if not len(self):
            raise DataError(f"{path} has no instances")
        about = dataset.manifest.about
        self.vocab_size: int = about["vocab_size"]
        self.sequence_length: int = about["sequence_length"]
        self.objective: str = about.get("objective", "mlm_nsp")
        if self.objective not in OBJECTIVES:
            raise DataError(f"{path}: unknown objective={self.objective}; known: {', '.join(OBJECTIVES)}")
        self.digest: str = dataset.manifest.digest

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def num_tokens(self) -> int:
        """Tokens of all instances, targets included: what one epoch counts."""
        flat = ("input_ids", "target_ids")
        return sum(len(shard[name]) for shard in self._shards for name in flat if name in shard)

    def __getitem__(self, number: int) -> Instance:
        shard_number = int(np.searchsorted(self._first, number, side="right")) - 1
        shard, local = self._shards[shard_number], number - int(self._first[shard_number])
        bounds = {name: slice(*shard[name][local : local + 2]) for name in {*_OFFSETS.values()} & shard.keys()}
        return {
            name: column[bounds[_OFFSETS[name]]] if name in _OFFSETS else int(column[local])
            for name, column in shard.items()
            if name not in bounds
        }


def check_objective(dataset: InstanceDataset, objective: Objective) -> None:
    """Refuse data that was built for something else.

    Raises:
        ConfigError: naming both objectives, and what to build.
    """
    readable = OBJECTIVES[dataset.objective]
    if objective not in readable:
        wanted = next(built for built, served in OBJECTIVES.items() if objective in served)
        raise ConfigError(
            f"objective={objective}: {dataset.path} was built with objective={dataset.objective}, for "
            f"{' and '.join(readable)}; build other instances with 'megacore data instances ... objective={wanted}'"
        )


@dataclass(frozen=True)
class Batch:
    """A micro-batch without padding: its sequences are laid end to end.

    Args:
        tokens: [3, total] int64: token id, segment (token type), position within the sequence.
        sequences: [3, n] int64: length, prefix length (tokens that every token of the sequence may attend to in a
            prefix LM; 0 where there is none), number of the sample in the endless global order.
        label_positions: [m] int64, where the token head is applied: indices into total of the stream that the loss
            reads (the target stream where there is one, else ``tokens``).
        labels: [m] int64, token ids to predict there.
        next_sentence_labels: [n] int64, or None where the objective has no sentence pairs.
        target_tokens: [3, total] int64, like ``tokens``, of the decoder; None without one.
        target_sequences: [3, n] int64, like ``sequences``, of the decoder (no prefix, the same samples).
    """

    tokens: NDArray[np.int64]
    sequences: NDArray[np.int64]
    label_positions: NDArray[np.int64]
    labels: NDArray[np.int64]
    next_sentence_labels: NDArray[np.int64] | None = None
    target_tokens: NDArray[np.int64] | None = None
    target_sequences: NDArray[np.int64] | None = None


def collate(instances: list[Instance], samples: NDArray[np.int64], objective: Objective) -> Batch:
    """Lay instances end to end; ``samples`` [n] are their numbers in the global order."""
    if objective in ("mlm_nsp", "mlm"):
        return _masked(instances, samples, with_pairs=objective == "mlm_nsp")
    if objective == "span_corruption":
        return _encoder_decoder(instances, samples)
    return _language_model(instances, samples, with_prefix=objective == "prefix_lm")


def _masked(instances: list[Instance], samples: NDArray[np.int64], with_pairs: bool) -> Batch:
    ids, lengths = _joined(instances, "input_ids")
    places, counts = _joined(instances, "masked_positions")
    tokens = _tokens(ids, lengths)
    tokens[1] = tokens[2] >= np.repeat(_numbers(instances, "segment_b_start"), lengths)
    return Batch(
        tokens,
        _sequences(lengths, samples),
        places + np.repeat(_starts(lengths), counts),
        _joined(instances, "masked_labels")[0],
        _numbers(instances, "next_sentence_label") if with_pairs else None,
    )


def _language_model(instances: list[Instance], samples: NDArray[np.int64], with_prefix: bool) -> Batch:
    ids, lengths = _joined(instances, "input_ids")
    tokens, sequences = _tokens(ids, lengths), _sequences(lengths, samples)
    if with_prefix:
        sequences[1] = _numbers(instances, "prefix_length")
    # A token is predicted at the place before it; those of the prefix are given.
    first, stop = np.repeat([np.maximum(sequences[1] - 1, 0), lengths - 1], lengths, axis=1)
    places = np.flatnonzero((tokens[2] >= first) & (tokens[2] < stop))
    return Batch(tokens, sequences, places, ids[places + 1])


def _encoder_decoder(instances: list[Instance], samples: NDArray[np.int64]) -> Batch:
    ids, lengths = _joined(instances, "input_ids")
    labels, target_lengths = _joined(instances, "target_ids")
    # The decoder reads [PAD], then what it was to write so far.
    decoder_ids = np.roll(labels, 1)
    decoder_ids[_starts(target_lengths)] = PAD
    return Batch(
        _tokens(ids, lengths),
        _sequences(lengths, samples),
        np.arange(len(labels)),
        labels,
        target_tokens=_tokens(decoder_ids, target_lengths),
        target_sequences=_sequences(target_lengths, samples),
    )


def _joined(instances: list[Instance], name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return a flat column of the instances [total], and how much of it each has [n]."""
    parts = [instance[name] for instance in instances]
    return np.concatenate(parts, dtype=np.int64), np.array([len(part) for part in parts], np.int64)


def _numbers(instances: list[Instance], name: str) -> NDArray[np.int64]:
    """Return a column with one number for each instance [n]."""
    return np.array([instance[name] for instance in instances], np.int64)


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each sequence begins [n]."""
    starts: NDArray[np.int64] = np.cumsum(lengths) - lengths
    return starts


def _tokens(ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return ids, segment 0 and positions [3, total]."""
    return np.stack([ids, np.zeros_like(ids), np.arange(len(ids)) - np.repeat(_starts(lengths), lengths)])


def _sequences(lengths: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return lengths, no prefixes, and samples [3, n]."""
    return np.stack([lengths, np.zeros_like(lengths), samples])


class PretrainingBatches:
    """One replica's part of every global batch.

    Sample k of a global batch belongs to replica k // (global / replicas), in order of its micro-batches.

    Args:
        dataset: the instances.
        seed: of the order.
        global_batch_size: samples of a step over all replicas.
        micro_batch_size: samples of a micro-batch.
        data_parallel_rank: this replica.
        data_parallel_size: number of replicas.
        objective: what to read the instances for; by default what they were built for (``lm``: causal LM).

    Raises:
        ConfigError: the instances were built for something else than ``objective``.
    """

    def __init__(
        self,
        dataset: InstanceDataset,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        objective: Objective | None = None,
    ) -> None:
        self._objective: Objective = objective or OBJECTIVES[dataset.objective][0]
        check_objective(dataset, self._objective)
        self._dataset, self._seed = dataset, seed
        self._micro, self._share = micro_batch_size, global_batch_size // data_parallel_size
        self._rank, self._replicas = data_parallel_rank, data_parallel_size

    def step_batches(self, consumed_samples: int) -> list[Batch]:
        """Return this replica's micro-batches of the global batch that begins at a place of the order."""
        first = consumed_samples + self._rank * self._share
        counter = np.arange(first, first + self._share, dtype=np.int64)
        return self._collated(sample_order(counter, len(self._dataset), self._seed), counter)

    def evaluation_batches(self, max_samples: int) -> list[Batch]:
        """Return this replica's part of the first ``max_samples`` instances, in their stored order.

        Every replica has as many batches, since replicas that share weights or experts work together: where instances
        are lacking, a batch without labels.
        """
        every = np.arange(min(max_samples, len(self._dataset)), dtype=np.int64)
        chosen = every[self._rank :: self._replicas]
        batches = self._collated(chosen, chosen)
        most = -(-len(every[:: self._replicas]) // self._micro)
        return batches + [self._blank()] * (most - len(batches))

    def _blank(self) -> Batch:
        """Return a batch that counts nothing: a sequence of sample -1, and no labels."""
        batch = collate([self._dataset[0]], np.array([-1], np.int64), self._objective)
        pairs = None if batch.next_sentence_labels is None else batch.next_sentence_labels[:0]
        return replace(
            batch, label_positions=batch.label_positions[:0], labels=batch.labels[:0], next_sentence_labels=pairs
        )

    def _collated(self, chosen: NDArray[np.int64], counter: NDArray[np.int64]) -> list[Batch]:
        return [
            collate(
                [self._dataset[int(number)] for number in chosen[start : start + self._micro]],
                counter[start : start + self._micro],
                self._objective,
            )
            for start in range(0, len(chosen), self._micro)
        ]
