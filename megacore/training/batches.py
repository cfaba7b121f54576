"""Batches on the device: where the data pipeline and the model meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from data_pipeline.loader import Batch, InstanceDataset, check_objective
from megacore.communicator import Alone, Communicator
from megacore.errors import ConfigError
from megacore.model_config import ModelConfig
from megacore.models.batch import ModelBatch


def model_batch(batch: Batch, device: torch.device, parts: int = 1) -> ModelBatch:
    """Copy a batch of arrays to a device, filled so that ``parts`` ranks can share its tokens evenly."""

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        return torch.as_tensor(array)

    def optional(array: NDArray[Any] | None) -> torch.Tensor | None:
        return None if array is None else tensor(array)

    made = ModelBatch(
        tokens=tensor(batch.tokens),
        sequences=tensor(batch.sequences),
        label_positions=tensor(batch.label_positions),
        labels=tensor(batch.labels),
        pair_labels=optional(batch.next_sentence_labels),
        target_tokens=optional(batch.target_tokens),
        target_sequences=optional(batch.target_sequences),
    )
    return made.filled(parts).to(device)


def open_data(path: Path, model: ModelConfig, group: Communicator | None = None) -> InstanceDataset:
    """Open a data set, check that the model can take it, and its checksums, shared with the ranks of ``group``.

    Raises:
        ConfigError: the vocabulary, the sequence length or the objective do not fit the model.
        DataError: the data set is missing or damaged.
    """
    group = group or Alone()
    data = fitting_data(path, model)
    data.verify(group.rank, group.size)
    return data


def fitting_data(path: Path, model: ModelConfig) -> InstanceDataset:
    """Open a data set and check that the model can take it; its values are not read.

    Raises:
        ConfigError: the vocabulary, the sequence length or the objective do not fit the model.
        DataError: there is no such data set, or its files are not as long as they should be.
    """
    data = InstanceDataset(path)
    check_objective(data, model.objective)
    if data.vocab_size != model.vocab_size:
        raise ConfigError(f"vocab_size={model.vocab_size}, but {path} was tokenised with {data.vocab_size} pieces")
    if data.sequence_length > model.max_position_embeddings:
        raise ConfigError(
            f"max_position_embeddings={model.max_position_embeddings}, but {path} has sequences of "
            f"{data.sequence_length} tokens"
        )
    return data
