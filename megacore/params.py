"""Parameters, declared once.

A layer declares each parameter with its named axes, the role each axis plays, and its initial distribution.
Everything else is derived from that declaration: the local shape under tensor parallelism, the initial values
(drawn by global index, so independent of the layout), the checkpoint's manifest and slices, the growth map with
its moment scaling and learning-rate multiplier, and the weight-decay group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from megacore.axes import AXES, GrowthRule, Sharding, shard_bounds
from megacore.config import ModelConfig
from megacore.random import standard_normal, stream_key

Region = tuple[tuple[int, int], ...]
"""A box in a tensor: [start, stop) for each dim, in global indices."""


class Role(Enum):
    """What a parameter does along an axis; this decides how the parameter changes when the axis is copied."""

    WRITE = "write"
    """Makes the values along this axis (output rows, biases, gains, table columns): a copy repeats its source."""
    READ = "read"
    """Contracts over this axis (input columns): the copies share the source's value, so that their sum is kept."""
    INDEX = "index"
    """Is looked up by this axis (table rows)."""


@dataclass(frozen=True)
class Dim:
    """One dim of a declared parameter."""

    axis: str
    role: Role
    size: int


Initial = Literal["normal", "zeros", "ones"]


@dataclass(frozen=True)
class ParamSpec:
    """The declaration of one parameter, with global sizes."""

    dims: tuple[Dim, ...]
    initial: Initial

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape."""
        return tuple(dim.size for dim in self.dims)

    @property
    def sharded_dim(self) -> int | None:
        """The dim that tensor-parallel ranks share, if any."""
        for position, dim in enumerate(self.dims):
            if AXES[dim.axis].sharding is not Sharding.REPLICATED:
                return position
        return None

    @property
    def is_matrix(self) -> bool:
        """Matrices and tables are decayed and drawn at random; gains and biases are neither."""
        return self.initial == "normal"

    @property
    def noisy_dim(self) -> int | None:
        """The dim along which growth may add kernel noise: the stream axis that a matrix contracts over."""
        for position, dim in enumerate(self.dims):
            if self.is_matrix and dim.role is Role.READ and AXES[dim.axis].growth is GrowthRule.STREAM:
                return position
        return None

    def local_region(self, rank: int, parts: int) -> Region:
        """Return the box of the global tensor that tensor-parallel rank ``rank`` of ``parts`` holds."""
        return tuple(
            shard_bounds(dim.size, rank, parts) if position == self.sharded_dim else (0, dim.size)
            for position, dim in enumerate(self.dims)
        )

    def initial_values(self, name: str, seed: int, std: float, region: Region) -> NDArray[np.float32]:
        """Draw the initial values of a box; each entry depends on (seed, name, its global index) alone."""
        shape = region_shape(region)
        if self.initial == "zeros":
            return np.zeros(shape, np.float32)
        if self.initial == "ones":
            return np.ones(shape, np.float32)
        key = stream_key(seed, "initial", name)
        values: NDArray[np.float64] = standard_normal(key, global_index(self.shape, region))
        return (std * values).astype(np.float32)


def region_shape(region: Region) -> tuple[int, ...]:
    """Return the shape of a box."""
    return tuple(stop - start for start, stop in region)


def global_index(shape: tuple[int, ...], region: Region) -> NDArray[np.int64]:
    """Return the flat index in a tensor of ``shape`` of each entry of a box, in the box's shape."""
    index = np.zeros((1,) * len(shape), np.int64)
    for position, (start, stop) in enumerate(region):
        stride = math.prod(shape[position + 1 :])
        view = [1] * len(shape)
        view[position] = stop - start
        index = index + (np.arange(start, stop, dtype=np.int64) * stride).reshape(view)
    return index


class Parameter(nn.Parameter):
    """A torch parameter that knows its declaration and which box of the global tensor it holds."""

    spec: ParamSpec
    region: Region
    tensor_model_parallel: bool  # DeepSpeed reads this: gradients of replicated parameters are counted once

    def __deepcopy__(self, memo: dict[int, Any]) -> Parameter:
        copied: Parameter = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        copied.spec, copied.region = self.spec, self.region
        copied.tensor_model_parallel = self.tensor_model_parallel
        return copied


class Declare:
    """Makes a model's parameters: local tensors of declared global ones.

    Args:
        config: gives each axis its size.
        tensor_parallel_rank: which part of the sharded axes this process holds.
        tensor_parallel_size: number of parts.
        device: ``"meta"`` for a model that is only looked at.
        dtype: of the local tensors.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensor_parallel_rank: int = 0,
        tensor_parallel_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._config = config
        self._rank, self._parts = tensor_parallel_rank, tensor_parallel_size
        self._device, self._dtype = device, dtype

    def __call__(self, *axes: tuple[str, Role], initial: Initial) -> Parameter:
        """Declare a parameter with these axes; its values are unset until `initialise` or a checkpoint sets them."""
        dims = tuple(Dim(axis, role, self._config.axis_size(axis)) for axis, role in axes)
        spec = ParamSpec(dims, initial)
        region = spec.local_region(self._rank, self._parts)
        local = torch.empty(region_shape(region), device=self._device, dtype=self._dtype)
        parameter = Parameter(local)
        parameter.spec, parameter.region = spec, region
        parameter.tensor_model_parallel = spec.sharded_dim is not None and self._parts > 1
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


def declared(model: nn.Module) -> Iterator[tuple[str, Parameter]]:
    """Yield a model's parameters by name, in the order of declaration; every one of them is declared."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, Parameter):
            raise TypeError(f"{name} is a bare nn.Parameter: declare it with its axes")
        yield name, parameter


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Set every parameter to its initial value."""
    with torch.no_grad():
        for name, parameter in declared(model):
            values = parameter.spec.initial_values(name, seed, config.initializer_range, parameter.region)
            parameter.copy_(torch.from_numpy(values))
