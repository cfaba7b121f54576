"""What a step costs, counted from the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megacore.model_config import ModelConfig


@dataclass(frozen=True)
class Work:
    """What a micro-batch asks of a model.

    Args:
        lengths: of each sequence.
        labels: positions that the token head is applied to.
        target_lengths: of each sequence of a decoder that reads an encoder.
    """

    lengths: Sequence[int]
    labels: int
    target_lengths: Sequence[int] = ()


def forward_flops(config: ModelConfig, work: Work) -> float:
    """Count the floating-point operations of the matrix products of one forward pass (two per multiply-add).

    A causal layer's score matrix is counted whole, as is usual (and as kernels without causal skipping compute it).
    """
    total = 0.0
    if config.architecture == "encoder_decoder":
        total += config.layers_of("encoder") * _layer(config, work.lengths, work.lengths)
        total += config.layers_of("decoder") * _layer(config, work.target_lengths, work.target_lengths)
        total += config.layers_of("decoder") * _attention(config, work.target_lengths, work.lengths)
    else:
        total += config.num_hidden_layers * _layer(config, work.lengths, work.lengths)
    hidden = config.hidden_size
    total += work.labels * hidden * (config.vocab_size + (hidden if config.lm_transform else 0))
    if config.objective == "mlm_nsp":
        total += len(work.lengths) * hidden * (hidden + config.nsp_classes)
    return 2.0 * total


def training_flops(config: ModelConfig, work: Work) -> float:
    """Count a training step: the backward pass costs twice the forward pass."""
    return 3.0 * forward_flops(config, work)


def _layer(config: ModelConfig, lengths: Sequence[int], keys: Sequence[int]) -> float:
    """Count the multiply-adds of self-attention and the feed-forward network."""
    tokens, hidden = sum(lengths), config.hidden_size
    matrices = (3 if config.gated_mlp else 2) * hidden * config.intermediate_size
    if config.num_experts:
        matrices = matrices * config.num_experts_per_token + hidden * config.num_experts
    return _attention(config, lengths, keys) + tokens * matrices


def _attention(config: ModelConfig, lengths: Sequence[int], keys: Sequence[int]) -> float:
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    projections = 2 * sum(lengths) * config.hidden_size * heads + 2 * sum(keys) * config.hidden_size * kv_heads
    scores = sum(query * key for query, key in zip(lengths, keys, strict=True))
    return projections + 2 * scores * heads
