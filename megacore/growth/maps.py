"""Axis maps: which old entry each new entry of an axis copies, and the share of the source's work it takes over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megacore.random import standard_normal, stream_key


@dataclass(frozen=True)
class AxisMap:
    """The map of one axis.

    Args:
        source: [new] the old entry that each new entry copies, non-decreasing.
        share: [new] the part of its source that each copy stands for; the shares of a source's copies sum to one.
            A parameter that reads the axis is multiplied by the share (so the sum is kept); a parameter that
            writes it is repeated, and its gradient is the source's times the share.
    """

    source: NDArray[np.int64]
    share: NDArray[np.float64]

    @property
    def ratio(self) -> float:
        """New size over old size."""
        return len(self.source) / (int(self.source[-1]) + 1)

    def group_mean(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Replace each entry along the last dim by the mean over the copies of the same source."""
        starts = np.flatnonzero(np.diff(self.source, prepend=-1))
        counts = np.diff(starts, append=len(self.source))
        means = np.add.reduceat(values, starts, axis=-1) / counts
        repeated: NDArray[np.float64] = np.repeat(means, counts, axis=-1)
        return repeated


def even_map(old: int, new: int) -> AxisMap:
    """Give the copies of each entry equal shares; copies are neighbours, so that shards keep to their sources."""
    source = np.arange(new, dtype=np.int64) * old // new
    return AxisMap(source, 1.0 / np.bincount(source)[source])


def uneven_map(old: int, new: int, scale: float, seed: int, *names: str) -> AxisMap:
    """Give the copies random shares around the even ones, so that they learn different things.

    Args:
        old: size of the source axis.
        new: size of the grown axis.
        scale: relative standard deviation of a share before the shares of a source are made to sum to one.
        seed: of the growth.
        names: what the axis belongs to; each (seed, names) has shares of its own.
    """
    even = even_map(old, new)
    z = standard_normal(stream_key(seed, "share", *names), np.arange(new))
    weight = 1.0 + scale * np.clip(z, -2.5, 2.5)
    return AxisMap(even.source, weight / np.bincount(even.source, weights=weight)[even.source])
