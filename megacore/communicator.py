"""A group of cooperating processes, whoever started them: MPI ranks, torch ranks, or one process alone.

Work that can fail on one rank runs inside `together`, so that a failure is everybody's failure, at once,
with the first failing rank's message, and no rank is left waiting.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from megacore.errors import ConfigError, MegacoreError


class Communicator(Protocol):
    """What cooperative code needs of its group: a rank, a size and one exchange of small Python objects."""

    rank: int
    size: int

    def all_gather(self, item: Any) -> list[Any]:
        """Return every rank's ``item``, ordered by rank; also serves as a barrier."""


class Alone:
    """The group of one process."""

    rank = 0
    size = 1

    def all_gather(self, item: Any) -> list[Any]:
        """Return ``[item]``."""
        return [item]


class MPIRanks:
    """The ranks that ``mpirun`` (or ``srun`` with PMIx) started."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()

    def all_gather(self, item: Any) -> list[Any]:
        """Exchange pickled objects between the ranks of this job only."""
        gathered: list[Any] = self._comm.allgather(item)
        return gathered


class TorchRanks:
    """The ranks of an initialised ``torch.distributed`` world.

    Args:
        apart: exchange over a group of their own, so that a thread can do so beside the training; all ranks must
            make it at the same time.
    """

    def __init__(self, apart: bool = False) -> None:
        import torch.distributed as dist  # here, so that MPI jobs without torch start quickly

        self._dist = dist
        self._group = dist.new_group(backend="gloo") if apart else None
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def all_gather(self, item: Any) -> list[Any]:
        """Exchange pickled objects between the ranks of this job only."""
        gathered: list[Any] = [None] * self.size
        self._dist.all_gather_object(gathered, item, group=self._group)
        return gathered


def launched_by_mpi() -> bool:
    """Tell whether an MPI launcher started this process as one of several ranks."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ or "PMI_SIZE" in os.environ or "PMIX_RANK" in os.environ


def mpi_or_alone() -> Communicator:
    """Return the MPI world when a launcher made one, else this process alone.

    Raises:
        ConfigError: a launcher started several tasks that MPI does not connect; each would do the whole work.
    """
    group: Communicator = MPIRanks() if launched_by_mpi() else Alone()
    if group.size != started_tasks() and group.size == 1:
        raise ConfigError(
            f"{started_tasks()} tasks were started, but MPI does not connect them; start them with this environment's "
            "mpirun, or with srun --mpi=pmix"
        )
    return group


def started_tasks() -> int:
    """Return how many tasks a launcher says it started together with this one."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
    return max(int(os.environ.get(name, "1")) for name in names)


@contextmanager
def together(group: Communicator) -> Iterator[None]:
    """Run a block on all ranks; if it raises on any of them, raise on all.

    The block itself must not communicate (a rank that failed would be missed there).

    Raises:
        MegacoreError: on every rank, the first failing rank's error, marked as ``agreed``. A failing rank's own
            exception is raised there as it is, if it is no `MegacoreError` (a bug: its traceback is wanted).
    """
    failure: BaseException | None = None
    try:
        yield
    except Exception as error:
        failure = error
    description = None if failure is None else (type(failure), str(failure) or type(failure).__name__)
    failures = group.all_gather(description)
    for rank, other in enumerate(failures):
        if other is not None:
            kind, message = other
            if not issubclass(kind, MegacoreError):
                if failure is not None and failures[group.rank] == other:
                    raise failure
                kind, message = MegacoreError, f"rank {rank} failed: {kind.__name__}: {message}"
            agreed = kind(message)
            agreed.agreed = True
            raise agreed from failure
