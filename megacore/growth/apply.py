"""Apply a growth plan to a box of one tensor: gather, share, add noise."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megacore.checkpoint.manifest import MOMENTS, WEIGHT
from megacore.checkpoint.reader import CheckpointReader
from megacore.growth.plan import GrowthPlan
from megacore.random import standard_normal, stream_key
from megacore.specs import Region, Role, global_index

# How often the gradient's factor enters: exp_avg follows the gradient, exp_avg_sq its square.
_GRADIENT_POWER = dict(zip(MOMENTS, (1, 2), strict=True))


def grow_box(
    reader: CheckpointReader, plan: GrowthPlan, parameter: str, state: str, region: Region
) -> NDArray[np.float64]:
    """Compute a box of a grown tensor, reading only the source entries that it copies.

    Args:
        reader: the small model's checkpoint.
        plan: of the growth.
        parameter: name of the parameter.
        state: ``weight``, ``exp_avg`` or ``exp_avg_sq``.
        region: the box, in the grown tensor's indices; for a noisy reader it must span the whole read dim.
    """
    spec, maps = plan.specs[parameter], plan.maps(parameter)
    sources = [axis_map.source[start:stop] for axis_map, (start, stop) in zip(maps, region, strict=True)]
    # Sources are non-decreasing, so what a box needs is a box too.
    needed = tuple((int(source[0]), int(source[-1]) + 1) for source in sources)
    values = reader.read(parameter, state, needed).astype(np.float64)
    grown: NDArray[np.float64] = values[np.ix_(*(source - source[0] for source in sources))]
    noise = _kernel_noise(plan, parameter, region, grown) if state == WEIGHT else None
    shared_role, power = (Role.READ, 1) if state == WEIGHT else (Role.WRITE, _GRADIENT_POWER[state])
    for position, (dim, axis_map) in enumerate(zip(spec.dims, maps, strict=True)):
        if dim.role is shared_role:
            start, stop = region[position]
            shape = [1] * len(maps)
            shape[position] = stop - start
            grown *= (axis_map.share[start:stop] ** power).reshape(shape)
    return grown if noise is None else grown + noise


def _kernel_noise(
    plan: GrowthPlan, parameter: str, region: Region, repeated: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """Draw noise that sums to zero over the copies of each stream coordinate, so that readers cannot see it."""
    spec = plan.specs[parameter]
    position = spec.noisy_dim
    if position is None or not plan.symmetry.noise_scale:
        return None
    axis_map = plan.maps(parameter)[position]
    if axis_map.ratio == 1.0:
        return None
    assert position == len(spec.dims) - 1 and region[position] == (0, spec.shape[position])
    size = plan.symmetry.noise_scale * np.sqrt(np.mean(repeated**2, axis=position, keepdims=True))
    z = standard_normal(stream_key(plan.symmetry.seed, "noise", parameter), global_index(spec.shape, region))
    noise: NDArray[np.float64] = size * (z - axis_map.group_mean(z))
    return noise
