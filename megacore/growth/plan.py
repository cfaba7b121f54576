"""The growth plan: from two model configurations to a rule for every parameter; metadata only.

The mathematics, for post-LN BERT. A grown stream repeats each coordinate k times; LayerNorm commutes with that
(mean and variance are unchanged), so every activation of the large model is a repetition of the small one's if

- what *writes* an axis is repeated along it,
- what *reads* an axis is multiplied by shares that sum to one over the copies of an entry, and
- what is added to a stream reader sums to zero over the copies of each coordinate (kernel noise).

Hidden units that lie between two linear maps (heads, FFN neurons, the pooler) may have any number of copies with
any shares. By the chain rule gradients change the other way round: written axes by the share, read axes not at
all; Adam's first moment changes like the gradient, the second like its square, eps like the gradient; and equal
steps of the function need each weight's learning rate multiplied by its share (Net2Net, Chen et al. 2016, for the
maps; LEMON, Wang et al. 2024, for uneven shares; the multipliers are the maximal-update rule, Yang et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megacore.axes import AXES, GROWABLE_KEYS, GrowthRule
from megacore.errors import ConfigError
from megacore.growth.maps import AxisMap, even_map, uneven_map
from megacore.model_config import ModelConfig
from megacore.models.transformer import declarations
from megacore.settings import unknown_key, validated
from megacore.specs import Dim, ParamSpec, Role


@dataclass(frozen=True)
class Symmetry:
    """How the copies are made to differ at no cost in exactness.

    Args:
        noise_scale: standard deviation of the kernel noise in stream readers, relative to the root mean square of
            the source row.
        share_scale: relative standard deviation of the shares of heads, neurons and pooler units.
        seed: of both.
    """

    noise_scale: float = 0.2
    share_scale: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class GrowthPlan:
    """A lossless map from every checkpoint of ``source`` to one of ``target``."""

    source: ModelConfig
    target: ModelConfig
    symmetry: Symmetry

    @cached_property
    def specs(self) -> dict[str, ParamSpec]:
        """The declarations of the grown model's parameters."""
        return declarations(self.target)

    def maps(self, parameter: str) -> tuple[AxisMap, ...]:
        """Return the map of each dim of a parameter."""
        return tuple(self._map(_scope(parameter), dim) for dim in self.specs[parameter].dims)

    def _map(self, scope: str, dim: Dim) -> AxisMap:
        axis = AXES[dim.axis]
        old = self.source.axis_size(dim.axis)
        if axis.growth is GrowthRule.SPLIT and dim.size != old:
            # Keys and values are made for the heads that read them: one map for both.
            name = "heads" if dim.axis == "kv_heads" else dim.axis
            return uneven_map(old, dim.size, self.symmetry.share_scale, self.symmetry.seed, scope, name)
        return even_map(old, dim.size)

    def learning_rate_multiplier(self, parameter: str) -> float:
        """Return the mean factor of the weight: what Adam's step must be multiplied by."""
        return self._shrinkage(parameter, Role.READ)

    def adam_eps_multiplier(self, parameter: str) -> float:
        """Return the mean factor of the gradient: what Adam's eps must be multiplied by."""
        return self._shrinkage(parameter, Role.WRITE)

    def _shrinkage(self, parameter: str, role: Role) -> float:
        dims = (dim for dim in self.specs[parameter].dims if dim.role is role)
        return math.prod(self.source.axis_size(dim.axis) / dim.size for dim in dims)

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """The configuration keys that grow, before and after."""
        keys = [key for key in GROWABLE_KEYS if getattr(self.source, key) != getattr(self.target, key)]
        return {
            "from": {key: getattr(self.source, key) for key in keys},
            "to": {key: getattr(self.target, key) for key in keys},
        }


def _scope(parameter: str) -> str:
    """Name what a parameter's inner axes are shared within: its layer, or its head."""
    parts = parameter.split(".")
    return ".".join(parts[:2]) if parts[0] == "layers" else parts[0]


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
    for key in sizes:
        if key not in ModelConfig.model_fields:
            raise unknown_key(key, GROWABLE_KEYS)
        if key not in GROWABLE_KEYS and sizes[key] != getattr(source, key):
            raise ConfigError(f"{key} cannot be changed by growing; what can: {', '.join(GROWABLE_KEYS)}")
    _check_family(source)
    values = source.model_dump() | dict(sizes)
    del values["head_dim"], values["num_key_value_heads"]  # follow from the others
    if "num_attention_heads" not in sizes and not values["hidden_size"] % source.head_dim:
        _check_head_dim(source, values["hidden_size"], source.num_attention_heads)
    target = validated(ModelConfig, values)
    for key in GROWABLE_KEYS:
        old, new = getattr(source, key), getattr(target, key)
        if new < old:
            raise ConfigError(f"{key}={new} is smaller than the source's {old}; growing never shrinks")
    for axis in AXES.values():
        old, new = getattr(source, axis.key), getattr(target, axis.key)
        if axis.growth is GrowthRule.STREAM and new % old:
            raise ConfigError(
                f"{axis.key}={new} is not a multiple of the source's {old}: after a post-LN norm only whole copies of "
                f"the stream keep the function; nearest that do: {max(1, new // old) * old}, {(new // old + 1) * old}"
            )
    _check_head_dim(source, target.hidden_size, target.num_attention_heads)
    return GrowthPlan(source, target, symmetry)


def _check_family(source: ModelConfig) -> None:
    """Refuse models for which the rules of this module are not the whole truth."""
    bert = {"architecture": "encoder", "residual": "post_norm", "norm": "layer_norm", "position_embedding": "learned"}
    wanted = bert | {"lm_transform": True, "num_experts": 0, "gated_mlp": False, "norm_affine": True}
    wanted |= {"num_key_value_heads": source.num_attention_heads, "qk_norm": False, "initialization": "normal"}
    for key, value in wanted.items():
        if getattr(source, key) != value:
            raise ConfigError(
                f"a model with {key}={getattr(source, key)} cannot be grown yet; BERT ({key}={value}) can"
            )


def _check_head_dim(source: ModelConfig, hidden_size: int, num_attention_heads: int) -> None:
    if hidden_size // num_attention_heads != source.head_dim:
        raise ConfigError(
            f"hidden_size={hidden_size} with num_attention_heads={num_attention_heads} would change the head size from "
            f"{source.head_dim} to {hidden_size // num_attention_heads}, which cannot grow; "
            f"give num_attention_heads={hidden_size // source.head_dim}"
        )
