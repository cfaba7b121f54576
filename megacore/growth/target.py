"""The configuration of a grown model: what may grow, what follows from it, and what is impossible, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from megacore.axes import AXES, GrowthRule
from megacore.errors import ConfigError
from megacore.growth.depth import STACKS
from megacore.growth.maps import head_dims, query_heads
from megacore.model_config import ModelConfig
from megacore.settings import unknown_key, validated

GROWABLE_KEYS: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *(axis.key for axis in AXES.values() if axis.growth is not GrowthRule.FIXED),
            "num_experts_per_token",
            *STACKS.values(),
        )
    )
)


_MOST_PARAMETERS = 1e13


class StreamRule(Enum):
    """How the residual stream is widened."""

    REPEATED = "repeated"
    """Coordinates are repeated."""
    WEIGHTED = "weighted"
    """Copies are scaled so that the mean square stays: any ratio, for RMS norms and for none."""
    CENTRED = "centred"
    """Copies are scaled about the mean so that mean and variance stay: any ratio, where only norms read the stream."""


def stream_rule(source: ModelConfig, hidden_size: int) -> StreamRule:
    """Return how a model's stream is widened; where it is repeated unevenly, its norms must weigh the copies."""
    if hidden_size % source.hidden_size == 0 or source.norm_copies or source.lm_transform:
        return StreamRule.REPEATED
    normed = source.embedding_norm or source.residual != "rezero"
    if source.norm == "rms_norm" or not normed:
        return StreamRule.WEIGHTED
    return StreamRule.CENTRED if source.norms_inputs and not source.embedding_norm else StreamRule.REPEATED


def resized(source: ModelConfig, sizes: Mapping[str, Any]) -> ModelConfig:
    """Return a model's configuration with new sizes, and nothing yet of what they make necessary.

    Raises:
        ConfigError: see `megacore.growth.plan.make_plan`.
    """
    for key in sizes:
        if key not in ModelConfig.model_fields:
            raise unknown_key(key, GROWABLE_KEYS)
        if key not in GROWABLE_KEYS and sizes[key] != getattr(source, key):
            raise ConfigError(
                f"{key} cannot be changed by growing (from {getattr(source, key)} to {sizes[key]}); what can: "
                f"{', '.join(GROWABLE_KEYS)}"
            )
    values = source.model_dump() | dict(sizes) | {"norm_copies": (), "rope_frequencies": ()}
    if source.num_key_value_heads == source.num_attention_heads and "num_key_value_heads" not in sizes:
        values["num_key_value_heads"] = values["num_attention_heads"]
    target = validated(ModelConfig, values)
    for key in GROWABLE_KEYS:
        old, new = getattr(source, key), getattr(target, key)
        if new < old:
            raise ConfigError(f"{key}={new} is smaller than the source's {old}; growing never shrinks")
    _check_size(target)
    _check(source, target)
    return target


def target_config(source: ModelConfig, target: ModelConfig, depth: Mapping[str, Any]) -> ModelConfig:
    """Return the configuration of the grown model.

    Args:
        source: configuration of the small model.
        target: the same, resized.
        depth: what changes because layers are added.
    """
    return validated(ModelConfig, target.model_dump() | _derived(source, target) | dict(depth))


