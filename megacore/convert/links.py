"""How a parameter lies in another program's tensors, derived from its declared axes.

Other programs keep matrices with two dims (or one) where a parameter has named ones: what is looked up or written
makes the first, what is read the second. A parameter that stacks matrices (keys and values, gate and up) is several
of their tensors; several of a layer's matrices can also be fused into one tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.axes import AXES
from megacore.specs import ParamSpec, Region, Role, region_shape

Box2D = tuple[slice, ...]


@dataclass(frozen=True)
class Link:
    """A parameter, or one of the matrices that it stacks, as (a part of) a foreign tensor.

    Args:
        theirs: name of the foreign tensor.
        ours: name of the parameter.
        part: index along the parameter's stacking dim; ``None`` for the whole parameter.
        transposed: the foreign matrix is [in, out] instead of [out, in].
        fused: (which, of how many) equal parts along the outputs of the foreign tensor this is.
    """

    theirs: str
    ours: str
    part: int | None = None
    transposed: bool = False
    fused: tuple[int, int] = (0, 1)

    def their_shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """Return the foreign tensor's whole shape."""
        sizes = [math.prod(spec.dims[position].size for position in group) for group in self._groups(spec)]
        sizes[0] *= self.fused[1]
        return tuple(sizes[::-1] if self.transposed else sizes)

    def their_box(self, spec: ParamSpec, region: Region) -> Box2D:
        """Return where a box of the parameter (within this link's part) lies in the foreign tensor."""
        slices = []
        for group in self._groups(spec):
            inner = [spec.dims[position].size for position in group[1:]]
            assert all(region[p] == (0, size) for p, size in zip(group[1:], inner, strict=True)), (
                "only whole inner dims"
            )
            (start, stop), row = region[group[0]], math.prod(inner)
            slices.append((start * row, stop * row))
        whole = math.prod(spec.dims[position].size for position in self._groups(spec)[0])
        first = self.fused[0] * whole
        slices[0] = (slices[0][0] + first, slices[0][1] + first)
        box = tuple(slice(*bounds) for bounds in slices)
        return box[::-1] if self.transposed else box

    def our_values(self, spec: ParamSpec, region: Region, values: NDArray[Any]) -> NDArray[Any]:
        """Give a foreign box the shape of the parameter's box."""
        shape = region_shape(region)
        return (values.T if self.transposed else values).reshape(shape[self._stacked :])

    def their_values(self, spec: ParamSpec, values: NDArray[Any]) -> NDArray[Any]:
        """Give the whole matrix the foreign shape (of its fused part)."""
        sizes = [math.prod(spec.dims[position].size for position in group) for group in self._groups(spec)]
        matrix = values.reshape(sizes)
        return np.ascontiguousarray(matrix.T) if self.transposed else matrix

    def our_region(self, spec: ParamSpec) -> Region:
        """Return the box of the parameter that this link is about."""
        bounds = [(0, dim.size) for dim in spec.dims]
        if self.part is not None:
            bounds[0] = (self.part, self.part + 1)
        return tuple(bounds)

    @property
    def _stacked(self) -> int:
        return 0 if self.part is None else 1

    def _groups(self, spec: ParamSpec) -> list[list[int]]:
        """Return the positions of the parameter's dims that make each foreign dim."""
        positions = range(self._stacked, len(spec.dims))
        assert self.part is None or AXES[spec.dims[0].axis].stacks
        groups = [[p for p in positions if spec.dims[p].role is role] for role in (Role.INDEX, Role.WRITE, Role.READ)]
        return [group for group in groups if group]
