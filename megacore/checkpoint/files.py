"""Which tensors of a checkpoint go into which files, and which rank writes them: planned before anything is read."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

from numpy.typing import NDArray

from megacore.checkpoint.manifest import Layout
from megacore.checkpoint.pieces import Piece
from megacore.checkpoint.stream import NUMPY
from megacore.checkpoint.writer import FileToWrite, PieceToWrite
from megacore.communicator import Communicator
from megacore.config import ParallelConfig
from megacore.specs import Region, Shard, TensorSpec, region_shape

_BLOCK_ENTRIES = 1 << 19
"""Entries of a tensor that are computed at once: what a processor's cache holds, 1 MiB in bfloat16."""
_BLOCKS_AHEAD = 2
"""That are computed while one is written."""
MAX_FILE_BYTES = 1 << 30
"""A tensor-parallel rank's tensors are spread over files of about this size."""
_BLOCK_NAME = re.compile(r"(.*\.)?layers\.\d+\.")

BoxOf = Callable[[str, str, Region], NDArray[Any]]
"""(parameter, state, box) -> its values."""


def layout_of(parallel: ParallelConfig) -> Layout:
    """Return how the files of a converted checkpoint are cut."""
    return Layout(
        tensor_parallel_size=parallel.tensor_parallel_size, pipeline_parallel_size=parallel.pipeline_parallel_size
    )


def plan_files(
    specs: Mapping[str, TensorSpec],
    states: Iterable[str],
    layout: Layout,
    dtype_of: Callable[[str, str], str],
    box_of: BoxOf,
    max_file_bytes: int = MAX_FILE_BYTES,
    pool: Executor | None = None,
) -> list[FileToWrite]:
    """List all files of a checkpoint with their pieces; nothing is computed yet.

    Args:
        specs: every parameter's declaration.
        states: to be written of each.
        layout: each tensor-parallel rank of each pipeline stage of the target will find its own files.
        dtype_of: (parameter, state) -> the dtype to store.
        box_of: makes the values.
        max_file_bytes: size from which on a new file is begun.
        pool: computes values while others are written; ``None`` to compute them when they are wanted.
    """
    states = tuple(states)
    files: list[FileToWrite] = []
    for stage, held in enumerate(_stages(specs, layout.pipeline_parallel_size)):
        for rank in range(layout.tensor_parallel_size):
            shard = Shard(rank, layout.tensor_parallel_size)
            pieces = [
                PieceToWrite(Piece(name, state, region, None, dtype_of(name, state)), blocks)
                for name, spec in held.items()
                if rank == 0 or spec.sharded_dim is not None  # replicated parameters are stored once
                for region in [spec.local_region(shard)]
                for state in states
                for blocks in [partial(_blocks, box_of, name, state, region, pool)]
            ]
            for number, chunk in enumerate(_chunks(pieces, max_file_bytes)):
                files.append((f"pp{stage:02d}-tp{rank:02d}-{number:04d}.safetensors", chunk))
    return files


def _stages(specs: Mapping[str, TensorSpec], parts: int) -> list[dict[str, TensorSpec]]:
    """Cut the parameters, in order, into pipeline stages of about equal numbers of blocks."""
    blocks = {match[0]: None for name in specs if (match := _BLOCK_NAME.match(name))}
    stage_of = {block: number * parts // len(blocks) for number, block in enumerate(blocks)}
    stages: list[dict[str, TensorSpec]] = [{} for _ in range(parts)]
    stage = 0
    for name, spec in specs.items():
        match = _BLOCK_NAME.match(name)
        stage = stage_of[match[0]] if match else stage
        stages[stage][name] = spec
    return stages


def _chunks(pieces: list[PieceToWrite], max_file_bytes: int) -> Iterator[list[PieceToWrite]]:
    chunk: list[PieceToWrite] = []
    size = 0
    for item in pieces:
        more = item.piece.entry.nbytes
        if chunk and size + more > max_file_bytes:
            yield chunk
            chunk, size = [], 0
        chunk.append(item)
        size += more
    if chunk:
        yield chunk


def block_rows(shape: Sequence[int]) -> int:
    """Return how many rows of a tensor are computed at once."""
    return max(1, _BLOCK_ENTRIES // math.prod(shape[1:]))


def _blocks(box_of: BoxOf, name: str, state: str, region: Region, pool: Executor | None) -> Iterator[NDArray[Any]]:
    rows = block_rows(region_shape(region))
    first, stop = region[0]
    pending: deque[Future[NDArray[Any]]] = deque()
    for start in range(first, stop, rows):
        box = ((start, min(start + rows, stop)), *region[1:])
        if pool is None:
            yield box_of(name, state, box)
            continue
        pending.append(pool.submit(box_of, name, state, box))
        if len(pending) > _BLOCKS_AHEAD:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def planned_bytes(files: Iterable[FileToWrite]) -> int:
    """Return the size of all tensors of some files."""
    return sum(piece.entry.nbytes for _, pieces in files for piece, _ in pieces)


def share_of(
    files: list[FileToWrite], group: Communicator, on_progress: Callable[[int], None] = lambda size: None
) -> Iterator[FileToWrite]:
    """Give each rank files that follow each other, of about as many bytes as the others'; yield this rank's.

    Neighbours are made from the same parts of a source, which a rank then checks once.

    Args:
        files: of all ranks.
        group: the ranks that write.
        on_progress: called with the number of bytes of each block this rank has written.
    """
    total, before = planned_bytes(files), 0
    for name, pieces in files:
        size = planned_bytes([(name, pieces)])
        middle, before = before + size / 2, before + size
        if int(middle * group.size / max(1, total)) == group.rank:
            yield name, [_counted(item, on_progress) for item in pieces]


def _counted(item: PieceToWrite, on_progress: Callable[[int], None]) -> PieceToWrite:
    size = NUMPY[item.piece.dtype].itemsize

    def blocks() -> Iterator[NDArray[Any]]:
        for block in item.blocks():
            yield block
            on_progress(block.size * size)

    return item._replace(blocks=blocks)
