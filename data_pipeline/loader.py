"""Batches of pretraining instances: which ones is a function of the global sample counter alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.sampler import sample_order
from data_pipeline.shards import read_dataset
from data_pipeline.tokenizer import PAD
from megacore.errors import DataError

_MULTIPLE = 8
"""Sequences are padded to a multiple of this."""


class Instance(NamedTuple):
    """One pretraining instance, unpadded."""

    input_ids: NDArray[Any]
    segment_b_start: int
    next_sentence_label: int
    masked_positions: NDArray[Any]
    masked_labels: NDArray[Any]


class InstanceDataset:
    """The instances of one directory, by number.

    Raises:
        DataError: there is no such data set, it is empty, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        dataset = read_dataset(path, "instances")
        self.verify = dataset.verify
        self._shards = [dataset.columns(name) for name in dataset.manifest.shards]
        self._first = np.cumsum([0, *(len(shard["next_sentence_label"]) for shard in self._shards)])
        if not len(self):
            raise DataError(f"{path} has no instances")
        self.vocab_size: int = dataset.manifest.about["vocab_size"]
        self.sequence_length: int = dataset.manifest.about["sequence_length"]
        self.digest: str = dataset.manifest.digest

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> Instance:
        shard_number = int(np.searchsorted(self._first, number, side="right")) - 1
        shard, local = self._shards[shard_number], number - int(self._first[shard_number])
        tokens = slice(*shard["offsets"][local : local + 2])
        masked = slice(*shard["masked_offsets"][local : local + 2])
        return Instance(
            shard["input_ids"][tokens],
            int(shard["segment_b_start"][local]),
            int(shard["next_sentence_label"][local]),
            shard["masked_positions"][masked],
            shard["masked_labels"][masked],
        )


@dataclass(frozen=True)
class Batch:
    """A micro-batch.

    Args:
        input_ids: [batch, seq] int64, padded with [PAD].
        token_type_ids: [batch, seq] int64.
        lengths: [batch] int64, without padding.
        masked_positions: [masked] int64, indices into batch × seq.
        masked_labels: [masked] int64.
        next_sentence_labels: [batch] int64.
        sample_index: [batch] int64, the place of each sample in the endless global order.
    """

    input_ids: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    masked_positions: NDArray[np.int64]
    masked_labels: NDArray[np.int64]
    next_sentence_labels: NDArray[np.int64]
    sample_index: NDArray[np.int64]


def collate(instances: list[Instance], sample_index: NDArray[np.int64], sequence_length: int) -> Batch:
    """Pad instances to the longest of them (rounded up, at most ``sequence_length``)."""
    lengths = np.array([len(instance.input_ids) for instance in instances], np.int64)
    seq = min(-(-int(lengths.max()) // _MULTIPLE) * _MULTIPLE, sequence_length)
    input_ids = np.full((len(instances), seq), PAD, np.int64)
    token_type_ids = np.zeros((len(instances), seq), np.int64)
    for row, instance in enumerate(instances):
        input_ids[row, : lengths[row]] = instance.input_ids
        token_type_ids[row, instance.segment_b_start : lengths[row]] = 1
    return Batch(
        input_ids,
        token_type_ids,
        lengths,
        np.concatenate([row * seq + i.masked_positions.astype(np.int64) for row, i in enumerate(instances)]),
        np.concatenate([instance.masked_labels.astype(np.int64) for instance in instances]),
        np.array([instance.next_sentence_label for instance in instances], np.int64),
        sample_index,
    )


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
    """

    def __init__(
        self,
        dataset: InstanceDataset,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
    ) -> None:
        self._dataset, self._seed = dataset, seed
        self._micro, self._share = micro_batch_size, global_batch_size // data_parallel_size
        self._rank, self._replicas = data_parallel_rank, data_parallel_size

    def step_batches(self, consumed_samples: int) -> list[Batch]:
        """Return this replica's micro-batches of the global batch that begins at a place of the order."""
        first = consumed_samples + self._rank * self._share
        counter = np.arange(first, first + self._share, dtype=np.int64)
        return self._collated(sample_order(counter, len(self._dataset), self._seed), counter)

    def evaluation_batches(self, max_samples: int) -> list[Batch]:
        """Return this replica's part of the first ``max_samples`` instances, in their stored order."""
        chosen = np.arange(min(max_samples, len(self._dataset)), dtype=np.int64)[self._rank :: self._replicas]
        return self._collated(chosen, chosen)

    def _collated(self, chosen: NDArray[np.int64], counter: NDArray[np.int64]) -> list[Batch]:
        return [
            collate(
                [self._dataset[int(number)] for number in chosen[start : start + self._micro]],
                counter[start : start + self._micro],
                self._dataset.sequence_length,
            )
            for start in range(0, len(chosen), self._micro)
        ]
