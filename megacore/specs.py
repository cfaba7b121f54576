"""Named tensors: the geometry that follows from a parameter's declared axes, and its initial values; plain numbers.

Nothing here needs torch, so that commands that only move checkpoints start at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from megacore.axes import AXES, GrowthRule, Sharding, shard_bounds
from megacore.model_config import ModelConfig
from megacore.random import TRUNCATION, standard_normal, stream_key, truncated_normal

Region = tuple[tuple[int, int], ...]
"""A box in a tensor: [start, stop) for each dim, in global indices."""


class Role(Enum):
    """What a parameter does along an axis; this decides how the parameter changes when the axis is copied."""

    WRITE = "write"
    """Makes the values along this axis (output rows, biases, table columns): a copy repeats its source."""
    READ = "read"
    """Contracts over this axis (input columns): the copies share the source's value, so that their sum is kept."""
    INDEX = "index"
    """Is looked up by this axis (table rows)."""
    SCALE = "scale"
    """Multiplies the values along this axis (a norm's gain)."""
    SHIFT = "shift"
    """Is added to normalised values along this axis (a norm's bias)."""
    SCALE_READ = "scale_read"
    """Multiplies values that a table then contracts with which is also written (a norm before tied embeddings)."""
    SHIFT_READ = "shift_read"
    """Is added to such values."""


@dataclass(frozen=True)
class Dim:
    """One dim of a declared parameter."""

    axis: str
    role: Role
    size: int


Initial = Literal["normal", "zeros", "ones"]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor with named axes, and global sizes."""

    dims: tuple[Dim, ...]

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


@dataclass(frozen=True)
class ParamSpec(TensorSpec):
    """The declaration of one parameter, with global sizes."""

    initial: Initial
    gain: tuple[float, ...] = (1.0,)
    """Factor of the initial spread; several for a parameter that stacks several matrices along its first dim."""

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


WHOLE = Shard()
"""Everything."""


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
