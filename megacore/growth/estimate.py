"""What a growth will read, write and take, estimated before anything is done."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megacore.checkpoint.files import block_rows, planned_bytes
from megacore.checkpoint.manifest import MOMENTS, WEIGHT
from megacore.checkpoint.stream import NUMPY
from megacore.checkpoint.writer import FileToWrite
from megacore.growth.plan import GrowthPlan
from megacore.growth.source import GrowthSource
from megacore.specs import region_shape

RATE = 1e9
"""Bytes that a rank writes in a second on two cores, if the disk is as fast (``bench/growth_io.py``: 1.25e9)."""
_PROCESS_BYTES = 650 << 20
"""Of a process beside the block that it computes: what it imports, buffers, blocks ahead (the same: 690 MB in all)."""
_TEMPORARIES = 8
"""Arrays of float64 that are there at once while a block is computed."""


@dataclass(frozen=True)
class Estimate:
    """Of a growth.

    Args:
        bytes_read: from the source, by all ranks.
        bytes_written: by all ranks.
        memory: peak of a rank's, without a comparison of the models.
        seconds: at `RATE`, without a comparison of the models.
    """

    bytes_read: int
    bytes_written: int
    memory: int
    seconds: float


def estimate(
    source: GrowthSource, plan: GrowthPlan, files: Iterable[FileToWrite], states: Iterable[str], ranks: int
) -> Estimate:
    """Estimate what a growth takes, whose files are planned."""
    files = tuple(files)
    written = planned_bytes(files)
    shapes = [region_shape(piece.region) for _, pieces in files for piece, _ in pieces]
    largest = max(min(block_rows(shape), shape[0]) * math.prod(shape[1:]) for shape in shapes)
    read = sum(_bytes_read(source, plan, name, state) for name in plan.specs for state in states)
    return Estimate(read, written, _PROCESS_BYTES + 8 * _TEMPORARIES * largest, written / (RATE * ranks))


def _bytes_read(source: GrowthSource, plan: GrowthPlan, name: str, state: str) -> int:
    rule = plan.rules[name]
    known = state == WEIGHT and rule.constant is not None
    if known or rule.drawn or (rule.is_new and state == MOMENTS[0]):
        return 0
    dims = zip(rule.dims, plan.specs[name].shape, strict=True)
    times = math.prod(size for dim, size in dims if dim is None)  # each expert reads the network that it copies
    return times * math.prod(plan.source_specs[rule.source].shape) * NUMPY[source.dtype(rule.source, state)].itemsize
