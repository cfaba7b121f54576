"""Hugging Face's model families: their configuration keys and the names of their tensors, as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.convert.links import Columns, Link
from megacore.model_config import NOT_GROWN, ModelConfig

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
"""Hugging Face's names of activations -> megacore's; of several, the first is written."""


@dataclass(frozen=True)
class Family:
    """One architecture of Hugging Face's.

    Args:
        model_types: what ``model_type`` says in ``config.json``.
        prefix: of the tensors of the model without its heads.
        keys: megacore's configuration keys -> theirs, where they mean the same.
        fixed: what all models of the family have, in megacore's keys.
        activation: their key of the activation.
        links: names every tensor of a model.
        heads: prefixes of the parameters that a file may lack: they are new then.
    """

    model_types: tuple[str, ...]
    prefix: str
    keys: dict[str, str]
    fixed: dict[str, Any]
    activation: str
    links: Callable[[ModelConfig], Iterator[Link]]
    heads: tuple[str, ...]
    computed: Callable[[ModelConfig], dict[str, NDArray[np.float64]]] = lambda config: {}
    """Tables that transformers keeps among the weights, but that follow from the configuration."""


def _norm(theirs: str, ours: str, biased: bool = True) -> Iterator[Link]:
    for kind in ("weight", "bias") if biased else ("weight",):
        yield Link(f"{theirs}.{kind}", f"{ours}.{kind}")


def _dense(theirs: str, ours: str, biased: bool, part: int | None = None) -> Iterator[Link]:
    for kind in ("weight", "bias") if biased else ("weight",):
        yield Link(f"{theirs}.{kind}", f"{ours}_{kind}", part)


def _bert_links(config: ModelConfig, prefix: str) -> Iterator[Link]:
    yield Link(f"{prefix}embeddings.word_embeddings.weight", "embeddings.word")
    if config.position_embedding == "learned":
        yield Link(f"{prefix}embeddings.position_embeddings.weight", "embeddings.position")
    yield Link(f"{prefix}embeddings.token_type_embeddings.weight", "embeddings.segment")
    yield from _norm(f"{prefix}embeddings.LayerNorm", "embeddings.norm")
    for number in range(config.num_hidden_layers):
        a, b = f"{prefix}encoder.layer.{number}.", f"layers.{number}."
        yield from _dense(f"{a}attention.self.query", f"{b}attention.query", True)
        for part, name in enumerate(("key", "value")):
            yield from _dense(f"{a}attention.self.{name}", f"{b}attention.key_value", True, part)
        yield from _dense(f"{a}attention.output.dense", f"{b}attention.output", True)
        yield from _norm(f"{a}attention.output.LayerNorm", f"{b}attention_residual.norm")
        yield from _dense(f"{a}intermediate.dense", f"{b}mlp.up", True)
        yield from _dense(f"{a}output.dense", f"{b}mlp.down", True)
        yield from _norm(f"{a}output.LayerNorm", f"{b}mlp_residual.norm")
    if config.objective == "mlm_nsp":
        yield from _dense(f"{prefix}pooler.dense", "nsp_head.pooler", True)
        yield from _norm("cls.seq_relationship", "nsp_head")
    yield from _dense("cls.predictions.transform.dense", "lm_head.transform", True)
    yield from _norm("cls.predictions.transform.LayerNorm", "lm_head.norm")
    yield Link("cls.predictions.bias", "lm_head.bias")


def _sines(config: ModelConfig) -> dict[str, NDArray[np.float64]]:
    """Return RoFormer's table of angles: [positions, head_dim], sines in the first half, cosines in the second."""
    pairs = np.arange(0, config.head_dim, 2)
    angles = np.arange(config.max_position_embeddings)[:, None] / np.power(config.rope_theta, pairs / config.head_dim)
    return {"roformer.encoder.embed_positions.weight": np.concatenate([np.sin(angles), np.cos(angles)], axis=1)}


