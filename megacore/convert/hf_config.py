"""Between Hugging Face's ``config.json`` and megacore's model configuration."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megacore.convert.families import ACTIVATIONS, FAMILIES, Family
from megacore.errors import ConfigError
from megacore.model_config import ModelConfig
from megacore.settings import validated

_DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "dropout_rate": 0.1,
    "head_dim": 0,
    "initializer_range": 0.02,
    "num_decoder_layers": 0,
    "num_key_value_heads": 0,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": True,
}
"""Keys that a config.json may leave out, or set to null, and what Hugging Face then takes."""

_REFUSED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "rope_scaling": (None,),
    "rotary_value": (False, None),
    "add_cross_attention": (False, None),
    "is_decoder": (False, None),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "reorder_and_upcast_attn": (False, None),
    "scale_attn_weights": (True, None),
    "feed_forward_proj": ("gated-gelu", None),
    "position_embedding_type": ("absolute", None),
}
"""Keys -> the values that megacore's models have."""


def family_of(config: dict[str, Any], where: str) -> Family:
    """Return the family of a ``config.json``.

    Raises:
        ConfigError: megacore has no such architecture.
    """
    kind = config.get("model_type")
    for family in FAMILIES.values():
        if kind in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.model_types)
    raise ConfigError(f"{where}: model_type={kind}: megacore converts {known}")


def model_from(config: dict[str, Any], tensors: Collection[str], where: str) -> ModelConfig:
    """Return the model that a ``config.json`` describes.

    Args:
        config: its contents.
        tensors: names of the tensors beside it, which tell BERT's objective.
        where: the file, for messages.

    Raises:
        ConfigError: it describes what megacore does not compute; the message names the key.
    """
    family = family_of(config, where)
    for key, allowed in _REFUSED.items():
        # T5's gelu-gated layer alone is gated; the others do not know the key.
        if config.get(key) not in allowed and not (key == "attention_bias" and family is FAMILIES["qwen2"]):
            raise ConfigError(f"{where}: {key}={config[key]}: megacore's {config['model_type']} has {allowed[0]}")
    values: dict[str, Any] = dict(family.fixed)
    for ours, theirs in family.keys.items():
        value = config.get(theirs)
        if value is None and theirs == "n_inner":
            width = config.get("n_embd")
            value = 4 * width if isinstance(width, int) else None
        if value is None and theirs not in _DEFAULTS:
            raise ConfigError(f"{where}: {theirs} is missing")
        values[ours] = _DEFAULTS[theirs] if value is None else value
    for key, value in family.fixed.items():
        if values[key] != value:
            raise ConfigError(f"{where}: {family.keys[key]}={values[key]}: megacore converts models with {value}")
    if "activation" not in family.fixed:
        activation = config.get(family.activation, "gelu")
        if not isinstance(activation, str) or activation not in ACTIVATIONS:
            raise ConfigError(f"{where}: {family.activation}={activation}; known: {', '.join(ACTIVATIONS)}")
        values["activation"] = ACTIVATIONS[activation]
    if family.fixed["position_embedding"] == "rotary":
        values["rope_theta"] = _rope_theta(config, where)
    if family is FAMILIES["t5"]:
        # Some versions of transformers say that v1.1's output is untied, others only that it is not scaled.
        if config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True)) is not False:
            raise ConfigError(f"{where}: tie_word_embeddings=true scales T5's output; megacore converts v1.1's, false")
        values["tie_word_embeddings"] = "lm_head.weight" not in tensors
    if family is FAMILIES["bert"]:
        values["objective"] = "mlm_nsp" if any(".pooler." in f".{name}" for name in tensors) else "mlm"
    return validated(ModelConfig, values, f"{where}: ")


def _rope_theta(config: dict[str, Any], where: str) -> Any:
    parameters = config.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"{where}: rope_parameters={parameters}: expected keys and values")
    if parameters.get("rope_type", "default") != "default":
        raise ConfigError(f"{where}: rope_parameters: rope_type={parameters['rope_type']}; megacore has default alone")
    return parameters.get("rope_theta") or config.get("rope_theta") or 10000.0


def config_of(model: ModelConfig) -> tuple[dict[str, Any], Family]:
    """Return the ``config.json`` of a model, and its family.

    Raises:
        ConfigError: Hugging Face has no such architecture; the message names the keys nearest to one that it has.
    """
    differences: dict[str, list[str]] = {}
    for name, family in FAMILIES.items():
        wanted = {key: value for key, value in family.fixed.items() if key != "attention_scale" or value}
        wanted |= {key: value for key, value in _implied(model).items() if key not in family.keys}
        differences[name] = [
            f"{key}={getattr(model, key)} instead of {value}"
            for key, value in wanted.items()
            if getattr(model, key) != value
        ]
        if not differences[name]:
            return _written(model, family), family
    nearest = min(differences, key=lambda name: len(differences[name]))
    raise ConfigError(
        f"Hugging Face has no architecture for this model; the nearest is {nearest}, but it has "
        f"{', '.join(differences[nearest])}"
    )


def _implied(model: ModelConfig) -> dict[str, int | float]:
    """Return what a family that lacks these keys makes of the others; heads that grew alone are not so."""
    return {
        "head_dim": model.hidden_size / model.num_attention_heads,
        "num_key_value_heads": model.num_attention_heads,
    }


def _written(model: ModelConfig, family: Family) -> dict[str, Any]:
    kind = family.model_types[0]
    values = {theirs: getattr(model, ours) for ours, theirs in family.keys.items()}
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == model.activation)
    architectures = {
        "bert": "BertForPreTraining" if model.objective == "mlm_nsp" else "BertForMaskedLM",
        "roformer": "RoFormerForMaskedLM",
        "gpt2": "GPT2LMHeadModel",
        "llama": "LlamaForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "t5": "T5ForConditionalGeneration",
    }
    values |= {"model_type": kind, "architectures": [architectures[kind]]}
    if kind == "t5":
        output = {"tie_word_embeddings": False, "scale_decoder_outputs": False, "decoder_start_token_id": 0}
        return values | output | {"feed_forward_proj": "gated-gelu"}
    if kind == "gpt2":
        inner = None if model.intermediate_size == 4 * model.hidden_size else model.intermediate_size
        values |= {"embd_pdrop": model.hidden_dropout, "n_inner": inner}
    if kind == "roformer":
        values |= {"embedding_size": model.hidden_size, "rotary_value": False}
    if family.fixed["position_embedding"] == "rotary":
        rope = {"rope_theta": model.rope_theta, "rope_type": "default"}
        values |= {"rope_theta": model.rope_theta, "rope_parameters": rope}
    return values | {family.activation: activation}
