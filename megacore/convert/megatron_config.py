"""Between the arguments of a Megatron-LM run, which its checkpoints carry, and megacore's model configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megacore.config import ParallelConfig
from megacore.errors import ConfigError
from megacore.model_config import NOT_GROWN, ModelConfig
from megacore.settings import validated

VOCABULARY_MULTIPLE = 128
"""Megatron pads its vocabulary to a multiple of this on each tensor-parallel rank, unless told otherwise."""

_KEYS: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_layers",),
    "hidden_size": ("hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "head_dim": ("kv_channels",),
    "intermediate_size": ("ffn_hidden_size",),
    "max_position_embeddings": ("max_position_embeddings",),
    "norm_eps": ("norm_epsilon", "layernorm_epsilon"),
    "hidden_dropout": ("hidden_dropout",),
    "attention_dropout": ("attention_dropout",),
    "initializer_range": ("init_method_std",),
}
"""megacore's keys -> Megatron's, where they mean the same; of several, versions have one."""

_DEFAULTS: dict[str, Any] = {
    "add_bias_linear": True,
    "add_qkv_bias": False,
    "group_query_attention": False,
    "normalization": "LayerNorm",
    "position_embedding_type": "learned_absolute",
    "qk_layernorm": False,
    "rotary_base": 10000,
    "rotary_interleaved": False,
    "swiglu": False,
    "untie_embeddings_and_output_weights": False,
}
"""Keys that older versions lack, and what those compute."""

_REFUSED: dict[str, tuple[Any, ...]] = {
    "activation_func_clamp_value": (None,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "glu_linear_offset": (0.0,),
    "heterogeneous_layers_config_path": (None,),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "layernorm_zero_centered_gamma": (False,),
    "mtp_num_layers": (None, 0),
    "multi_latent_attention": (False,),
    "no_rope_freq": (None,),
    "num_experts": (None, 0),
    "openai_gelu": (False,),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "retro_add_retriever": (False,),
    "rotary_percent": (1.0,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "rotary_value": (False,),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "squared_relu": (False,),
    "use_rope_scaling": (False,),
    "window_size": (None,),
}
"""Keys -> the values that megacore's models have; a version that lacks a key does not do it."""

_POSITIONS = {"learned_absolute": "learned", "rope": "rotary", "none": "none"}
_NORMS = {"LayerNorm": "layer_norm", "RMSNorm": "rms_norm"}
_FIXED: dict[str, Any] = {
    **NOT_GROWN,
    "residual": "pre_norm",
    "norm_affine": True,
    "embedding_norm": False,
    "attention_scale": 0.0,
    "logit_multiplier": 1.0,
    "num_experts": 0,
}
"""What all of Megatron's models that are converted have, in megacore's keys."""
_BERT: dict[str, Any] = {"architecture": "encoder", "lm_transform": True, "lm_bias": True, "qk_norm": False}
_GPT: dict[str, Any] = {"architecture": "decoder", "lm_transform": False, "lm_bias": False, "type_vocab_size": 0}
_HEAD_GELU = "BERT's head: Megatron's is the exact gelu behind its layers' approximate one, here both are approximate"
_NOT_COMPARED = ("vocab_size", "hidden_dropout", "attention_dropout", "initialization", "initializer_range")