def _derived(source: ModelConfig, target: ModelConfig) -> dict[str, Any]:
    """Return the values that keep the function."""
    values: dict[str, Any] = {"norm_copies": source.norm_copies, "rope_frequencies": source.rope_frequencies}
    old, new = source.hidden_size, target.hidden_size
    uneven = new % old and stream_rule(source, new) is StreamRule.REPEATED
    if new != old and (source.norm_copies or uneven):
        values["norm_copies"] = (*source.norm_copies, old)
    if new != old and source.tie_word_embeddings and not source.has_output_gain and not values["norm_copies"]:
        values["logit_multiplier"] = source.logit_multiplier * old / new
    if target.head_dim != source.head_dim and source.position_embedding.startswith("rotary"):
        pairs = head_dims(source.head_dim // 2, target.head_dim // 2, "none")
        values["rope_frequencies"] = tuple(_frequencies(source)[pair] for pair in pairs)
    return values


def _frequencies(config: ModelConfig) -> tuple[float, ...]:
    dim = config.head_dim
    return config.rope_frequencies or tuple(config.rope_theta ** (-pair / dim) for pair in range(0, dim, 2))


def _check_size(target: ModelConfig) -> None:
    """Refuse a slip of the finger, before anything is made of the sizes."""
    inner = target.num_attention_heads * target.head_dim + target.intermediate_size * max(1, target.num_experts)
    layers = target.num_hidden_layers + target.num_decoder_layers
    count = target.hidden_size * (target.vocab_size + 2 * layers * inner)
    if count > _MOST_PARAMETERS:
        raise ConfigError(
            f"hidden_size={target.hidden_size}, intermediate_size={target.intermediate_size}, "
            f"num_hidden_layers={target.num_hidden_layers}, vocab_size={target.vocab_size}: about {count:.0e} "
            "parameters; give smaller sizes"
        )


def _check(source: ModelConfig, target: ModelConfig) -> None:
    """Refuse what would change the function."""
    heads, keys = source.num_attention_heads, source.num_key_value_heads
    new_heads, new_keys = target.num_attention_heads, target.num_key_value_heads
    if query_heads((heads, keys), (new_heads, new_keys)) is None:
        raise ConfigError(
            f"num_key_value_heads={new_keys} with num_attention_heads={new_heads} leaves {new_heads // new_keys} query "
            f"heads to a key head that now serves {heads // keys}, and some key heads have no copy that could serve "
            f"the rest; use a multiple of {keys}, or num_attention_heads={new_keys * (heads // keys)}"
        )
    if source.position_embedding.startswith("rotary") and target.head_dim % 2:
        raise ConfigError(f"head_dim={target.head_dim} is odd; rotary positions turn pairs")
    if source.residual == "sub_norm":
        _check_inner_norms(source, target)
    if (target.num_experts, target.num_experts_per_token) != (source.num_experts, source.num_experts_per_token):
        _check_experts(source, target)
    if target.type_vocab_size and not source.type_vocab_size:
        raise ConfigError(f"type_vocab_size={target.type_vocab_size}: the source has no table of segments to grow")


def _check_inner_norms(source: ModelConfig, target: ModelConfig) -> None:
    if target.head_dim != source.head_dim:
        raise ConfigError(
            f"head_dim={target.head_dim}: residual=sub_norm normalises the heads' output, which larger heads would "
            f"scale; keep {source.head_dim} and give num_attention_heads"
        )
    keys = {"num_attention_heads": "num_key_value_heads", "intermediate_size": "intermediate_size"}
    for key, grown_with in keys.items():
        old, new = getattr(source, key), getattr(target, key)
        if new % old or getattr(target, grown_with) % getattr(source, grown_with):
            raise ConfigError(
                f"{key}={new}: residual=sub_norm normalises these units, so each needs as many copies; nearest that "
                f"do: {_multiples(old, new)}" + (f", with a multiple of {grown_with}" if grown_with != key else "")
            )
    heads, key_heads = target.num_attention_heads, target.num_key_value_heads
    old_group, group = source.num_attention_heads // source.num_key_value_heads, heads // key_heads
    if group > old_group and group % old_group:  # heads are a multiple, but not those of each copy of a key head
        raise ConfigError(
            f"num_attention_heads={heads} with num_key_value_heads={key_heads}: residual=sub_norm normalises the "
            f"heads' output, so each needs as many copies, but {group} of them for each key head cannot be as many "
            f"copies of {old_group}; nearest that can: {_multiples(key_heads * old_group, heads)}"
        )


def _check_experts(source: ModelConfig, target: ModelConfig) -> None:
    if source.num_experts and target.num_experts_per_token != source.num_experts_per_token:
        raise ConfigError(
            f"num_experts_per_token={target.num_experts_per_token}: more experts for a token change what it gets; keep "
            f"{source.num_experts_per_token}"
        )
    if source.num_experts:
        raise ConfigError(
            f"num_experts={target.num_experts}: the best experts of a token would be copies of one of the "
            f"{source.num_experts}, and the others left out; only a dense model becomes a mixture"
        )
    if target.num_experts and target.num_experts_per_token == 1:
        raise ConfigError(
            "num_experts_per_token=1 multiplies an expert's output by its probability, which is below one; with 2 or "
            "more the weights sum to one and the function is kept"
        )


def _multiples(old: int, new: int) -> str:
    return ", ".join(str(n * old) for n in sorted({max(1, new // old), -(-new // old)}))
