"""A growth plan in words: what grows by which rule, what is exact, and why not where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from megacore.axes import AXES, GrowthRule
from megacore.checkpoint.manifest import WEIGHT
from megacore.growth.maps import AxisMap
from megacore.growth.plan import GrowthPlan, Rule
from megacore.specs import Dim, Role


class Dtypes(NamedTuple):
    """In which type a state of a parameter of the source is stored, and one of the grown model will be."""

    source: Callable[[str, str], str]
    written: Callable[[str, str], str]


_BITS = {"bfloat16": 8, "float32": 24, "float64": 53}
"""Of a number's mantissa."""


class Note(NamedTuple):
    """Something that growing does not keep exactly.

    Args:
        about: the function that is computed, Adam's next steps, or training with it.
        name: stands for it in a table.
        reason: why it is impossible, or not wanted.
    """

    about: Literal["function", "optimizer", "training"]
    name: str
    reason: str


_NEW_LAYER = Note("optimizer", "new layer", "a new layer computes nothing yet: its first moments start from zero")
_NEW_ROWS = Note(
    "optimizer", "new rows", "rows that copy nothing have zero first moments, and the mean of the others' second ones"
)
_NEW_ROUTER = Note("optimizer", "new router", "the small model has no router: its first moments start from zero")
_EXPERTS = Note(
    "optimizer",
    "experts share tokens",
    "each expert sees a part of the tokens, so its gradients are not those of the network that it copies",
)
_NOISE = Note(
    "optimizer",
    "noise",
    "kernel noise lets the gradients of the copies in the stream differ, around the small model's: wanted, or they "
    "would learn the same for ever (--symmetry uneven or none is without)",
)
_SHARES = Note(
    "optimizer",
    "uneven shares",
    "a learning-rate multiplier is the mean over an axis whose copies have different shares: wanted, or they would "
    "learn the same for ever (--symmetry none is without)",
)
_SHARED_BIASES = Note(
    "optimizer",
    "shares of many layers",
    "the relative positions' biases serve all layers of a stack, whose heads have uneven shares of their own: wanted, "
    "but the biases' moments follow even ones (--symmetry none is without)",
)
_RATIO = Note(
    "optimizer",
    "uneven copies",
    "a ratio of sizes that is no integer gives copies different factors, and a learning-rate multiplier is their mean: "
    "Adam's next steps are not the small model's",
)
_CENTRED = Note(
    "optimizer",
    "stream's mean",
    "layer norms drop the stream's mean; what writes the stream (not what reads it) has gradients that share that part "
    "in another way",
)
_KEY_GROUPS = Note(
    "optimizer",
    "smaller key groups",
    "a key head's gradient is a sum over its query heads, and each copy now serves only some of them",
)
_RESET = Note("optimizer", "starts anew", "the moments are left out (--optimizer reset)")
_NO_MOMENTS = Note("optimizer", "starts anew", "the source has no moments")


def parameter_notes(plan: GrowthPlan, parameter: str, dtypes: Dtypes, moments: bool) -> tuple[Note, ...]:
    """Return what of a parameter is not exact.

    Args:
        plan: of the growth.
        parameter: of the grown model.
        dtypes: of what is read and written.
        moments: whether Adam's moments are kept.
    """
    notes = [_rounded(dtypes.written(parameter, WEIGHT))] if _is_rounded(plan, parameter, dtypes) else []
    if moments:
        notes += _moment_notes(plan, parameter)
    return tuple(dict.fromkeys(notes))


def _moment_notes(plan: GrowthPlan, parameter: str) -> Iterator[Note]:
    rule, spec, maps = plan.rules[parameter], plan.specs[parameter], plan.maps(parameter)
    if rule.drawn:
        yield _NEW_ROUTER
        return
    if rule.is_new:
        yield _NEW_LAYER
    for dim, axis_map in zip(spec.dims, maps, strict=True):
        if axis_map.is_identity:
            continue
        growth = AXES[dim.axis].growth
        stream = growth is GrowthRule.STREAM
        if axis_map.fresh.any():
            yield _NEW_ROWS
            continue
        if growth is GrowthRule.EXPERTS:
            yield _EXPERTS
        if growth is GrowthRule.KEY_HEADS and _groups_shrink(plan):
            yield _KEY_GROUPS
        if plan.symmetry.share_scale and growth is GrowthRule.HEADS and spec.dims[0].axis == "relative_buckets":
            yield _SHARED_BIASES
        if dim.role is not Role.READ and stream and plan.symmetry.noise_scale:
            yield _NOISE
        if dim.role is not Role.READ and axis_map.centre is not None:
            yield _CENTRED
        if not _is_constant(axis_map.factor(dim.role)) or not _is_constant(axis_map.gradient_factor(dim.role)):
            counts = np.bincount(axis_map.source)
            yield _SHARES if _is_constant(counts) and not stream else _RATIO


