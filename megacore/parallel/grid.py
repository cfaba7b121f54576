"""The grid of processes: tensor-parallel ranks innermost, then data-parallel replicas."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megacore.config import ParallelConfig


@dataclass(frozen=True)
class ParallelGrid:
    """This process's place in the grid, and the groups it belongs to.

    With one process, no group exists and ``torch.distributed`` need not be initialised.
    """

    tensor_parallel_rank: int = 0
    tensor_parallel_size: int = 1
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    tensor_parallel_group: dist.ProcessGroup | None = None
    data_parallel_group: dist.ProcessGroup | None = None

    @classmethod
    def create(cls, parallel: ParallelConfig) -> ParallelGrid:
        """Cut the initialised world into groups; every process must call this, in the same order.

        Raises:
            ConfigError: the world size is not a multiple of the model-parallel sizes.
        """
        world, rank = dist.get_world_size(), dist.get_rank()
        tensor, data = parallel.tensor_parallel_size, parallel.data_parallel_size(world)
        tensor_groups = [[d * tensor + t for t in range(tensor)] for d in range(data)]
        data_groups = [[d * tensor + t for d in range(data)] for t in range(tensor)]
        return cls(
            tensor_parallel_rank=rank % tensor,
            tensor_parallel_size=tensor,
            data_parallel_rank=rank // tensor,
            data_parallel_size=data,
            tensor_parallel_group=_own_group(tensor_groups, rank),
            data_parallel_group=_own_group(data_groups, rank),
        )


def _own_group(groups: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Create all groups on all ranks (torch requires it) and return the one that ``rank`` is in."""
    own: dist.ProcessGroup | None = None
    for ranks in groups:
        group = dist.new_group(ranks)
        if rank in ranks:
            own = group
    assert own is not None  # the groups partition the world
    return own


class DeepSpeedGrid:
    """A `ParallelGrid` in the words DeepSpeed expects of an ``mpu`` object."""

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
        """Rank among the replicas."""
        return self._grid.data_parallel_rank

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas."""
        return self._grid.data_parallel_size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Group of the processes that hold the same part of every replica."""
        return self._grid.data_parallel_group
