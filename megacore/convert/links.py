"""How a parameter lies in another program's tensors, derived from its declared axes.

Other programs keep matrices with two dims (or one) where a parameter has named ones: what is looked up or written
makes the first, what is read the second. A parameter that stacks matrices (keys and values, gate and up) is several
of their tensors; several of a layer's matrices can also be fused into one tensor, one after the other or interleaved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.axes import AXES
from megacore.specs import ParamSpec, Region, Role, region_shape

Box2D = tuple[slice, ...]


@dataclass(frozen=True)
class Columns:
    """Part of a fused tensor: of its outputs, seen as [groups, width], the columns [start, stop) of every group.

    GPT-2's queries are a third of one group; Megatron's are the first columns of as many groups as there are keys.
    """

    groups: int
    width: int
    start: int
    stop: int

    def ranges(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges of the fused outputs that make the part's outputs [first, stop), in order."""
        size = self.stop - self.start
        if size == self.width:  # nothing lies between the groups
            yield first, stop
            return
        for group in range(first // size, -(-stop // size)):
            shift = group * (self.width - size) + self.start
            yield max(first, group * size) + shift, min(stop, (group + 1) * size) + shift


@dataclass(frozen=True)
class Link:
    """A parameter, or one of the matrices that it stacks, as (a part of) a foreign tensor.

    Args:
        theirs: name of the foreign tensor.
        ours: name of the parameter.
        part: index along the parameter's stacking dim; ``None`` for the whole parameter.
        transposed: the foreign matrix is [in, out] instead of [out, in].
        columns: which of the foreign tensor's outputs; ``None`` for all.
    """

    theirs: str
    ours: str
    part: int | None = None
    transposed: bool = False
    columns: Columns | None = None

    def their_shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """Return the foreign tensor's whole shape."""
        sizes = [math.prod(spec.dims[position].size for position in group) for group in self._groups(spec)]
        if self.columns is not None:
            sizes[0] = self.columns.groups * self.columns.width
        return tuple(sizes[::-1] if self.transposed else sizes)

    def cut_dim(self, spec: ParamSpec) -> int | None:
        """Return the foreign dim along which tensor-parallel ranks hold parts of the tensor; ``None`` if all of it."""
        held = [spec.sharded_dim in group for group in self._groups(spec)]
        return (held[::-1] if self.transposed else held).index(True) if any(held) else None

    def their_boxes(self, spec: ParamSpec, region: Region) -> list[Box2D]:
        """Return where a box of the parameter (within this link's part) lies: boxes, one after the other by outputs."""
        bounds = []
        for group in self._groups(spec):
            inner = [spec.dims[position].size for position in group[1:]]
            assert all(region[p] == (0, size) for p, size in zip(group[1:], inner, strict=True)), (
                "only whole inner dims"
            )
            (start, stop), row = region[group[0]], math.prod(inner)
            bounds.append((start * row, stop * row))
        outputs, *inputs = bounds
        ranges = [outputs] if self.columns is None else self.columns.ranges(*outputs)
        boxes = [tuple(slice(*edges) for edges in (rows, *inputs)) for rows in ranges]
        return [box[::-1] if self.transposed else box for box in boxes]

    def our_values(self, spec: ParamSpec, region: Region, boxes: list[NDArray[Any]]) -> NDArray[Any]:
        """Give the values of the foreign boxes the shape of the parameter's box."""
        shape = region_shape(region)
        values = boxes[0] if len(boxes) == 1 else np.concatenate(boxes, axis=-1 if self.transposed else 0)
        return (values.T if self.transposed else values).reshape(shape[self._stacked :])

    def fill(
        self, spec: ParamSpec, region: Region, values: NDArray[Any], theirs: NDArray[Any], origin: tuple[int, ...] = ()
    ) -> None:
        """Write a box of the parameter into the foreign tensor, or into the part of it that begins at ``origin``."""
        boxes = self.their_boxes(spec, region)
        shape = [edges.stop - edges.start for edges in boxes[0]]
        outputs = len(shape) - 1 if self.transposed else 0
        shape[outputs] = sum(box[outputs].stop - box[outputs].start for box in boxes)
        matrix = values.reshape(shape[::-1]).T if self.transposed else values.reshape(shape)
        origin = origin or (0,) * len(shape)
        done = 0
        for box in boxes:
            count = box[outputs].stop - box[outputs].start
            place = tuple(slice(e.start - first, e.stop - first) for e, first in zip(box, origin, strict=True))
            theirs[place] = matrix[:, done : done + count] if outputs else matrix[done : done + count]
            done += count

    def our_region(self, spec: ParamSpec) -> Region:
        """Return the box of the parameter that this link is about."""
        bounds = [(0, dim.size) for dim in spec.dims]
        if self.part is not None:
            bounds[0] = (self.part, self.part + 1)
        return tuple(bounds)

    def blocks(self, region: Region, entries: int) -> Iterator[Region]:
        """Cut a box of the parameter along its first dim, but for the stacking one, into boxes of so many entries."""
        (start, stop), row = region[self._stacked], math.prod(region_shape(region)[self._stacked + 1 :])
        rows = max(1, entries // max(1, row))
        for first in range(start, stop, rows):
            yield (*region[: self._stacked], (first, min(first + rows, stop)), *region[self._stacked + 1 :])

    @property
    def _stacked(self) -> int:
        return 0 if self.part is None else 1

    def _groups(self, spec: ParamSpec) -> list[list[int]]:
        """Return the positions of the parameter's dims that make each foreign dim."""
        positions = range(self._stacked, len(spec.dims))
        assert self.part is None or AXES[spec.dims[0].axis].stacks
        inputs = [p for p in positions if spec.dims[p].role is Role.READ]
        looked_up = [p for p in positions if spec.dims[p].role is Role.INDEX]
        outputs = [p for p in positions if p not in inputs and p not in looked_up]
        groups = [looked_up, outputs, inputs]
        return [group for group in groups if group]


def read_linked(
    links: Iterable[Link], spec: ParamSpec, region: Region, read: Callable[[str, Box2D], NDArray[Any]]
) -> NDArray[Any]:
    """Return a box of a parameter.

    Args:
        links: all of the parameter's.
        spec: its declaration.
        region: the box.
        read: (name, box) -> a box of a foreign tensor.
    """
    first, stop = region[0]
    values: NDArray[Any] | None = None
    for link in links:
        if link.part is not None and not first <= link.part < stop:
            continue
        inner = region if link.part is None else ((link.part, link.part + 1), *region[1:])
        boxes = [read(link.theirs, box) for box in link.their_boxes(spec, inner)]
        part = link.our_values(spec, inner, boxes)
        if link.part is None:
            return part
        if values is None:
            values = np.empty(region_shape(region), part.dtype)
        values[link.part - first] = part
    assert values is not None
    return values
