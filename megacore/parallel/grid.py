"""The grid of processes: tensor-parallel ranks innermost, then Ulysses ranks, then replicas, then pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megacore.config import ParallelConfig
from megacore.specs import Shard


@dataclass(frozen=True)
class ParallelGrid:
    """This process's place in the grid, and the groups it belongs to.

    With one process, no group exists and ``torch.distributed`` need not be initialised.
    """

    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    sequence_parallel: bool = False
    ulysses_parallel_rank: int = 0
    ulysses_parallel_size: int = 1
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    pipeline_parallel_rank: int = 0
    pipeline_parallel_size: int = 1
    expert_parallel_rank: int = 0
    expert_parallel_size: int = 1
    tensor_parallel_group: dist.ProcessGroup | None = None
    ulysses_parallel_group: dist.ProcessGroup | None = None
    gradient_group: dist.ProcessGroup | None = None
    """The ranks that hold the same parameters and see other tokens: all replicas and their Ulysses ranks."""
    pipeline_parallel_group: dist.ProcessGroup | None = None

    @classmethod
    def create(cls, parallel: ParallelConfig) -> ParallelGrid:
        """Cut the initialised world into groups; every process must call this, in the same order.

        Raises:
            ConfigError: the world size is not a multiple of the model-parallel sizes.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        data = parallel.data_parallel_size(world)
        sizes = (parallel.pipeline_parallel_size, data, parallel.ulysses_parallel_size, parallel.tensor_parallel_size)
        places = [_place(number, sizes) for number in range(world)]
        stage, replica, ulysses, tensor = places[rank]
        return cls(
            tensor_parallel_rank=tensor,
            tensor_parallel_size=parallel.tensor_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            ulysses_parallel_rank=ulysses,
            ulysses_parallel_size=parallel.ulysses_parallel_size,
            data_parallel_rank=replica,
            data_parallel_size=data,
            pipeline_parallel_rank=stage,
            pipeline_parallel_size=parallel.pipeline_parallel_size,
            expert_parallel_rank=replica % parallel.expert_parallel_size,
            expert_parallel_size=parallel.expert_parallel_size,
            tensor_parallel_group=_own_group(places, rank, (3,)),
            ulysses_parallel_group=_own_group(places, rank, (2,)),
            gradient_group=_own_group(places, rank, (1, 2)),
            pipeline_parallel_group=_own_group(places, rank, (0,)),
        )

    @property
    def gradient_size(self) -> int:
        """Size of `gradient_group`."""
        return self.data_parallel_size * self.ulysses_parallel_size

    @property
    def expert_group_name(self) -> str:
        """DeepSpeed's name of the groups of ranks that share, or that repeat, the experts."""
        return f"ep_size_{self.expert_parallel_size}"

    @property
    def shard(self) -> Shard:
        """Which part of the sharded axes this process holds."""
        return Shard(
            self.tensor_parallel_rank, self.tensor_parallel_size, self.expert_parallel_rank, self.expert_parallel_size
        )

    @property
    def stream_part(self) -> tuple[int, int]:
        """(rank, parts): which part of a micro-batch's tokens this process's residual stream holds."""
        if self.sequence_parallel:
            return self.tensor_parallel_rank, self.tensor_parallel_size
        return self.ulysses_parallel_rank, self.ulysses_parallel_size

    @property
    def inner_part(self) -> tuple[int, int]:
        """The same inside attention and feed-forward networks, where sequence parallelism gathers the tokens."""
        return self.ulysses_parallel_rank, self.ulysses_parallel_size


def _place(rank: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        place.append(rank % size)
        rank //= size
    return tuple(reversed(place))


def _own_group(places: list[tuple[int, ...]], rank: int, along: tuple[int, ...]) -> dist.ProcessGroup:
    """Create, on all ranks (torch requires it), the groups of places that differ along some dims only.

    Returns:
        The group that ``rank`` is in.
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for number, place in enumerate(places):
        members.setdefault(tuple(p for dim, p in enumerate(place) if dim not in along), []).append(number)
    own: dist.ProcessGroup | None = None
    for ranks in members.values():
        group = dist.new_group(ranks)
        if rank in ranks:
            own = group
    assert own is not None  # the groups partition the world
    return own


class DeepSpeedGrid:
    """A `ParallelGrid` in the words DeepSpeed expects of an ``mpu`` object.

    To DeepSpeed, Ulysses ranks are further replicas: they hold the same parameters and see other tokens.
    """

    def __init__(self, grid: ParallelGrid) -> None:
        self._grid = grid

    def get_model_parallel_rank(self) -> int:
        """Rank among the processes that share one replica."""
        return self._grid.tensor_parallel_rank

    def get_model_parallel_world_size(self) -> int:
        """Number of processes that share one replica."""
        return self._grid.tensor_parallel_size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Group of the processes that share one replica."""
        return self._grid.tensor_parallel_group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        """Rank among the processes that hold the same parameters."""
        return self._grid.data_parallel_rank * self._grid.ulysses_parallel_size + self._grid.ulysses_parallel_rank

    def get_data_parallel_world_size(self) -> int:
        """Number of processes that hold the same parameters."""
        return self._grid.gradient_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Group of the processes that hold the same part of every replica."""
        return self._grid.gradient_group
