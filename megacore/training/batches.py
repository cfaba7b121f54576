"""Batches on the device: where the data pipeline and the model meet."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data_pipeline.loader import Batch
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
