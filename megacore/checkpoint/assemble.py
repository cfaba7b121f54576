"""Boxes of global tensors out of stored parts, whatever the layout of the parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.specs import Region, region_shape

Rows = Callable[[int, int], NDArray[Any]]
"""(start, stop) -> those rows of a stored tensor's first dim."""
Run = tuple[tuple[int, int], Rows]
"""[start, stop) in a box's entries in row-major order, and what reads them by their place in the run."""


def assembled(
    region: Region, boxes: Mapping[Region, Callable[[Region], NDArray[Any]]], dtype: np.dtype[Any]
) -> tuple[NDArray[Any], int]:
    """Return a box of a global tensor, and how many of its entries were found.

    Args:
        region: what is wanted.
        boxes: stored boxes, and what reads a part of each (in the box's own indices).
        dtype: of the result.
    """
    result: NDArray[Any] | None = None
    filled = 0
    for box, read in boxes.items():
        overlap = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(region, box, strict=True))
        if any(start >= stop for start, stop in overlap):
            continue
        source = tuple((o0 - b0, o1 - b0) for (o0, o1), (b0, _) in zip(overlap, box, strict=True))
        values = read(source)
        filled += values.size
        if overlap == region and len(boxes) == 1:
            return values.astype(dtype, copy=False), filled
        if result is None:
            result = np.empty(region_shape(region), dtype)
        result[tuple(slice(o0 - r0, o1 - r0) for (o0, o1), (r0, _) in zip(overlap, region, strict=True))] = values
    return np.empty(region_shape(region), dtype) if result is None else result, filled


def read_runs(shape: tuple[int, ...], runs: Sequence[Run], dtype: np.dtype[Any], part: Region) -> NDArray[Any]:
    """Return a part of a box of ``shape`` that is stored as flat runs."""
    # Fetch whole rows of the first dim, then cut the other dims.
    inner = math.prod(shape[1:])
    first, stop = part[0][0] * inner, part[0][1] * inner
    flat: NDArray[Any] = np.empty(stop - first, dtype)
    for (low, high), rows in runs:
        begin, end = max(first, low), min(stop, high)
        if begin < end:
            flat[begin - first : end - first] = rows(begin - low, end - low)
    cut: NDArray[Any] = flat.reshape(-1, *shape[1:])[(slice(None), *(slice(*bounds) for bounds in part[1:]))]
    return cut


def follow_each_other(runs: Sequence[Run], size: int) -> bool:
    """Tell whether runs, in order, fill [0, size) from end to end."""
    ends = [0, *(high for (_, high), _ in runs)]
    return [low for (low, _), _ in runs] == ends[:-1] and ends[-1] == size
