"""Compute boxes of grown tensors: gather, multiply, add noise; reading only the source entries that they copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megacore.checkpoint.manifest import MOMENTS, WEIGHT, Manifest
from megacore.growth.maps import AxisMap, Floats
from megacore.growth.plan import GrowthPlan, Rule
from megacore.random import standard_normal, stream_key
from megacore.specs import Region, Role, global_index, region_shape

# How often the gradient's factor enters: exp_avg follows the gradient, exp_avg_sq its square.
_GRADIENT_POWER = dict(zip(MOMENTS, (1, 2), strict=True))
_BFLOAT16_BITS = 8
"""Of a bfloat16 number, the leading one included."""
_MEAN_ENTRIES = 1 << 22
"""Entries that are read at a time to take a mean."""


class Source(Protocol):
    """A checkpoint to grow."""

    manifest: Manifest

    def read(self, parameter: str, state: str, region: Region | None = None) -> NDArray[Any]:
        """Return a box of a parameter's state; all of it by default."""

    def dtype(self, parameter: str, state: str) -> str:
        """Return the type in which it is stored."""


class Grower:
    """Makes boxes of the grown model's tensors.

    Args:
        source: the small model's checkpoint.
        plan: of the growth.
        dtypes: of the weights that are written; parts of bfloat16 weights are made to sum up exactly.
    """

    def __init__(self, source: Source, plan: GrowthPlan, dtype: str | None = None) -> None:
        self._source, self._plan, self._dtype = source, plan, dtype
        self._means: dict[tuple[str, str, int | None, Region], Floats] = {}

    def box(self, parameter: str, state: str, region: Region) -> Floats:
        """Compute a box of a grown tensor.

        Args:
            parameter: name of the parameter in the grown model.
            state: ``weight``, ``exp_avg`` or ``exp_avg_sq``.
            region: the box, in the grown tensor's indices; it must span the stream where noise is added.
        """
        plan = self._plan
        rule, spec, maps = plan.rules[parameter], plan.specs[parameter], plan.maps(parameter)
        shape = region_shape(region)
        if state == WEIGHT and rule.constant is not None:
            return np.full(shape, rule.constant)
        if state == MOMENTS[0] and (rule.is_new or rule.drawn):
            return np.zeros(shape)
        if rule.drawn:
            if state == WEIGHT:
                return self._initial(parameter, region)
            return np.full(shape, self._mean(rule.source, state, None, ()).item())
        grown = self._gathered(rule, state, maps, region)
        noise = self._kernel_noise(parameter, region, grown) if state == WEIGHT else None
        for position, (dim, axis_map) in enumerate(zip(spec.dims, maps, strict=True)):
            start, stop = region[position]
            view = [-1 if p == position else 1 for p in range(len(maps))]
            if state != WEIGHT:
                grown *= _moment_factor(axis_map, dim.role, state)[start:stop].reshape(view)
            elif dim.role is Role.WRITE and axis_map.centre is not None:
                write = axis_map.write[start:stop].reshape(view)
                grown = write * grown + (axis_map.centre - write) * self._mean_over(rule, state, maps, region, position)
            elif dim.role is Role.READ and self._splits_exactly(parameter, axis_map):
                begins, ends = (bounds[start:stop].reshape(view) for bounds in axis_map.shares)
                grown = exact_part(grown, begins, ends)
            else:
                grown *= axis_map.factor(dim.role)[start:stop].reshape(view)
        if noise is not None:
            grown += noise
        grown *= rule.factor if state == WEIGHT else rule.factor ** -_GRADIENT_POWER[state]
        return self._with_fresh(parameter, rule, state, maps, region, grown)

    def _gathered(self, rule: Rule, state: str, maps: Sequence[AxisMap], region: Region) -> Floats:
        """Read what a box copies, and put every copy at its place."""
        bounds: dict[int, tuple[int, int]] = {}
        index: dict[int, NDArray[np.int64]] = {}
        for position, (start, stop) in zip(rule.dims, region, strict=True):
            if position is None:
                continue
            source = maps[rule.dims.index(position)].source[start:stop]
            known = source[source >= 0]
            first, last = (int(known.min()), int(known.max())) if len(known) else (0, 0)
            bounds[position] = first, last + 1
            index[position] = np.clip(source, first, last) - first
        values = self._source.read(rule.source, state, tuple(bounds[p] for p in sorted(bounds))).astype(np.float64)
        grown: Floats = values[np.ix_(*(index[p] for p in sorted(index)))]
        added = tuple(p for p, position in enumerate(rule.dims) if position is None)
        if added:
            grown = np.broadcast_to(np.expand_dims(grown, added), region_shape(region)).copy()
        return grown

    def _splits_exactly(self, parameter: str, axis_map: AxisMap) -> bool:
        """Tell whether shares must be rounded so that they sum up exactly: halves, quarters do of themselves."""
        dtype = self._dtype or self._source.dtype(self._plan.rules[parameter].source, WEIGHT)
        mantissas = np.frexp(axis_map.read)[0]
        return dtype == "bfloat16" and bool((axis_map.write == 1).all()) and not bool((mantissas == 0.5).all())

    def _kernel_noise(self, parameter: str, region: Region, repeated: Floats) -> Floats | None:
        """Draw noise that sums to zero over the copies of each stream coordinate, so that readers cannot see it."""
        plan, spec = self._plan, self._plan.specs[parameter]
        position = spec.noisy_dim
        if position is None or not plan.symmetry.noise_scale:
            return None
        stream = plan.maps(parameter)[position]
        if stream.size == stream.old:
            return None
        assert position == len(spec.dims) - 1 and region[position] == (0, spec.shape[position])
        size = plan.symmetry.noise_scale * np.sqrt(np.mean(repeated**2, axis=position, keepdims=True))
        z = standard_normal(stream_key(plan.symmetry.seed, "noise", parameter), global_index(spec.shape, region))
        visible = stream.over_group(z * stream.write) / stream.over_group(stream.write**2)
        noise: Floats = size * (z - stream.write * visible)
        return noise

    def _with_fresh(
        self, parameter: str, rule: Rule, state: str, maps: Sequence[AxisMap], region: Region, grown: Floats
    ) -> Floats:
        """Give rows that copy nothing their values: initial weights, no first moment, a mean second one."""
        for position, (axis_map, (start, stop)) in enumerate(zip(maps, region, strict=True)):
            fresh = axis_map.fresh[start:stop]
            if not fresh.any():
                continue
            if state == WEIGHT:
                values = self._initial(parameter, region)
            elif state == MOMENTS[0]:
                values = np.zeros_like(grown)
            else:
                factors = [
                    _moment_factor(m, d.role, state)[a:b].reshape([-1 if p == q else 1 for q in range(len(maps))])
                    for p, (d, m, (a, b)) in enumerate(zip(self._plan.specs[parameter].dims, maps, region, strict=True))
                ]
                values = self._mean_over(rule, state, maps, region, position) * math.prod(factors, start=np.ones(1))
            mask = fresh.reshape([-1 if p == position else 1 for p in range(len(maps))])
            grown = np.where(mask, values, grown)
        return grown

    def _initial(self, parameter: str, region: Region) -> Floats:
        plan = self._plan
        values = plan.specs[parameter].initial_values(parameter, plan.symmetry.seed, plan.target, region)
        return values.astype(np.float64)

    def _mean_over(self, rule: Rule, state: str, maps: Sequence[AxisMap], region: Region, position: int) -> Floats:
        """Return the source's mean over one dim, with the box's copies along the others; the dim has size 1."""
        over = rule.dims[position]
        needed, index = [], []
        for p, (start, stop) in enumerate(region):
            if rule.dims[p] is None or p == position:
                continue
            source = maps[p].source[start:stop].clip(0)
            first, last = int(source.min()), int(source.max()) + 1
            needed.append((first, last))
            index.append(source - first)
        mean = self._mean(rule.source, state, over, tuple(needed))
        grown: Floats = mean[np.ix_(*index)] if index else mean
        lacking = tuple(p for p in range(len(region)) if p == position or rule.dims[p] is None)
        return np.expand_dims(grown, lacking)

    def _mean(self, parameter: str, state: str, over: int | None, others: Region) -> Floats:
        """Return a source tensor's mean over one dim, or over all (a [1] array); kept, for the next box."""
        key = parameter, state, over, others
        if key not in self._means:
            shape = self._plan.source_specs[parameter].shape
            if over is None:
                region: Region = tuple((0, size) for size in shape)
                cut = 0
            else:
                cut, rest = over, iter(others)
                region = tuple((0, shape[p]) if p == over else next(rest) for p in range(len(shape)))
            sizes = region_shape(region)
            step = max(1, _MEAN_ENTRIES * sizes[cut] // max(1, math.prod(sizes)))
            total: Any = 0.0
            for start in range(0, sizes[cut], step):
                block = (*region[:cut], (start, min(start + step, sizes[cut])), *region[cut + 1 :])
                values = self._source.read(parameter, state, block).astype(np.float64)
                total = total + (values.sum() if over is None else values.sum(axis=over))
            count = math.prod(sizes) if over is None else sizes[over]
            self._means[key] = np.atleast_1d(np.asarray(total / count))
        return self._means[key]


def _moment_factor(axis_map: AxisMap, role: Role, state: str) -> Floats:
    factor: Floats = axis_map.gradient_factor(role) ** _GRADIENT_POWER[state]
    # A copy that nothing reads yet will be read: it needs a second moment.
    return np.where(factor == 0, factor.mean(), factor) if state == MOMENTS[1] else factor


def exact_part(values: Floats, begins: Floats, ends: Floats) -> Floats:
    """Return the part from ``begins`` to ``ends`` of bfloat16 values, so that the parts sum to the value exactly.

    Every part is a multiple of the value's last bit and no larger than the value: it needs no more bits.
    """
    mantissa, exponent = np.frexp(values)
    bits = _BFLOAT16_BITS
    whole = np.ldexp(mantissa, bits)  # an integer
    parts: Floats = np.ldexp(np.rint(whole * ends) - np.rint(whole * begins), exponent - bits)
    return parts
