"""The growth plan: from two model configurations to a rule for every parameter; metadata only.

An axis map (`megacore.growth.maps`) says, for each axis, which old entry a new one copies and what its values are
multiplied by. What a parameter does along an axis (`megacore.specs.Role`) then says how it changes: what *writes* an
axis is repeated along it, what *reads* it is shared between the copies. What is added to a stream reader and sums to
zero over the copies of each coordinate (kernel noise) changes nothing. By the chain rule gradients change the other
way round; Adam's first moment changes like the gradient, the second like its square, eps like the gradient; and equal
steps of the function need each weight's learning rate multiplied by the weight's own factor.

Sources: Net2Net (Chen et al. 2016) for the maps; LEMON (Wang et al. 2024) for uneven shares; the multipliers are the
maximal-update rule (Yang et al. 2022).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from megacore.axes import AXES, GrowthRule
from megacore.growth.depth import DepthChange, depth_change
from megacore.growth.maps import AxisMap, centred, copied, extended, head_dims, query_heads, shared, weighted
from megacore.growth.target import GROWABLE_KEYS, StreamRule, resized, stream_rule, target_config
from megacore.model_config import ModelConfig
from megacore.models.transformer import declarations
from megacore.specs import Dim, ParamSpec, Role


@dataclass(frozen=True)
class Symmetry:
    """How the copies are made to differ at no cost in exactness.

    Args:
        noise_scale: standard deviation of the kernel noise in stream readers, relative to the root mean square of
            the source row.
        share_scale: relative standard deviation of the shares of heads, neurons and pooler units.
        seed: of both, and of the initial values of what is new.
    """

    noise_scale: float = 0.2
    share_scale: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Rule:
    """How a parameter of the grown model is made.

    Args:
        source: the parameter of the small model that it copies.
        dims: for each of its dims, the source's; ``None`` for one that the source lacks.
        factor: of the weights, beside those of its axes; gradients change by its inverse.
        constant: what the weights are instead.
        is_new: the small model has nothing that does the same work: Adam's first moment starts from zero.
        drawn: weights are initial values; the source only tells how large second moments are.
    """

    source: str
    dims: tuple[int | None, ...]
    factor: float = 1.0
    constant: float | None = None
    is_new: bool = False
    drawn: bool = False


@dataclass(frozen=True)
class GrowthPlan:
    """A map from every checkpoint of ``source`` to one of ``target`` that computes the same."""

    source: ModelConfig
    target: ModelConfig
    symmetry: Symmetry
    depth: DepthChange
    _maps: dict[tuple[str, str], AxisMap] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def specs(self) -> dict[str, ParamSpec]:
        """The declarations of the grown model's parameters."""
        return declarations(self.target)

    @cached_property
    def source_specs(self) -> dict[str, ParamSpec]:
        """The declarations of the small model's parameters."""
        return declarations(self.source)

    @cached_property
    def rules(self) -> dict[str, Rule]:
        """The rule of every parameter of the grown model."""
        return {name: self._rule(name, spec) for name, spec in self.specs.items()}

    def _rule(self, name: str, spec: ParamSpec) -> Rule:
        found, is_new = self.depth.source_of(name)
        if found not in self.source_specs and not self.source.num_experts:  # a dense network becomes experts
            if found.endswith("router_weight"):
                return Rule(found.replace("router_weight", "up_weight"), (None,) * len(spec.dims), drawn=True)
            found = found.replace(".experts.", ".")
            return Rule(found, (None, *range(len(spec.dims) - 1)), constant=self._silence(spec, is_new), is_new=is_new)
        factor = self.depth.factors.get(name, 1.0) * self._tempering(name, spec)
        constant = self.depth.constants.get(name)
        if constant is None:
            constant = self._silence(spec, is_new)
        return Rule(found, tuple(range(len(spec.dims))), factor, constant, is_new or constant is not None)

    def _silence(self, spec: ParamSpec, is_new: bool) -> float | None:
        """Return zero for what lets a new layer write the stream."""
        gate = "scalar" if self.source.residual == "rezero" else "hidden"
        return 0.0 if is_new and any((dim.axis, dim.role) == (gate, Role.WRITE) for dim in spec.dims) else None

    def _tempering(self, name: str, spec: ParamSpec) -> float:
        """Return the factor of the gains of queries and keys, for scores to stay as they are with larger heads."""
        if not re.search(r"\.(query|key)_norm\.", name):
            return 1.0
        scores = self.target.score_scale * self.target.head_dim / (self.source.score_scale * self.source.head_dim)
        return float(scores**-0.5)

    def maps(self, parameter: str) -> tuple[AxisMap, ...]:
        """Return the map of each dim of a parameter."""
        return tuple(self._map(_scope(parameter), dim) for dim in self.specs[parameter].dims)

    def _map(self, scope: str, dim: Dim) -> AxisMap:
        rule = AXES[dim.axis].growth
        local = rule in (GrowthRule.SPLIT, GrowthRule.HEADS, GrowthRule.KEY_HEADS)
        key = (scope if local else "", dim.axis)
        if key not in self._maps:
            self._maps[key] = self._made(rule, scope, dim)
        return self._maps[key]

    def _made(self, rule: GrowthRule, scope: str, dim: Dim) -> AxisMap:
        old, new = self.source.axis_size(dim.axis), dim.size
        if rule is GrowthRule.STREAM:
            return self._stream(old, new)
        if rule is GrowthRule.SPLIT and new != old:
            return self._shared(old, copied(old, new), scope, dim.axis)
        if rule in (GrowthRule.HEADS, GrowthRule.KEY_HEADS):
            return self._heads(rule, scope)
        if rule is GrowthRule.HEAD_DIM and new != old:
            # The square keeps the mean square of normalised queries, or else the scores.
            square = new / old if self.source.qk_norm else self.source.score_scale / self.target.score_scale
            source = head_dims(old, new, self.source.position_embedding)
            counts = np.bincount(source)[source]
            write = np.sqrt(square / counts)
            return AxisMap(old, source, write, 1.0 / (counts * write))
        if rule is GrowthRule.ROWS and new > old:
            return extended(old, new)
        if rule is GrowthRule.EXPERTS and new > old:
            return shared(1, np.zeros(new, np.int64))
        return shared(old, copied(old, new))

    def _stream(self, old: int, new: int) -> AxisMap:
        rule = stream_rule(self.source, new)
        if rule is StreamRule.CENTRED:
            return centred(old, new)
        return (
            weighted(old, copied(old, new), new / old) if rule is StreamRule.WEIGHTED else shared(old, copied(old, new))
        )

    def _shared(self, old: int, source: np.ndarray[Any, np.dtype[np.int64]], scope: str, axis: str) -> AxisMap:
        return shared(old, source, self.symmetry.share_scale, self.symmetry.seed, scope, axis)

    def _heads(self, rule: GrowthRule, scope: str) -> AxisMap:
        old = self.source.num_attention_heads, self.source.num_key_value_heads
        new = self.target.num_attention_heads, self.target.num_key_value_heads
        source = query_heads(old, new)
        assert source is not None, "checked by target_config"
        queries = shared(old[0], source)
        if new != old and scope.endswith("attention"):
            queries = self._shared(old[0], source, scope, "heads")
        if rule is GrowthRule.HEADS:
            return queries
        # A key head's gradient comes through the query heads that read it.
        read = queries.read.reshape(new[1], -1).sum(axis=1) * (old[1] / old[0])
        return AxisMap(old[1], copied(old[1], new[1]), np.ones(new[1]), read)

    def learning_rate_multiplier(self, parameter: str) -> float:
        """Return the mean factor of the weight: what Adam's step must be multiplied by."""
        rule = self.rules[parameter]
        if rule.constant is not None or rule.drawn:
            return 1.0
        dims = zip(self.specs[parameter].dims, self.maps(parameter), strict=True)
        return _rounded(rule.factor * np.prod([np.abs(axis_map.factor(dim.role)).mean() for dim, axis_map in dims]))

    def adam_eps_multiplier(self, parameter: str) -> float:
        """Return the mean factor of the gradient: what Adam's eps must be multiplied by."""
        rule = self.rules[parameter]
        dims = zip(self.specs[parameter].dims, self.maps(parameter), strict=True)
        means = [np.abs(axis_map.gradient_factor(dim.role)).mean() for dim, axis_map in dims]
        return _rounded(np.prod(means) / rule.factor)

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """The configuration keys that grow, before and after."""
        keys = [key for key in GROWABLE_KEYS if getattr(self.source, key) != getattr(self.target, key)]
        return {
            "from": {key: getattr(self.source, key) for key in keys},
            "to": {key: getattr(self.target, key) for key in keys},
        }


def _rounded(multiplier: Any) -> float:
    """Drop the last bits: parameters with equal multipliers share an optimizer group."""
    return float(f"{float(multiplier):.12g}")


def _scope(parameter: str) -> str:
    """Name what a parameter's inner axes are shared within: an attention, a feed-forward network, a head."""
    return re.sub(r"\.experts$", "", parameter.rpartition(".")[0]).removesuffix(".inner_norm")


def make_plan(source: ModelConfig, sizes: Mapping[str, Any], symmetry: Symmetry) -> GrowthPlan:
    """Plan the growth of a model to new sizes.

    Args:
        source: configuration of the small model.
        sizes: the new value of each configuration key that changes.
        symmetry: how copies are made to differ.

    Raises:
        ConfigError: a key is unknown, cannot grow, shrinks, or grows in a way that would change the function; the
            message gives the reason and sizes that are possible.
    """
    target = resized(source, sizes)
    depth = depth_change(source, target)
    return GrowthPlan(source, target_config(source, target, depth.config), symmetry, depth)
