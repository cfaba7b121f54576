"""Axis maps: which old entry each new entry of an axis copies, and what it is multiplied by.

An axis of a model carries values: those of the residual stream, of heads, of neurons. In the grown model entry ``i``
of an axis carries ``write[i]`` times the value of entry ``source[i]`` of the small one. What contracts over the axis
multiplies its copies by ``read[i]``; the function is kept because, over the copies of an entry, the products
``write × read`` sum to one. Gradients change the other way round: that is the chain rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from megacore.random import standard_normal, stream_key
from megacore.specs import Role

Floats = NDArray[np.float64]
F = TypeVar("F", bound=np.floating[Any])
_TURN = 0.4


@dataclass(frozen=True)
class AxisMap:
    """The map of one axis.

    Args:
        old: size of the axis in the small model.
        source: [new] the old entry that each new entry copies; -1 for one that is new.
        write: [new] what a copy's value is, by its source's.
        read: [new] what a copy is multiplied by where the axis is contracted.
        centre: ``None``, or s for a stream whose values are ``write × (x - mean x) + s × mean x``.
    """

    old: int
    source: NDArray[np.int64]
    write: Floats
    read: Floats
    centre: float | None = None

    @property
    def size(self) -> int:
        """The axis's size in the grown model."""
        return len(self.source)

    @cached_property
    def fresh(self) -> NDArray[np.bool_]:
        """[new] which entries copy nothing."""
        return self.source < 0

    @cached_property
    def is_identity(self) -> bool:
        """Whether nothing changes along this axis."""
        plain = self.size == self.old and np.array_equal(self.source, np.arange(self.old))
        return bool(plain and (self.write == 1).all() and (self.read == 1).all())

    def factor(self, role: Role) -> Floats:
        """Return what a parameter's entries are multiplied by along this axis, [new]."""
        return self._factors[role]

    def gradient_factor(self, role: Role) -> Floats:
        """Return what the gradients of a parameter's entries are multiplied by along this axis, [new]."""
        return self._gradient_factors[role]

    @cached_property
    def _factors(self) -> dict[Role, Floats]:
        ones, written, read = np.ones(self.size), self.write, self.read
        factors = {Role.WRITE: written, Role.READ: read, Role.SHIFT: written, Role.SHIFT_READ: read}
        return factors | {Role.INDEX: ones, Role.SCALE: ones, Role.SCALE_READ: 1.0 / self.over_group(written**2)}

    @cached_property
    def _gradient_factors(self) -> dict[Role, Floats]:
        written, read = self.write, self.read
        factors = {Role.WRITE: read, Role.READ: written, Role.SHIFT: read, Role.SHIFT_READ: written}
        return factors | {Role.INDEX: np.ones(self.size), Role.SCALE: written * read, Role.SCALE_READ: written**2}

    def over_group(self, values: NDArray[F]) -> NDArray[F]:
        """Give to each entry the sum over the copies of its source, [..., new]; to one that is new, its own value."""
        sums = np.zeros((*values.shape[:-1], self.old), values.dtype)
        for members, present in self._members:
            sums += np.take(values, members, axis=-1) * present.astype(values.dtype)
        taken = np.take(sums, self.source.clip(0), axis=-1)
        return np.where(self.fresh, values, taken) if self.fresh.any() else taken

    def unseen_noise(self, draw: Callable[[int], NDArray[F]]) -> NDArray[F]:
        """Return noise that sums to zero for whoever reads the copies of an entry, [..., new].

        Args:
            draw: makes so many independent numbers of variance one, [..., size].
        """
        if self.copies != 2:
            values = draw(self.size)
            write = self.write.astype(values.dtype)
            seen: NDArray[F] = write * (self.over_group(values * write) / self.over_group(write**2))
            return values - seen
        half = draw(self.old)  # of each pair the one is the other's negative: half the work
        half *= half.dtype.type(np.sqrt(0.5))
        noise = np.empty((*half.shape[:-1], self.size), half.dtype)
        noise[..., ::2] = half
        np.negative(half, out=noise[..., 1::2])
        return noise

    @cached_property
    def copies(self) -> int | None:
        """Number of copies of every entry, if it is the same, they are neighbours and none is scaled."""
        copies, rest = divmod(self.size, self.old)
        plain = not rest and np.array_equal(self.source, np.arange(self.size) // copies) and (self.write == 1).all()
        return copies if plain else None

    @cached_property
    def _members(self) -> list[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
        """The first copy of every entry, the second one, and so on: [old] places, and whether there is such a one."""
        order = np.argsort(self.source, kind="stable")[int(self.fresh.sum()) :]
        counts = np.bincount(self.source[order], minlength=self.old)
        starts = np.cumsum(counts) - counts
        nth = range(int(counts.max(initial=0)))
        return [(order[np.where(n < counts, starts + n, 0)], n < counts) for n in nth]

    @cached_property
    def shares(self) -> tuple[Floats, Floats]:
        """[new] each: where a copy's part of its source begins and ends, on a line from 0 to 1."""
        part = self.write * self.read
        begins, ends = np.empty(self.size), np.empty(self.size)
        total = np.zeros(self.old)
        for entry, source in enumerate(self.source):
            begins[entry] = total[source]
            total[source] += part[entry]
            ends[entry] = total[source]
        last = self.size - 1 - np.unique(self.source[::-1], return_index=True)[1]
        ends[last] = 1.0  # whatever rounding has left
        return begins, ends


def copied(old: int, new: int) -> NDArray[np.int64]:
    """Return the source of each entry: copies are neighbours, so that shards keep to their sources."""
    return np.arange(new, dtype=np.int64) * old // new


def shared(old: int, source: NDArray[np.int64], spread: float = 0.0, seed: int = 0, *names: str) -> AxisMap:
    """Repeat entries, and share what reads them between the copies.

    Args:
        old: size of the axis in the small model.
        source: of each entry.
        spread: relative standard deviation of a share before the shares of a source are made to sum to one.
        seed: of the growth.
        names: what the axis belongs to; each (seed, names) has shares of its own.
    """
    weight = np.ones(len(source))
    if spread:
        z = standard_normal(stream_key(seed, "share", *names), np.arange(len(source)))
        weight += spread * np.clip(z, -2.5, 2.5)
    read = weight / np.bincount(source, weights=weight, minlength=old)[source]
    return AxisMap(old, source, np.ones(len(source)), read)


def weighted(old: int, source: NDArray[np.int64], square: float) -> AxisMap:
    """Copy entries so that the squares of the copies of each sum to ``square`` times its own.

    With ``square`` = new/old the mean square is kept: what RMS norms need, at any ratio.
    """
    counts = np.bincount(source, minlength=old)[source]
    write = np.sqrt(square / counts)
    return AxisMap(old, source, write, write / square)


def centred(old: int, new: int) -> AxisMap:
    """Copy a stream that layer norms read and linear maps write, at any ratio of sizes.

    The copies' weights must have the same sum A and the same sum of squares new/old for every entry; an entry with two
    copies next to one with a single one leaves (A, 0) alone, so copies come in threes (or a last four) where that is
    possible.
    """
    extra = new - old
    counts = np.ones(old, np.int64)
    if new >= 2 * old:
        counts = np.bincount(copied(old, new))
    elif extra == 1:
        counts[0] = 2
    else:
        counts[: extra // 2] = 3
        counts[0] += extra % 2
    square = new / old
    total = np.sqrt(square * counts.min())
    source = np.repeat(np.arange(old), counts)
    write = np.empty(new)
    start = 0
    for count in counts.tolist():
        # Any direction orthogonal to the ones will do; this one leaves no copies alike, and none at zero.
        turn = np.cos(2 * np.pi * np.arange(count) / count + _TURN) if count > 2 else np.array([1.0, -1.0])[:count]
        direction = (turn - turn.mean()) / max(np.linalg.norm(turn - turn.mean()), 1e-300)
        rest = max(0.0, square - total**2 / count)
        write[start : start + count] = total / count + np.sqrt(rest) * direction
        start += count
    return AxisMap(old, source, write, write / square, centre=square / total)


def extended(old: int, new: int) -> AxisMap:
    """Keep the entries and add new ones."""
    source = np.where(np.arange(new) < old, np.arange(new, dtype=np.int64), -1)
    return AxisMap(old, source, np.ones(new), np.ones(new))


def query_heads(old: tuple[int, int], new: tuple[int, int]) -> NDArray[np.int64] | None:
    """Return the source of each query head, so that it reads a copy of the key head that its source reads.

    Args:
        old: numbers of query and key heads; query head h reads key head h × key heads // query heads.
        new: of the grown model.

    Returns:
        The sources; ``None`` if the copies of a key head are read by too few query heads for all of its own.
    """
    group, new_group = old[0] // old[1], new[0] // new[1]
    keys = copied(old[1], new[1])
    sources = []
    for key, count in enumerate(np.bincount(keys).tolist()):
        if new_group >= group:  # every copy of a key head serves all of its query heads
            own = np.tile(copied(group, new_group), count)
        elif count * new_group >= group:
            own = copied(group, count * new_group)
        else:
            return None
        sources.append(key * group + own)
    return np.concatenate(sources)


def head_dims(old: int, new: int, rotated: str) -> NDArray[np.int64]:
    """Return the source of each number of a head; pairs that rotate together stay together.

    Args:
        old: head size.
        new: head size of the grown model.
        rotated: the configuration's ``position_embedding``.
    """
    if not rotated.startswith("rotary"):
        return copied(old, new)
    pairs = copied(old // 2, new // 2)
    if rotated == "rotary":
        return np.concatenate([pairs, pairs + old // 2])
    return np.stack([2 * pairs, 2 * pairs + 1], axis=1).reshape(-1)