def _gpt2_links(config: ModelConfig) -> Iterator[Link]:
    yield Link("transformer.wte.weight", "embeddings.word")
    yield Link("transformer.wpe.weight", "embeddings.position")
    width = config.num_attention_heads * config.head_dim
    for number in range(config.num_hidden_layers):
        a, b = f"transformer.h.{number}.", f"layers.{number}."
        for kind in ("weight", "bias"):
            turned = kind == "weight"
            query, key, value = (Columns(1, 3 * width, part * width, (part + 1) * width) for part in range(3))
            yield Link(f"{a}attn.c_attn.{kind}", f"{b}attention.query_{kind}", None, turned, query)
            for part, columns in enumerate((key, value)):
                yield Link(f"{a}attn.c_attn.{kind}", f"{b}attention.key_value_{kind}", part, turned, columns)
            yield Link(f"{a}attn.c_proj.{kind}", f"{b}attention.output_{kind}", None, turned)
            yield Link(f"{a}mlp.c_fc.{kind}", f"{b}mlp.up_{kind}", None, turned)
            yield Link(f"{a}mlp.c_proj.{kind}", f"{b}mlp.down_{kind}", None, turned)
        yield from _norm(f"{a}ln_1", f"{b}attention_residual.norm")
        yield from _norm(f"{a}ln_2", f"{b}mlp_residual.norm")
    yield from _norm("transformer.ln_f", "final_norm")
    if not config.tie_word_embeddings:
        yield Link("lm_head.weight", "lm_head.weight")


def _llama_links(config: ModelConfig) -> Iterator[Link]:
    yield Link("model.embed_tokens.weight", "embeddings.word")
    for number in range(config.num_hidden_layers):
        a, b = f"model.layers.{number}.", f"layers.{number}."
        yield from _dense(f"{a}self_attn.q_proj", f"{b}attention.query", config.attention_bias)
        for part, name in enumerate("kv"):
            yield from _dense(f"{a}self_attn.{name}_proj", f"{b}attention.key_value", config.attention_bias, part)
        yield from _dense(f"{a}self_attn.o_proj", f"{b}attention.output", False)
        for part, name in enumerate(("gate", "up")):
            yield from _dense(f"{a}mlp.{name}_proj", f"{b}mlp.up", False, part)
        yield from _dense(f"{a}mlp.down_proj", f"{b}mlp.down", False)
        yield from _norm(f"{a}input_layernorm", f"{b}attention_residual.norm", False)
        yield from _norm(f"{a}post_attention_layernorm", f"{b}mlp_residual.norm", False)
        if config.qk_norm:
            yield from _norm(f"{a}self_attn.q_norm", f"{b}attention.query_norm", False)
            yield from _norm(f"{a}self_attn.k_norm", f"{b}attention.key_norm", False)
    yield from _norm("model.norm", "final_norm", False)
    if not config.tie_word_embeddings:
        yield Link("lm_head.weight", "lm_head.weight")


def _t5_links(config: ModelConfig) -> Iterator[Link]:
    def attention(theirs: str, ours: str) -> Iterator[Link]:
        yield from _dense(f"{theirs}.q", f"{ours}.query", False)
        for part, name in enumerate("kv"):
            yield from _dense(f"{theirs}.{name}", f"{ours}.key_value", False, part)
        yield from _dense(f"{theirs}.o", f"{ours}.output", False)

    yield Link("shared.weight", "embeddings.word")
    for stack in ("encoder", "decoder"):
        last = 2 if stack == "decoder" else 1
        for number in range(config.layers_of(stack)):
            a, b = f"{stack}.block.{number}.layer.", f"{stack}.layers.{number}."
            yield from attention(f"{a}0.SelfAttention", f"{b}attention")
            yield from _norm(f"{a}0.layer_norm", f"{b}attention_residual.norm", False)
            if stack == "decoder":
                yield from attention(f"{a}1.EncDecAttention", f"{b}cross_attention")
                yield from _norm(f"{a}1.layer_norm", f"{b}cross_attention_residual.norm", False)
            for part in (0, 1):
                yield from _dense(f"{a}{last}.DenseReluDense.wi_{part}", f"{b}mlp.up", False, part)
            yield from _dense(f"{a}{last}.DenseReluDense.wo", f"{b}mlp.down", False)
            yield from _norm(f"{a}{last}.layer_norm", f"{b}mlp_residual.norm", False)
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield Link(table, f"{stack}.relative_bias.weight")
        yield from _norm(f"{stack}.final_layer_norm", f"{stack}.final_norm", False)
    if not config.tie_word_embeddings:
        yield Link("lm_head.weight", "lm_head.weight")


