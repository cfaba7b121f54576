"""Parameters, declared once.

A layer declares each parameter with its named axes, the role each axis plays, and its initial distribution.
Everything else is derived from that declaration: the local shape under tensor parallelism, the initial values
(drawn by global index, so independent of the layout), the checkpoint's manifest and slices, the growth map with
its moment scaling and learning-rate multiplier, and the weight-decay group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from megacore.model_config import ModelConfig
from megacore.specs import WHOLE, Dim, Initial, ParamSpec, Region, Role, Shard, region_shape


class Parameter(nn.Parameter):
    """A torch parameter that knows its declaration and which box of the global tensor it holds."""

    global_name: str  # of the global parameter, whatever part of the model this process holds
    spec: ParamSpec
    region: Region
    tensor_model_parallel: bool  # DeepSpeed reads this: gradients of replicated parameters are counted once

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        copied: Parameter = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        copied.global_name, copied.spec, copied.region = self.global_name, self.spec, self.region
        copied.tensor_model_parallel = self.tensor_model_parallel
        return copied


class Declare:
    """Makes a model's parameters: local tensors of declared global ones.

    Args:
        config: gives each axis its size.
        shard: which part of the sharded axes this process holds.
        device: ``"meta"`` for a model that is only looked at.
        dtype: of the local tensors.
    """

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard = WHOLE,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._config, self._shard = config, shard
        self._device, self._dtype = device, dtype

    def constant(self, values: NDArray[np.int64]) -> torch.Tensor:
        """Put numbers that are no parameter where the parameters are; integers, so that no cast changes them."""
        return torch.from_numpy(values).to(self._device)

    def __call__(self, *axes: tuple[str, Role], initial: Initial, gain: float | tuple[float, ...] = 1.0) -> Parameter:
        """Declare a parameter with these axes; its values are unset until `initialise` or a checkpoint sets them."""
        dims = tuple(Dim(axis, role, self._config.axis_size(axis)) for axis, role in axes)
        spec = ParamSpec(dims, initial, gain if isinstance(gain, tuple) else (gain,))
        region = spec.local_region(self._shard)
        local = torch.empty(region_shape(region), device=self._device, dtype=self._dtype)
        parameter = Parameter(local)
        parameter.global_name, parameter.spec, parameter.region = "", spec, region
        parameter.tensor_model_parallel = spec.sharded_dim is not None and self._shard.tensor_parts > 1
        return parameter


def write(axis: str) -> tuple[str, Role]:
    """Name an axis that a parameter produces."""
    return axis, Role.WRITE


def read(axis: str) -> tuple[str, Role]:
    """Name an axis that a parameter contracts over."""
    return axis, Role.READ


def index(axis: str) -> tuple[str, Role]:
    """Name an axis by which a table is looked up."""
    return axis, Role.INDEX


PLACEHOLDER = "placeholder_"
"""Begins the name of a number that only fills a place in the optimizer: no parameter of the model."""


def name_parameters(module: nn.Module, prefix: str) -> None:
    """Give a layer's parameters their global names; one that another layer has named already keeps its name."""
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, Parameter):
            raise TypeError(f"{prefix}.{name} is a bare nn.Parameter: declare it with its axes")
        parameter.global_name = parameter.global_name or f"{prefix}.{name}"


def declared(model: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """Yield a model's parameters by global name, in the order of declaration, each once."""
    for name, parameter in model.named_parameters():
        if name.startswith(PLACEHOLDER):
            continue
        if not isinstance(parameter, Parameter):
            raise TypeError(f"{name} is a bare nn.Parameter: declare it with its axes")
        yield parameter.global_name, parameter


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter to its initial value, but for those that ZeRO 3 has taken apart already."""
    with torch.no_grad():
        for name, parameter in declared(model):
            if parameter.shape != region_shape(parameter.region):
                continue
            values = parameter.spec.initial_values(name, seed, config, parameter.region)
            parameter.copy_(torch.from_numpy(values))
