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
from megacore.model_config import ModelConfig
from megacore.random import TRUNCATION, standard_normal, stream_key, truncated_normal

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
    gain: tuple[float, ...] = (1.0,)
    """Factor of the initial spread; several for a parameter that stacks several matrices along its first dim."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Global shape."""
        return tuple(dim.size for dim in self.dims)

    @property
    def sharded_dim(self) -> int | None:
        """The dim that tensor-parallel ranks share, if any."""
        return self._find(Sharding.EVEN, Sharding.BALANCED)

    @property
    def expert_dim(self) -> int | None:
        """The dim that expert-parallel ranks share, if any."""
        return self._find(Sharding.EXPERT)

    def _find(self, *kinds: Sharding) -> int | None:
        found = [position for position, dim in enumerate(self.dims) if AXES[dim.axis].sharding in kinds]
        return found[0] if found else None

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

    def local_region(self, shard: Shard) -> Region:
        """Return the box of the global tensor that a rank holds."""
        bounds = [(0, dim.size) for dim in self.dims]
        if self.sharded_dim is not None:
            size = self.dims[self.sharded_dim].size
            bounds[self.sharded_dim] = shard_bounds(size, shard.tensor_rank, shard.tensor_parts)
        if self.expert_dim is not None:
            size = self.dims[self.expert_dim].size
            bounds[self.expert_dim] = shard_bounds(size, shard.expert_rank, shard.expert_parts)
        return tuple(bounds)

    def initial_std(self, config: ModelConfig) -> float:
        """Return the standard deviation of the initial values, before `gain`.

        Sources: xavier: Glorot and Bengio 2010, as in DeepNet (Wang et al. 2022); roformer_v2: the released code
        (techniques: variance 1/(fan-in × layers) after truncation at two standard deviations).
        """
        table = any(dim.role is Role.INDEX for dim in self.dims)
        fans = {
            role: math.prod(d.size for d in self.dims if d.role is role and not AXES[d.axis].stacks) for role in Role
        }
        if config.initialization == "roformer_v2":
            fan = config.hidden_size if table else fans[Role.READ]
            return TRUNCATION / math.sqrt(fan * config.num_hidden_layers)
        if config.initialization == "xavier" and not table:
            return math.sqrt(2.0 / (fans[Role.READ] + fans[Role.WRITE]))
        return config.initializer_range

    def initial_values(self, name: str, seed: int, config: ModelConfig, region: Region) -> NDArray[np.float32]:
        """Draw the initial values of a box; each entry depends on (seed, name, its global index) alone."""
        shape = region_shape(region)
        if self.initial in ("zeros", "ones"):
            return np.full(shape, float(self.initial == "ones"), np.float32)
        draw = truncated_normal if config.initialization == "roformer_v2" else standard_normal
        values: NDArray[np.float64] = draw(stream_key(seed, "initial", name), global_index(self.shape, region))
        gain = np.array(self.gain)
        if len(gain) > 1:
            gain = gain[slice(*region[0])].reshape(-1, *(1,) * (len(shape) - 1))
        return (self.initial_std(config) * gain * values).astype(np.float32)


@dataclass(frozen=True)
class Shard:
    """Which part of the sharded axes a rank holds."""

    tensor_rank: int = 0
    tensor_parts: int = 1
    expert_rank: int = 0
    expert_parts: int = 1


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
        shard: Shard = Shard(),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._config, self._shard = config, shard
        self._device, self._dtype = device, dtype

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
