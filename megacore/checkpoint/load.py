"""Make a model and fill it from a checkpoint, at any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import nn

from megacore.checkpoint.manifest import WEIGHT, Manifest
from megacore.models.transformer import Transformer
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared
from megacore.specs import ParamSpec, Region


class Readable(Protocol):
    """What a model can be filled from: a checkpoint, or another program's that is read as one."""

    path: Path
    manifest: Manifest

    def specs(self) -> dict[str, ParamSpec]:
        """Return the declarations of the model, after a check that it is of such a one."""

    def read(self, parameter: str, state: str, region: Region | None = None) -> NDArray[Any]:
        """Return a box of a parameter's state; all of it by default."""


def load_weights(model: nn.Module, reader: Readable) -> None:
    """Set every parameter of a model to the box of the checkpoint that it holds."""
    reader.specs()
    with torch.no_grad():
        for name, parameter in declared(model):
            parameter.copy_(torch.from_numpy(reader.read(name, WEIGHT, parameter.region)))


def load_model(reader: Readable, dtype: torch.dtype, grid: ParallelGrid | None = None) -> Transformer:
    """Return the model of a checkpoint for evaluation: all of it, or this process's tensor-parallel part."""
    config, grid = reader.manifest.model, grid or ParallelGrid()
    model = Transformer(Kit(config, Declare(config, grid.shard, dtype=dtype), grid))
    load_weights(model, reader)
    return model.eval()