def notes(plan: GrowthPlan, dtypes: Dtypes, keep_optimizer: bool, moments: bool) -> tuple[Note, ...]:
    """Return all that a growth does not keep exactly, each once.

    Args:
        plan: of the growth.
        dtypes: of what is read and written.
        keep_optimizer: whether Adam's moments were asked for.
        moments: whether they are kept.
    """
    source, target = plan.source, plan.target
    found: list[Note] = []
    if target.num_experts:
        reason = "DeepSpeed computes the experts' weights in float32: the function is exact to about 1e-6"
        found.append(Note("function", "gates in float32", reason))
    if target.vocab_size != source.vocab_size:
        new = target.vocab_size - source.vocab_size
        reason = (
            f"the {source.vocab_size:,} old tokens keep their logits, but the {new:,} new ones take a part of the "
            "probability"
        )
        found.append(Note("function", "new tokens", reason))
    for parameter in plan.specs:
        found += parameter_notes(plan, parameter, dtypes, moments)
    if not moments:
        found.append(_NO_MOMENTS if keep_optimizer else _RESET)
    for key in ("hidden_dropout", "attention_dropout"):
        if getattr(source, key):
            reason = (
                f"{key}={getattr(source, key):g} draws other masks in the larger model: only evaluation is the same"
            )
            found.append(Note("training", "dropout", reason))
    return tuple(dict.fromkeys(found))


def exactness(found: Sequence[Note], about: str) -> str:
    """Say in a few words how exactly the function, or the optimizer, is kept."""
    names = dict.fromkeys(note.name for note in found if note.about == about)
    if _RESET.name in names:
        return _RESET.name
    return f"exact but for {', '.join(names)}" if names else "exact"


def rounded_to(plan: GrowthPlan, dtypes: Dtypes) -> str | None:
    """Return the coarsest type to which weights are rounded; ``None`` if all are stored exactly."""
    found = {dtypes.written(name, WEIGHT) for name in plan.specs if _is_rounded(plan, name, dtypes)}
    return min(found, key=_BITS.__getitem__, default=None)


def _is_rounded(plan: GrowthPlan, parameter: str, dtypes: Dtypes) -> bool:
    """Tell whether weights are made that the type cannot hold; halves, quarters and exact parts it can."""
    rule, spec = plan.rules[parameter], plan.specs[parameter]
    if rule.drawn or rule.constant is not None:
        return False
    dtype = dtypes.written(parameter, WEIGHT)
    if _BITS[dtype] < _BITS[dtypes.source(rule.source, WEIGHT)] or not _is_power_of_two(rule.factor):
        return True
    for position, (dim, axis_map) in enumerate(zip(spec.dims, plan.maps(parameter), strict=True)):
        if position == spec.noisy_dim and plan.symmetry.noise_scale and axis_map.size != axis_map.old:
            return True
        if dim.role is Role.READ and dtype == "bfloat16" and (axis_map.write == 1).all():
            continue  # split so that the parts sum up exactly
        if not _is_power_of_two(axis_map.factor(dim.role)) or axis_map.centre is not None:
            return True
    return False


def _rounded(dtype: str) -> Note:
    size = {"bfloat16": "1e-2", "float32": "1e-7", "float64": "1e-16"}[dtype]
    reason = f"what {dtype} cannot hold (noise, factors that are no powers of two) is rounded: about {size}"
    return Note("function", f"rounding to {dtype}", reason)


def steps(plan: GrowthPlan, parameter: str) -> tuple[str, ...]:
    """Say by which rule a parameter is made, axis by axis."""
    rule, spec = plan.rules[parameter], plan.specs[parameter]
    if rule.drawn:
        return ("initial values",)
    words = [f"{rule.constant:g} everywhere: the layer adds nothing"] if rule.constant is not None else []
    if rule.factor != 1.0 and rule.constant is None:
        words.append(f"all ×{rule.factor:.8g}")
    for position, (dim, axis_map) in enumerate(zip(spec.dims, plan.maps(parameter), strict=True)):
        old = _old(plan, rule, position)
        if old is None:
            words.append(f"{dim.axis} {dim.size}: copies")
        elif not axis_map.is_identity and rule.constant is None:
            noise = position == spec.noisy_dim and plan.symmetry.noise_scale and axis_map.size != axis_map.old
            words.append(f"{dim.axis} {old:,}→{dim.size:,}: {_how(dim, axis_map)}{' + noise' if noise else ''}")
    return tuple(words)


def _how(dim: Dim, axis_map: AxisMap) -> str:
    if axis_map.fresh.any():
        return f"{int(axis_map.fresh.sum()):,} new"
    factor = axis_map.factor(dim.role)
    verb = "shared" if dim.role is Role.READ else "repeated"
    if axis_map.centre is not None and dim.role is Role.WRITE:
        verb = "repeated about the mean"
    if _is_constant(factor):
        return verb if factor[0] == 1.0 else f"{verb} ×{factor[0]:.3g}"
    return f"{verb} unevenly"


def _old(plan: GrowthPlan, rule: Rule, position: int) -> int | None:
    found = rule.dims[position]
    return None if found is None else plan.source_specs[rule.source].shape[found]


def _groups_shrink(plan: GrowthPlan) -> bool:
    source, target = plan.source, plan.target
    before, after = (model.num_attention_heads // model.num_key_value_heads for model in (source, target))
    return after < before


def _is_constant(values: np.ndarray[Any, Any]) -> bool:
    return bool(np.allclose(values, values[0], rtol=1e-12, atol=0.0))


def _is_power_of_two(values: Any) -> bool:
    return bool((np.frexp(np.abs(values))[0] == 0.5).all())