def model_from(
    args: Mapping[str, Any], tensors: Collection[str], where: str, configured: ModelConfig | None
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return the model that Megatron's arguments describe, and what of it megacore does not compute exactly.

    Args:
        args: the arguments.
        tensors: names of the tensors beside them, which tell a BERT from a GPT.
        where: the file, for messages.
        configured: the model as a run's configuration has it, which must agree; it alone knows how much of the
            vocabulary is padding where the arguments do not say it.

    Raises:
        ConfigError: they describe what megacore does not compute; the message names the key.
    """
    for key, allowed in _REFUSED.items():
        value = args.get(key)
        if value is not None and value not in allowed:
            raise ConfigError(f"{where}: {key}={value}: megacore converts models with {key}={allowed[0]}")
    values = _FIXED | {"vocab_size": _vocabulary(args, where)}
    for ours, theirs in _KEYS.items():
        values[ours] = _value(args, where, *theirs)
    grouped = _value(args, where, "group_query_attention")
    values["num_key_value_heads"] = _value(args, where, "num_query_groups" if grouped else "num_attention_heads")
    values["position_embedding"] = _translated(args, where, "position_embedding_type", _POSITIONS)
    if values["position_embedding"] == "rotary" and _value(args, where, "rotary_interleaved"):
        values["position_embedding"] = "rotary_interleaved"
    if values["position_embedding"].startswith("rotary"):
        values["rope_theta"] = _value(args, where, "rotary_base")
    values["norm"] = _translated(args, where, "normalization", _NORMS)
    values["linear_bias"] = _value(args, where, "add_bias_linear")
    values["attention_bias"] = values["linear_bias"] or _value(args, where, "add_qkv_bias")
    values["tie_word_embeddings"] = not _value(args, where, "untie_embeddings_and_output_weights")
    values["qk_norm"] = _value(args, where, "qk_layernorm")
    if values["qk_norm"] and values["norm"] != "rms_norm":
        raise ConfigError(f"{where}: qk_layernorm=True: megacore's norm of queries and keys is RMSNorm, not LayerNorm")
    values["gated_mlp"] = _value(args, where, "swiglu")
    # Megatron fuses bias and gelu into a kernel that approximates gelu by tanh.
    approximate = not values["gated_mlp"] and values["linear_bias"] and _value(args, where, "bias_gelu_fusion")
    values["activation"] = "silu" if values["gated_mlp"] else "gelu_tanh" if approximate else "gelu"
    inexact: tuple[str, ...] = ()
    if any(name.startswith("encoder.layers.") for name in tensors):
        pairs = any(name.startswith("binary_head.") for name in tensors)
        values |= _BERT | {"objective": "mlm_nsp" if pairs else "mlm", "type_vocab_size": 2 if pairs else 0}
        if values["activation"] == "silu" or values["norm"] == "rms_norm":
            key = "swiglu=True" if values["activation"] == "silu" else "normalization=RMSNorm"
            raise ConfigError(f"{where}: {key}: the head of Megatron's BERT has gelu and LayerNorm all the same")
        inexact = (_HEAD_GELU,) if approximate else ()
    else:
        values |= _GPT
    model = validated(ModelConfig, values, f"{where}: ")
    return (model if configured is None else _agreed(model, configured, where)), inexact


def padded_size(args: Mapping[str, Any], where: str) -> int:
    """Return the number of rows of the vocabulary's tables, the padding included."""
    size = _value(args, where, "padded_vocab_size")
    if not isinstance(size, int) or size <= 0:
        raise ConfigError(f"{where}: padded_vocab_size={size} is not a number of rows")
    return size


def _vocabulary(args: Mapping[str, Any], where: str) -> int:
    """Return the number of tokens, without the padding where that is known."""
    size = args.get("vocab_size")
    if not isinstance(size, int):
        return padded_size(args, where)
    # This tokenizer alone adds a token to the size that it is given.
    return size + 1 if args.get("tokenizer_type") == "NullTokenizer" else size


def _value(args: Mapping[str, Any], where: str, *keys: str) -> Any:
    for key in keys:
        if args.get(key) is not None:
            return args[key]
    if keys[0] not in _DEFAULTS:
        raise ConfigError(f"{where}: {keys[0]} is missing from its args")
    return _DEFAULTS[keys[0]]


def _translated(args: Mapping[str, Any], where: str, key: str, values: dict[str, str]) -> str:
    value = str(_value(args, where, key))
    if value not in values:
        raise ConfigError(f"{where}: {key}={value}: megacore converts {', '.join(values)}")
    return values[value]


def _agreed(model: ModelConfig, configured: ModelConfig, where: str) -> ModelConfig:
    for key, value in model:
        mine = getattr(configured, key)
        if key not in _NOT_COMPARED and mine != value:
            raise ConfigError(f"{where}: its args say {key}={value}, and --config says {key}={mine}")
    return configured


def check_exportable(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse a model or a layout that Megatron does not have.

    Raises:
        ConfigError: naming the keys.
    """
    wanted: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in _FIXED.items()}
    if model.architecture == "encoder":
        wanted |= {key: (value,) for key, value in _BERT.items()}
        # Its head has gelu and a layer norm, whatever its layers have.
        wanted |= {"activation": ("gelu",), "gated_mlp": (False,), "norm": ("layer_norm",)}
        wanted["type_vocab_size"] = (2 if model.objective == "mlm_nsp" else 0,)
    else:
        wanted |= {key: (value,) for key, value in _GPT.items()} | {"objective": ("causal_lm",)}
        wanted["activation"] = (
            ("silu",) if model.gated_mlp else ("gelu", "gelu_tanh") if model.linear_bias else ("gelu",)
        )
        if model.qk_norm:
            wanted["norm"] = ("rms_norm",)
    wanted["position_embedding"] = ("learned", "rotary", "rotary_interleaved", "none")
    if model.linear_bias:
        wanted["attention_bias"] = (True,)
    if model.attention_scale == model.head_dim**-0.5:
        wanted["attention_scale"] = (model.attention_scale,)
    different = [
        f"{key}={getattr(model, key)} instead of {' or '.join(map(str, values))}"
        for key, values in wanted.items()
        if getattr(model, key) not in values
    ]
    if different:
        raise ConfigError(f"--to megatron: Megatron has no architecture for this model: {', '.join(different)}")
    parallel.check(model)
    layers, stages = model.num_hidden_layers, parallel.pipeline_parallel_size
    if layers % stages:
        raise ConfigError(
            f"pipeline_parallel_size={stages} does not divide num_hidden_layers={layers}: Megatron's stages have "
            "equal numbers of layers"
        )


def padded_vocabulary(model: ModelConfig, tensor_parallel_size: int) -> int:
    """Return the vocabulary's size with Megatron's padding."""
    multiple = VOCABULARY_MULTIPLE * tensor_parallel_size
    return -(-model.vocab_size // multiple) * multiple


def args_of(model: ModelConfig, parallel: ParallelConfig) -> dict[str, Any]:
    """Return the arguments that describe a model and its layout to Megatron (``--use-checkpoint-args``)."""
    values = {name: getattr(model, ours) for ours, theirs in _KEYS.items() for name in theirs}
    grouped = model.num_key_value_heads != model.num_attention_heads
    rotary = model.position_embedding.startswith("rotary")
    names = {ours: theirs for theirs, ours in _POSITIONS.items()} | {"rotary_interleaved": "rope"}
    encoder = model.architecture == "encoder"
    return values | {
        "tensor_model_parallel_size": parallel.tensor_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_parallel_size,
        "virtual_pipeline_model_parallel_size": None,
        "encoder_num_layers": model.num_hidden_layers,
        "seq_length": model.max_position_embeddings,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": padded_vocabulary(model, parallel.tensor_parallel_size),
        "make_vocab_size_divisible_by": VOCABULARY_MULTIPLE,
        "group_query_attention": grouped,
        "num_query_groups": model.num_key_value_heads if grouped else 1,
        "position_embedding_type": names[model.position_embedding],
        "add_position_embedding": model.position_embedding == "learned",
        "use_rotary_position_embeddings": rotary,
        "rotary_interleaved": model.position_embedding == "rotary_interleaved",
        "rotary_base": int(model.rope_theta) if model.rope_theta.is_integer() else model.rope_theta,
        "rotary_percent": 1.0,
        "normalization": next(theirs for theirs, ours in _NORMS.items() if ours == model.norm),
        "apply_layernorm_1p": False,
        "apply_residual_connection_post_layernorm": False,
        "swiglu": model.gated_mlp,
        "squared_relu": False,
        "openai_gelu": False,
        "bias_gelu_fusion": model.activation == "gelu_tanh",
        "add_bias_linear": model.linear_bias,
        "add_qkv_bias": model.attention_bias,
        "qk_layernorm": model.qk_norm,
        "untie_embeddings_and_output_weights": not model.tie_word_embeddings,
        "num_experts": None,
        "bert_binary_head": model.objective == "mlm_nsp",
        "transformer_impl": "local",
        "spec": ["local"] if encoder else None,
        "ckpt_format": "torch",
        "use_dist_ckpt": False,
    }
