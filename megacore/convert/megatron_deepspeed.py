"""Megatron-DeepSpeed's names of a model's tensors, whole or in pipeline stages, and how its fused ones are made.

Source: https://github.com/deepspeedai/Megatron-DeepSpeed (``megatron/model``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from megacore.convert.links import Columns, Link
from megacore.convert.megatron_config import model_from
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
_NORMS = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}
"""Its words -> Megatron-LM's."""
_FIRST_LAYER = 2
"""Number of the first Transformer layer in a list of pipeline layers: behind a cast and the embeddings."""
_SPLIT_SINCE = "ds_sequence_parallel_fpdt"
"""Setting that came with the change of the queries', keys' and values' order (commit 676a482 of December 2024)."""

_JOINED = "parameter_with_2_sub_params_cat_dim_0"
"""What tells DeepSpeed's ``ds_to_universal`` to join the ranks' gates, and what is multiplied with them, each."""


def is_megatron(names: Collection[str]) -> bool:
    """Tell whether parameters carry Megatron-DeepSpeed's names."""
    return any(f".{_WHOLE.query_key_value}." in name for name in names)


def megatron_deepspeed_model(
    facts: Mapping[str, Any], found: Collection[str], where: str, configured: ModelConfig | None
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Return the model that the run's settings describe, and what of it megacore does not compute exactly.

    Args:
        facts: what was saved besides tensors.
        found: names of the checkpoint's tensors.
        where: the checkpoint, for error messages.
        configured: the model as a run's configuration has it, which must agree.

    Raises:
        ConfigError: there are no settings and no configuration, or megacore does not compute the model.
    """
    settings = facts.get("args")
    if not hasattr(settings, "hidden_size"):
        if configured is None:
            raise ConfigError(f"{where} does not say what model it is of: add --config CONFIG.yaml")
        return configured, ()
    args = dict(vars(settings))
    names = [*found, "encoder.layers."] if any(name.startswith("lm_head.dense.") for name in found) else found
    info = facts.get("universal_checkpoint_info")
    size = info.get("original_vocab_size") if isinstance(info, Mapping) else None
    if size is not None:  # what its tokenizer says, which its settings need not
        args |= {"vocab_size": size, "tokenizer_type": None}
    experts, norm = args.get("num_experts"), args.get("normalization", "layernorm")
    rotary, learned = args.get("use_rotary_position_embeddings"), args.get("add_position_embedding", True)
    args |= {
        "normalization": _NORMS.get(norm, norm),
        "position_embedding_type": "rope" if rotary else "learned_absolute" if learned else "none",
        "rotary_base": args.get("rope_theta"),
        "group_query_attention": args.get("num_key_value_heads") is not None,
        "num_query_groups": args.get("num_key_value_heads"),
        "num_experts": None if experts in ([1], 1) else experts,
    }
    return model_from(args, names, where, configured)


def megatron_deepspeed_links(
    model: ModelConfig, found: Collection[str], facts: Mapping[str, Any], tensor_parallel_size: int, where: str
) -> Iterator[Link]:
    """Yield the link of every tensor of a model.

    Args:
        model: the model.
        found: names of the checkpoint's tensors.
        facts: what was saved besides: ``args`` are the run's settings.
        tensor_parallel_size: ranks whose parts are there; 1 if a universal checkpoint has whole tensors.
        where: the checkpoint, for error messages.

    Raises:
        ConfigError: the model is not one that Megatron-DeepSpeed computes.
    """
    names = _WHOLE if any(name.startswith("language_model.") for name in found) else _staged(model)
    settings, info = facts.get("args"), facts.get("universal_checkpoint_info")
    # A universal tensor is the ranks' parts laid end to end, but for gates where DeepSpeed was told of them.
    ranks = getattr(settings, "tensor_model_parallel_size", tensor_parallel_size)
    gates_joined = tensor_parallel_size == 1 and isinstance(info, Mapping) and bool(info.get(_JOINED))
    split = hasattr(settings, _SPLIT_SINCE)
    if split and model.num_key_value_heads != model.num_attention_heads:
        raise ConfigError(
            f"{where}: num_key_value_heads={model.num_key_value_heads} differs from "
            f"num_attention_heads={model.num_attention_heads}: the version of Megatron-DeepSpeed that saved this cuts "
            "queries, keys and values into equal thirds, which is no grouped-query attention"
        )
    for link in megatron_links(model, names, 1 if gates_joined else ranks):
        if split and link.columns is not None and names.query_key_value in link.theirs:
            which = 0 if link.part is None else 1 + link.part
            own = model.num_attention_heads * model.head_dim // ranks
            columns = Columns(ranks, 3 * own, which * own, (which + 1) * own)
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
