"""Megatron-DeepSpeed's names of a model's tensors, whole or in pipeline stages, and how its fused ones are made.

Source: https://github.com/deepspeedai/Megatron-DeepSpeed (``megatron/model``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from megacore.convert.links import Columns, Link
from megacore.convert.megatron_names import Names, megatron_links
from megacore.errors import ConfigError
from megacore.model_config import ModelConfig

_WHOLE = Names(
    word="language_model.embedding.word_embeddings",
    position="language_model.embedding.position_embeddings",
    segment="language_model.embedding.tokentype_embeddings",
    layers="language_model.encoder.layers.",
    attention_norm="input_layernorm.",
    query_key_value="self_attention.query_key_value",
    query_norm="self_attention.q_layernorm.",
    key_norm="self_attention.k_layernorm.",
    attention_output="self_attention.dense",
    mlp_norm="post_attention_layernorm.",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    final_norm="language_model.encoder.final_layernorm.",
    output="language_model.output_layer",
    output_bias="lm_head.bias",
    transform="lm_head.dense",
    transform_norm="lm_head.layernorm.",
    pooler="language_model.pooler.dense",
    pair_head="binary_head",
)
_FIRST_LAYER = 2
"""Number of the first Transformer layer in a list of pipeline layers: behind a cast and the embeddings."""
_SPLIT_SINCE = "ds_sequence_parallel_fpdt"
"""Setting that came with the change of the queries', keys' and values' order (commit 676a482 of December 2024)."""


def is_megatron(names: Collection[str]) -> bool:
    """Tell whether parameters carry Megatron-DeepSpeed's names."""
    return any(f".{_WHOLE.query_key_value}." in name for name in names)


def megatron_deepspeed_links(
    model: ModelConfig, found: Collection[str], facts: Mapping[str, Any], tensor_parallel_size: int, where: str
) -> Iterator[Link]:
    """Yield the link of every tensor of a model.

    Args:
        model: the model.
        found: names of the checkpoint's tensors.
        facts: what was saved besides: ``args`` are the run's settings.
        tensor_parallel_size: ranks whose parts the tensors are made of; 1 if they are whole.
        where: the checkpoint, for error messages.

    Raises:
        ConfigError: the model is not one that Megatron-DeepSpeed computes.
    """
    names = _WHOLE if any(name.startswith("language_model.") for name in found) else _staged(model)
    split = hasattr(facts.get("args"), _SPLIT_SINCE)
    if split and model.num_key_value_heads != model.num_attention_heads:
        raise ConfigError(
            f"{where}: num_key_value_heads={model.num_key_value_heads} differs from "
            f"num_attention_heads={model.num_attention_heads}: the version of Megatron-DeepSpeed that saved this cuts "
            "queries, keys and values into equal thirds, which is no grouped-query attention"
        )
    for link in megatron_links(model, names, tensor_parallel_size):
        if split and link.columns is not None and names.query_key_value in link.theirs:
            which = 0 if link.part is None else 1 + link.part
            own = model.num_attention_heads * model.head_dim // tensor_parallel_size
            columns = Columns(tensor_parallel_size, 3 * own, which * own, (which + 1) * own)
            yield replace(link, columns=columns)
        else:
            yield link


def _staged(model: ModelConfig) -> Names:
    """Return the names that ``PipelineModule`` gives: by place in its list of layers."""
    embedding = "tied_modules.embed" if model.tie_word_embeddings else "1"
    final_norm = _FIRST_LAYER + model.num_hidden_layers
    return replace(
        _WHOLE,
        word=f"{embedding}.word_embeddings",
        position=f"{embedding}.position_embeddings",
        segment=f"{embedding}.tokentype_embeddings",
        layers="",
        first_layer=_FIRST_LAYER,
        final_norm=f"{final_norm}.",
        output=f"{final_norm + 1}.lm_head",
    )
