"""Execute a growth plan: stream a source checkpoint into a grown one, file by file, in parallel over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megacore.checkpoint.manifest import WEIGHT, Annealing, FileRecord, Layout, Manifest, parameter_records
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import FileToWrite, PieceToWrite, write_checkpoint
from megacore.communicator import Communicator, together
from megacore.config import ParallelConfig
from megacore.growth.apply import grow_box
from megacore.growth.plan import GrowthPlan
from megacore.params import Region, Shard, region_shape

_BLOCK_ENTRIES = 1 << 21
"""Entries of a tensor that are computed at once: bounds the memory, 16 MiB in float64."""


@dataclass(frozen=True)
class GrowthOutput:
    """How the grown checkpoint is written.

    Args:
        parallel: its layout; each tensor-parallel rank will find its own files.
        keep_optimizer: map Adam's moments too; otherwise only weights are written.
        dtype: of all tensors, or ``None`` for the source's.
        hold_steps: training steps during which the learning-rate multipliers hold.
        anneal_steps: steps over which they then go to one.
        max_file_bytes: a tensor-parallel rank's tensors are spread over files of about this size.
    """

    parallel: ParallelConfig
    keep_optimizer: bool = True
    dtype: str | None = None
    hold_steps: int = 500
    anneal_steps: int = 500
    max_file_bytes: int = 1 << 30


def grow_checkpoint(
    reader: CheckpointReader,
    plan: GrowthPlan,
    path: Path,
    output: GrowthOutput,
    group: Communicator,
    on_progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write the grown checkpoint; every rank of ``group`` calls this and writes its share of the files.

    What is written depends on the plan and the layout only, never on the number of ranks.

    Args:
        reader: the source.
        plan: made from the source's configuration.
        path: the directory to write; must not exist.
        output: layout and options.
        group: the ranks that work together.
        on_progress: called with the number of bytes of each block this rank has written.

    Raises:
        ConfigError: the layout does not fit the grown model.
        CheckpointError: the source is damaged, or the target cannot be written.
    """
    with together(group):
        files = planned_files(reader, plan, output)
    own = _share_of(files, group, lambda file: sum(_bytes(piece) for piece in file[1]))
    counted = ((name, [_counted(piece, on_progress) for piece in pieces]) for name, pieces in own)
    write_checkpoint(path, group, counted, partial(_manifest, reader, plan, output))


def planned_bytes(reader: CheckpointReader, plan: GrowthPlan, output: GrowthOutput) -> int:
    """Return the size of all tensors of the grown checkpoint."""
    return sum(_bytes(piece) for _, pieces in planned_files(reader, plan, output) for piece in pieces)


def planned_files(reader: CheckpointReader, plan: GrowthPlan, output: GrowthOutput) -> list[FileToWrite]:
    """List all files of the grown checkpoint with their pieces; nothing is computed yet.

    Raises:
        ConfigError: the layout does not fit the grown model.
    """
    output.parallel.check(plan.target)
    states = reader.manifest.states if output.keep_optimizer else (WEIGHT,)
    files: list[FileToWrite] = []
    for rank in range(output.parallel.tensor_parallel_size):
        chunk: list[PieceToWrite] = []
        size = number = 0
        for piece in _pieces(reader, plan, output, rank, states):
            if chunk and size + _bytes(piece) > output.max_file_bytes:
                files.append((f"tp{rank:02d}-{number:04d}.safetensors", chunk))
                chunk, size, number = [], 0, number + 1
            chunk.append(piece)
            size += _bytes(piece)
        files.append((f"tp{rank:02d}-{number:04d}.safetensors", chunk))
    return files


def _pieces(
    reader: CheckpointReader, plan: GrowthPlan, output: GrowthOutput, rank: int, states: tuple[str, ...]
) -> Iterator[PieceToWrite]:
    parts = output.parallel.tensor_parallel_size
    for name, spec in plan.specs.items():
        if spec.sharded_dim is None and rank > 0:
            continue  # replicated parameters are stored once
        region = spec.local_region(Shard(rank, parts))
        for state in states:
            dtype = output.dtype or reader.dtype(name, state)
            blocks = partial(_blocks, reader, plan, name, state, region)
            yield PieceToWrite(state, name, region, None, dtype, blocks)


def _blocks(
    reader: CheckpointReader, plan: GrowthPlan, name: str, state: str, region: Region
) -> Iterator[NDArray[np.float64]]:
    rows = max(1, _BLOCK_ENTRIES // math.prod(region_shape(region)[1:]))
    first, stop = region[0]
    for start in range(first, stop, rows):
        yield grow_box(reader, plan, name, state, ((start, min(start + rows, stop)), *region[1:]))


def _bytes(piece: PieceToWrite) -> int:
    return math.prod(piece.shape) * np.dtype(piece.dtype).itemsize


def _counted(piece: PieceToWrite, on_progress: Callable[[int], None]) -> PieceToWrite:
    def blocks() -> Iterator[NDArray[np.floating]]:
        for block in piece.blocks():
            yield block
            on_progress(block.size * np.dtype(piece.dtype).itemsize)

    return piece._replace(blocks=blocks)


def _share_of(files: list[FileToWrite], group: Communicator, size: Callable[[FileToWrite], int]) -> list[FileToWrite]:
    """Give each file, largest first, to the rank with the least work so far; return this rank's."""
    loads = [0] * group.size
    own = []
    for file in sorted(files, key=size, reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += size(file)
        if rank == group.rank:
            own.append(file)
    return own


def _manifest(
    reader: CheckpointReader, plan: GrowthPlan, output: GrowthOutput, files: dict[str, FileRecord]
) -> Manifest:
    source = reader.manifest
    exponent = source.annealing.exponent(source.progress.step)
    multipliers = {}
    for name in plan.specs:
        inherited = source.parameters[name]
        multipliers[name] = (
            inherited.learning_rate_multiplier**exponent * plan.learning_rate_multiplier(name),
            inherited.adam_eps_multiplier * plan.adam_eps_multiplier(name),
        )
    event = {
        "event": "grow",
        "source": {"name": reader.path.name, "sha256": source.digest},
        "step": source.progress.step,
        **plan.changes,
        "optimizer": "map" if output.keep_optimizer else "reset",
        "noise_scale": plan.symmetry.noise_scale,
        "share_scale": plan.symmetry.share_scale,
        "seed": plan.symmetry.seed,
    }
    return Manifest(
        model=plan.target,
        layout=Layout(tensor_parallel_size=output.parallel.tensor_parallel_size),
        progress=source.progress if output.keep_optimizer else source.progress.model_copy(update={"optimizer_step": 0}),
        annealing=Annealing(
            since_step=source.progress.step, hold_steps=output.hold_steps, anneal_steps=output.anneal_steps
        ),
        parameters=parameter_records(plan.specs, multipliers),
        files=files,
        lineage=(*source.lineage, event),
        training_data=source.training_data,
    )
