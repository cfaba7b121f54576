"""Make a model and fill it from a checkpoint, at any layout."""

from __future__ import annotations

import torch
from torch import nn

from megacore.checkpoint.manifest import WEIGHT
from megacore.checkpoint.reader import CheckpointReader
from megacore.models.transformer import Transformer
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared


def load_weights(model: nn.Module, reader: CheckpointReader) -> None:
    """Set every parameter of a model to the box of the checkpoint that it holds."""
    reader.specs()
    with torch.no_grad():
        for name, parameter in declared(model):
            parameter.copy_(torch.from_numpy(reader.read(name, WEIGHT, parameter.region)))


def load_model(reader: CheckpointReader, dtype: torch.dtype) -> Transformer:
    """Return the whole model of a checkpoint on this process alone, for evaluation."""
    config = reader.manifest.model
    model = Transformer(Kit(config, Declare(config, dtype=dtype), ParallelGrid()))
    load_weights(model, reader)
    return model.eval()