_SIZES = {key: key for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
_SIZES |= {key: key for key in ("intermediate_size", "max_position_embeddings", "initializer_range")}
_ENCODER = _SIZES | {
    "type_vocab_size": "type_vocab_size",
    "norm_eps": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
}
_PRE_NORM: dict[str, Any] = {
    **NOT_GROWN,
    "residual": "pre_norm",
    "embedding_norm": False,
    "type_vocab_size": 0,
    "lm_transform": False,
    "lm_bias": False,
    "norm_affine": True,
    "logit_multiplier": 1.0,
    "num_experts": 0,
}
_POST_NORM: dict[str, Any] = {
    **NOT_GROWN,
    "architecture": "encoder",
    "residual": "post_norm",
    "norm": "layer_norm",
    "norm_affine": True,
    "embedding_norm": True,
    "gated_mlp": False,
    "attention_bias": True,
    "linear_bias": True,
    "qk_norm": False,
    "attention_scale": 0.0,
    "tie_word_embeddings": True,
    "lm_transform": True,
    "lm_bias": True,
    "logit_multiplier": 1.0,
    "num_experts": 0,
}
_LLAMA_FIXED: dict[str, Any] = {
    **_PRE_NORM,
    "architecture": "decoder",
    "objective": "causal_lm",
    "position_embedding": "rotary",
    "norm": "rms_norm",
    "gated_mlp": True,
    "linear_bias": False,
    "attention_scale": 0.0,
    "hidden_dropout": 0.0,
}
_LLAMA_KEYS = _SIZES | {
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "attention_dropout": "attention_dropout",
    "tie_word_embeddings": "tie_word_embeddings",
}


def _llama(model_type: str, attention_bias: bool, qk_norm: bool) -> Family:
    fixed = {**_LLAMA_FIXED, "attention_bias": attention_bias, "qk_norm": qk_norm}
    return Family((model_type,), "model.", _LLAMA_KEYS, fixed, "hidden_act", _llama_links, ("lm_head",))


FAMILIES: dict[str, Family] = {
    "bert": Family(
        ("bert",),
        "bert.",
        _ENCODER,
        {**_POST_NORM, "position_embedding": "learned"},
        "hidden_act",
        lambda config: _bert_links(config, "bert."),
        ("lm_head", "nsp_head"),
    ),
    "roformer": Family(
        ("roformer",),
        "roformer.",
        _ENCODER,
        {**_POST_NORM, "position_embedding": "rotary_interleaved", "objective": "mlm", "rope_theta": 10000.0},
        "hidden_act",
        lambda config: _bert_links(config, "roformer."),
        ("lm_head",),
        _sines,
    ),
    "gpt2": Family(
        ("gpt2",),
        "transformer.",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "intermediate_size": "n_inner",
            "max_position_embeddings": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "hidden_dropout": "resid_pdrop",
            "attention_dropout": "attn_pdrop",
            "initializer_range": "initializer_range",
            "tie_word_embeddings": "tie_word_embeddings",
        },
        {
            **_PRE_NORM,
            "architecture": "decoder",
            "objective": "causal_lm",
            "position_embedding": "learned",
            "norm": "layer_norm",
            "gated_mlp": False,
            "attention_bias": True,
            "linear_bias": True,
            "qk_norm": False,
            "attention_scale": 0.0,
        },
        "activation_function",
        _gpt2_links,
        ("lm_head",),
    ),
    "llama": _llama("llama", attention_bias=False, qk_norm=False),
    "qwen2": _llama("qwen2", attention_bias=True, qk_norm=False),
    "qwen3": _llama("qwen3", attention_bias=False, qk_norm=True),
    "t5": Family(
        ("t5", "mt5"),
        "",
        {
            "vocab_size": "vocab_size",
            "hidden_size": "d_model",
            "head_dim": "d_kv",
            "intermediate_size": "d_ff",
            "num_hidden_layers": "num_layers",
            "num_decoder_layers": "num_decoder_layers",
            "num_attention_heads": "num_heads",
            "relative_attention_num_buckets": "relative_attention_num_buckets",
            "relative_attention_max_distance": "relative_attention_max_distance",
            "norm_eps": "layer_norm_epsilon",
            "hidden_dropout": "dropout_rate",
            "attention_dropout": "dropout_rate",
        },
        {
            **_PRE_NORM,
            "architecture": "encoder_decoder",
            "position_embedding": "relative",
            "norm": "rms_norm",
            "activation": "gelu_tanh",
            "gated_mlp": True,
            "attention_bias": False,
            "linear_bias": False,
            "qk_norm": False,
            "attention_scale": 1.0,
        },
        "dense_act_fn",
        _t5_links,
        (),
    ),
}
