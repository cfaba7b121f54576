"""Megatron's names of a model's tensors, and how its fused ones are interleaved.

The linear map that makes queries, keys and values has, for each key head, the rows of the queries that share it, then
the key's, then the value's. A gated feed-forward network's first map has, on each tensor-parallel rank, the rank's
gates, then what they are multiplied with. The links are to the ranks' tensors laid end to end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megacore.convert.links import Columns, Link
from megacore.model_config import ModelConfig


@dataclass(frozen=True)
class Names:
    """How a version of Megatron calls a model's parts.

    Those of a layer follow its prefix and number, as ``{layers}{number}.{part}``. Norms' names end before ``weight``
    or ``bias``, all others before ``.weight`` or ``.bias``; ``output_bias`` is a whole name.
    """

    word: str
    position: str
    segment: str
    layers: str
    attention_norm: str
    query_key_value: str
    query_norm: str
    key_norm: str
    attention_output: str
    mlp_norm: str
    up: str
    down: str
    final_norm: str
    output: str
    output_bias: str
    transform: str
    transform_norm: str
    pooler: str
    pair_head: str
    first_layer: int = 0
    """Number of the first layer."""


_CORE = Names(
    word="embedding.word_embeddings",
    position="embedding.position_embeddings",
    segment="embedding.tokentype_embeddings",
    layers="decoder.layers.",
    attention_norm="input_layernorm.",
    query_key_value="self_attention.linear_qkv",
    query_norm="self_attention.q_layernorm.",
    key_norm="self_attention.k_layernorm.",
    attention_output="self_attention.linear_proj",
    mlp_norm="pre_mlp_layernorm.",
    up="mlp.linear_fc1",
    down="mlp.linear_fc2",
    final_norm="decoder.final_layernorm.",
    output="output_layer",
    output_bias="output_layer.bias",
    transform="lm_head.dense",
    transform_norm="lm_head.layer_norm.",
    pooler="pooler.dense",
    pair_head="binary_head",
)


def core_names(model: ModelConfig, transformer_engine: bool = False) -> Names:
    """Return megatron-core's names.

    Args:
        model: a GPT or a BERT.
        transformer_engine: its layers are made of Transformer Engine's modules, which hold a norm and the linear map
            behind it; otherwise of megatron-core's own (``--transformer-impl local``).
    """
    names = _CORE
    if model.architecture == "encoder":
        names = replace(names, layers="encoder.layers.", final_norm="encoder.final_layernorm.")
    if transformer_engine:
        attention_norm, mlp_norm = f"{names.query_key_value}.layer_norm_", f"{names.up}.layer_norm_"
        names = replace(names, attention_norm=attention_norm, mlp_norm=mlp_norm)
    return names


def megatron_links(model: ModelConfig, names: Names, tensor_parallel_size: int) -> Iterator[Link]:
    """Yield the link of every tensor of a model.

    Args:
        model: a GPT or a BERT that Megatron computes.
        names: of the version that wrote, or will read, the files.
        tensor_parallel_size: ranks whose parts the tensors are made of.
    """
    yield Link(f"{names.word}.weight", "embeddings.word")
    if model.position_embedding == "learned":
        yield Link(f"{names.position}.weight", "embeddings.position")
    if model.type_vocab_size:
        yield Link(f"{names.segment}.weight", "embeddings.segment")
    for number in range(model.num_hidden_layers):
        yield from _layer_links(model, names, tensor_parallel_size, number)
    yield from _norm(model, names.final_norm, "final_norm")
    if model.lm_transform:
        yield from _dense(names.transform, "lm_head.transform", True)
        yield from _norm(model, names.transform_norm, "lm_head.norm")
    if model.lm_bias:
        yield Link(names.output_bias, "lm_head.bias")
    if not model.tie_word_embeddings:
        yield Link(f"{names.output}.weight", "lm_head.weight")
    if model.objective == "mlm_nsp":
        yield from _dense(names.pooler, "nsp_head.pooler", True)
        for kind in ("weight", "bias"):
            yield Link(f"{names.pair_head}.{kind}", f"nsp_head.{kind}")


def _layer_links(model: ModelConfig, names: Names, tensor_parallel_size: int, number: int) -> Iterator[Link]:
    theirs, ours = f"{names.layers}{names.first_layer + number}.", f"layers.{number}."
    yield from _norm(model, theirs + names.attention_norm, f"{ours}attention_residual.norm")
    groups = model.num_key_value_heads
    queries = model.num_attention_heads // groups * model.head_dim
    width = queries + 2 * model.head_dim
    fused = theirs + names.query_key_value
    yield from _dense(fused, f"{ours}attention.query", model.attention_bias, None, Columns(groups, width, 0, queries))
    for part in (0, 1):
        start = queries + part * model.head_dim
        columns = Columns(groups, width, start, start + model.head_dim)
        yield from _dense(fused, f"{ours}attention.key_value", model.attention_bias, part, columns)
    if model.qk_norm:
        yield Link(f"{theirs}{names.query_norm}weight", f"{ours}attention.query_norm.weight")
        yield Link(f"{theirs}{names.key_norm}weight", f"{ours}attention.key_norm.weight")
    yield from _dense(theirs + names.attention_output, f"{ours}attention.output", model.linear_bias)
    yield from _norm(model, theirs + names.mlp_norm, f"{ours}mlp_residual.norm")
    if model.gated_mlp:
        own = model.intermediate_size // tensor_parallel_size
        for part in (0, 1):
            columns = Columns(tensor_parallel_size, 2 * own, part * own, (part + 1) * own)
            yield from _dense(theirs + names.up, f"{ours}mlp.up", model.linear_bias, part, columns)
    else:
        yield from _dense(theirs + names.up, f"{ours}mlp.up", model.linear_bias)
    yield from _dense(theirs + names.down, f"{ours}mlp.down", model.linear_bias)


def _norm(model: ModelConfig, theirs: str, ours: str) -> Iterator[Link]:
    for kind in ("weight", "bias") if model.norm == "layer_norm" else ("weight",):
        yield Link(f"{theirs}{kind}", f"{ours}.{kind}")


def _dense(
    theirs: str, ours: str, biased: bool, part: int | None = None, columns: Columns | None = None
) -> Iterator[Link]:
    for kind in ("weight", "bias") if biased else ("weight",):
        yield Link(f"{theirs}.{kind}", f"{ours}_{kind}", part, columns=columns)
