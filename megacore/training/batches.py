"""Batches on the device: where the data pipeline and the model meet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.loader import Batch, InstanceDataset
from megacore.communicator import Alone, Communicator
from megacore.config import ModelConfig
from megacore.errors import ConfigError
from megacore.models.bert import BertInput


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch of tensors: the model's input, its labels, and the samples' global numbers."""

    inputs: BertInput
    masked_labels: torch.Tensor
    next_sentence_labels: torch.Tensor
    sample_index: torch.Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return int(self.inputs.lengths.sum())

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> DeviceBatch:
        """Copy a batch of arrays to a device."""

        def tensor(array: object) -> torch.Tensor:
            return torch.as_tensor(array).to(device, non_blocking=True)

        return cls(
            inputs=BertInput(
                input_ids=tensor(batch.input_ids),
                token_type_ids=tensor(batch.token_type_ids),
                lengths=tensor(batch.lengths),
                masked_positions=tensor(batch.masked_positions),
            ),
            masked_labels=tensor(batch.masked_labels),
            next_sentence_labels=tensor(batch.next_sentence_labels),
            sample_index=tensor(batch.sample_index),
        )


def open_data(path: Path, model: ModelConfig, group: Communicator | None = None) -> InstanceDataset:
    """Open a data set, check that the model can take it, and its checksums, shared with the ranks of ``group``.

    Raises:
        ConfigError: the vocabulary or the sequence length do not fit the model.
        DataError: the data set is missing or damaged.
    """
    group = group or Alone()
    data = InstanceDataset(path)
    data.verify(group.rank, group.size)
    if data.vocab_size != model.vocab_size:
        raise ConfigError(f"vocab_size={model.vocab_size}, but {path} was tokenised with {data.vocab_size} pieces")
    if data.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"max_position_embeddings={model.max_position_embeddings}, but {path} has sequences of "
            f"{data.sequence_length} tokens"
        )
    return data
