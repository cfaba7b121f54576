"""Compute boxes of grown tensors: gather, multiply, add noise; reading only the source entries that they copy."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.checkpoint.manifest import MOMENTS, WEIGHT
from megacore.growth.maps import AxisMap, Floats
from megacore.growth.plan import GrowthPlan
from megacore.growth.source import GrowthSource
from megacore.random import stream_key, uniform_rows
from megacore.specs import Region, Role, global_index, region_shape

Values = NDArray[np.floating[Any]]
# How often the gradient's factor enters: exp_avg follows the gradient, exp_avg_sq its square.
_GRADIENT_POWER = dict(zip(MOMENTS, (1, 2), strict=True))
_MEAN_ENTRIES = 1 << 22
"""Entries that are read at a time to take a mean."""
_MEANS_KEPT = 64
"""Boxes that follow each other need the same few; all of a large model's would take as much as a tensor."""
_BFLOAT16_BITS = 8
"""Of a bfloat16 number, the leading one included."""


class Grower:
    """Makes boxes of the grown model's tensors, in float32 or, where that is stored, float64; threads may share it.

    Args:
        source: the small model's checkpoint.
        plan: of the growth.
        dtype: of what is written, or ``None`` for the source's; bfloat16 is of the weights alone.
    """

    def __init__(self, source: GrowthSource, plan: GrowthPlan, dtype: str | None = None) -> None:
        self._source, self.plan, self._dtype = source, plan, dtype
        self._means: dict[tuple[str, str, int | None, Region], Floats] = {}
        self._reading, self._averaging = threading.Lock(), threading.Lock()

    def box(self, parameter: str, state: str, region: Region) -> Values:
        """Compute a box of a grown tensor.

        Args:
            parameter: name of the parameter in the grown model.
            state: ``weight``, ``exp_avg`` or ``exp_avg_sq``.
            region: the box, in the grown tensor's indices; it must span the stream where noise is added.
        """
        rule, shape = self.plan.rules[parameter], region_shape(region)
        if state == WEIGHT and rule.constant is not None:
            return np.full(shape, rule.constant)
        if state == MOMENTS[0] and (rule.is_new or rule.drawn):
            return np.zeros(shape)
        if rule.drawn:
            if state == WEIGHT:
                return self.initial(parameter, region)
            return np.full(shape, self.mean(rule.source, state, None, ()).item())
        box = _Box(self, parameter, state, region)
        return box.with_fresh(box.copied())

    def read(self, parameter: str, state: str, region: Region) -> Values:
        """Read a box of the source; one thread at a time, which is all that a disk wants."""
        with self._reading:
            values: Values = self._source.read(parameter, state, region)
        return values

    def dtype(self, parameter: str, state: str) -> str:
        """Return the type in which a state of a grown parameter is written."""
        if self._dtype is None or (self._dtype == "bfloat16" and state != WEIGHT):  # would lose small moments
            return self._source.dtype(self.plan.rules[parameter].source, state)
        return self._dtype

    def initial(self, parameter: str, region: Region) -> Values:
        """Draw the initial weights of what copies nothing."""
        plan = self.plan
        return plan.specs[parameter].initial_values(parameter, plan.symmetry.seed, plan.target, region)

    def mean(self, parameter: str, state: str, over: int | None, others: Region) -> Floats:
        """Return a source tensor's mean over one dim, or over all; kept for the next boxes, which wait for it."""
        key = parameter, state, over, others
        with self._averaging:
            if key not in self._means:
                if len(self._means) >= _MEANS_KEPT:
                    del self._means[next(iter(self._means))]
                self._means[key] = self._averaged(parameter, state, over, others)
            return self._means[key]

    def _averaged(self, parameter: str, state: str, over: int | None, others: Region) -> Floats:
        shape = self.plan.source_specs[parameter].shape
        cut, rest = over or 0, iter(others)
        whole = [(0, size) for size in shape]
        region = tuple(whole if over is None else (whole[p] if p == over else next(rest) for p in range(len(shape))))
        sizes = region_shape(region)
        step = max(1, _MEAN_ENTRIES * sizes[cut] // max(1, math.prod(sizes)))
        total: Any = 0.0
        for start in range(0, sizes[cut], step):
            block = (*region[:cut], (start, min(start + step, sizes[cut])), *region[cut + 1 :])
            values = self.read(parameter, state, block)
            total = total + values.sum(axis=over, dtype=np.float64)
        count = math.prod(sizes) if over is None else sizes[over]
        return np.asarray(total / count)


class _Box:
    """One box of a grown tensor that copies a source."""

    def __init__(self, grower: Grower, parameter: str, state: str, region: Region) -> None:
        self._grower, self._parameter, self._state, self._region = grower, parameter, state, region
        plan = grower.plan
        self._plan, self._rule, self._spec = plan, plan.rules[parameter], plan.specs[parameter]
        self._maps = plan.maps(parameter)

    def copied(self) -> Values:
        """Gather and multiply along one dim after the other, the last one first: rows are then copied whole."""
        needed, index = self._needed(skip=None)
        grown = self._grower.read(self._rule.source, self._state, needed)
        if self._grower.dtype(self._parameter, self._state) == "float64":
            grown = grown.astype(np.float64)
        size = self._noise_size(grown)
        positions = [p for p in range(len(self._region)) if self._rule.dims[p] is not None]
        for axis, position in reversed(list(enumerate(positions))):
            grown = _taken(grown, index[axis], axis)
            grown = self._multiplied(grown, axis, len(positions), position)
            if size is not None and position != positions[-1]:
                size = self._multiplied(np.take(size, index[axis], axis=axis), axis, len(positions), position)
        grown = self._expanded(grown)
        if size is not None:
            grown += self._kernel_noise(self._expanded(size), grown.dtype)
        power = 1 if self._state == WEIGHT else -_GRADIENT_POWER[self._state]
        return grown if self._rule.factor == 1.0 else grown * grown.dtype.type(self._rule.factor**power)

    def _needed(self, skip: int | None) -> tuple[Region, list[NDArray[np.int64]]]:
        """Return which box of the source is copied, and each entry's place in it, by the source's dims."""
        needed, index = [], []
        for position, (start, stop) in enumerate(self._region):
            if self._rule.dims[position] is None or position == skip:
                continue
            source = self._maps[position].source[start:stop]
            known = source[source >= 0]
            first, last = (int(known.min()), int(known.max())) if len(known) else (0, 0)
            needed.append((first, last + 1))
            index.append(np.clip(source, first, last) - first)
        return tuple(needed), index

    def _multiplied(self, values: Values, axis: int, dims: int, position: int) -> Values:
        """Multiply along one dim by what the parameter's role there asks for."""
        role, axis_map = self._spec.dims[position].role, self._maps[position]
        view = [-1 if a == axis else 1 for a in range(dims)]

        def along(factors: Floats) -> Values:
            return factors[slice(*self._region[position])].reshape(view).astype(values.dtype)

        if self._state != WEIGHT:
            return _times(values, along(_moment_factor(axis_map, role, self._state)))
        if role is Role.WRITE and axis_map.centre is not None:
            write, mean = along(axis_map.write), self._mean_over(position).astype(values.dtype)
            return write * values + (values.dtype.type(axis_map.centre) - write) * mean
        if role is Role.READ and self._splits_exactly(axis_map):
            return exact_part(values, *(along(bounds) for bounds in axis_map.shares))
        return _times(values, along(axis_map.factor(role)))

    def _splits_exactly(self, axis_map: AxisMap) -> bool:
        """Tell whether shares must be rounded so that they sum up exactly: halves, quarters do of themselves."""
        if self._grower.dtype(self._parameter, WEIGHT) != "bfloat16" or not bool((axis_map.write == 1).all()):
            return False
        return not bool((np.frexp(axis_map.read)[0] == 0.5).all())

    def _expanded(self, values: Values) -> Values:
        """Add the dims that the source lacks."""
        lacking = tuple(p for p, position in enumerate(self._rule.dims) if position is None)
        if not lacking:
            return values
        shape = [stop - start for start, stop in self._region[:-1]]
        return np.broadcast_to(np.expand_dims(values, lacking), (*shape, values.shape[-1])).copy()

    def _noise_size(self, source: Values) -> Values | None:
        """Return the spread of the kernel noise for each row of a stream reader, [..., 1]; none for other tensors."""
        position = self._spec.noisy_dim
        scale = self._plan.symmetry.noise_scale if self._state == WEIGHT else 0.0
        if position is None or not scale or self._maps[position].size == self._maps[position].old:
            return None
        assert position == len(self._region) - 1 and self._region[position] == (0, self._spec.shape[position])
        square = np.einsum("...i,...i->...", source, source)[..., None] / source.shape[-1]
        size: Values = (scale * np.sqrt(square)).astype(source.dtype)
        return size

    def _kernel_noise(self, size: Values, dtype: np.dtype[Any]) -> Values:
        """Draw noise that sums to zero over the copies of each stream coordinate, so that readers cannot see it."""
        stream, shape = self._maps[-1], region_shape(self._region)
        rows = global_index(self._spec.shape[:-1], self._region[:-1]).reshape(-1)
        key = stream_key(self._plan.symmetry.seed, "noise", self._parameter)

        def draw(length: int) -> Values:
            return uniform_rows(key, rows, length).reshape(*shape[:-1], length).astype(dtype, copy=False)

        z = stream.unseen_noise(draw)
        z *= size
        return z

    def with_fresh(self, grown: Values) -> Values:
        """Give entries that copy nothing their values: initial weights, no first moment, a mean second one."""
        for position, (start, stop) in enumerate(self._region):
            fresh = self._maps[position].fresh[start:stop]
            if not fresh.any():
                continue
            if self._state == WEIGHT:
                values = self._grower.initial(self._parameter, self._region)
            elif self._state == MOMENTS[0]:
                values = np.zeros((1,) * grown.ndim)
            else:
                own = _moment_factor(self._maps[position], self._spec.dims[position].role, self._state)
                values = self._mean_over(position, whole=True) * own.mean()
            mask = fresh.reshape([-1 if p == position else 1 for p in range(grown.ndim)])
            grown = np.where(mask, values, grown).astype(grown.dtype)
        return grown

    def _mean_over(self, position: int, whole: bool = False) -> Values:
        """Return the source's mean over one dim, which has size 1 then, copied and multiplied along those behind it.

        Args:
            position: the dim.
            whole: along those before it, too.
        """
        needed, index = self._needed(skip=position)
        axis = self._rule.dims[position]
        assert axis is not None
        mean: Values = np.expand_dims(self._grower.mean(self._rule.source, self._state, axis, needed), axis)
        index.insert(axis, np.zeros(1, np.int64))
        positions = [p for p in range(len(self._region)) if self._rule.dims[p] is not None]
        for other, place in enumerate(positions):
            if place != position and (whole or other > axis):
                mean = self._multiplied(np.take(mean, index[other], axis=other), other, len(positions), place)
        return mean


def _taken(values: Values, index: NDArray[np.int64], axis: int) -> Values:
    """Gather along a dim; whole rows are fast to copy, neighbours within them are put down one after the other."""
    size = values.shape[axis]
    copies = len(index) // size
    if axis < values.ndim - 1 or not np.array_equal(index, np.arange(size * copies) // max(1, copies)):
        return np.take(values, index, axis=axis)
    if copies == 1:
        return values
    result = np.empty((*values.shape, copies), values.dtype)
    for copy in range(copies):
        result[..., copy] = values
    return result.reshape(*values.shape[:-1], len(index))


def _times(values: Values, factors: Values) -> Values:
    return values if bool((factors == 1).all()) else values * factors


def _moment_factor(axis_map: AxisMap, role: Role, state: str) -> Floats:
    factor: Floats = axis_map.gradient_factor(role) ** _GRADIENT_POWER[state]
    # A copy that nothing reads yet will be read: it needs a second moment.
    return np.where(factor == 0, factor.mean(), factor) if state == MOMENTS[1] else factor


def exact_part(values: Values, begins: Values, ends: Values) -> Values:
    """Return the part from ``begins`` to ``ends`` of bfloat16 values, so that the parts sum to the value exactly.

    Every part is a multiple of the value's last bit and no larger than the value: it needs no more bits.
    """
    mantissa, exponent = np.frexp(values)
    bits = _BFLOAT16_BITS
    whole = np.ldexp(mantissa, bits)  # an integer
    parts: Values = np.ldexp(np.rint(whole * ends) - np.rint(whole * begins), exponent - bits)
    return parts
