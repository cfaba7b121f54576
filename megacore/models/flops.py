"""What a training step costs, counted from the architecture."""

from __future__ import annotations

from megacore.config import ModelConfig


def bert_forward_flops(config: ModelConfig, batch: int, seq: int, masked: int) -> float:
    """Count the floating-point operations of the matrix products of one forward pass (two per multiply-add).

    Args:
        config: sizes of the model.
        batch: samples.
        seq: tokens of each, padding included, since it is computed.
        masked: positions that the MLM head is applied to.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    tokens = batch * seq
    layer = tokens * (4 * hidden * hidden + 2 * hidden * ffn) + batch * 2 * seq * seq * hidden
    heads = masked * hidden * (hidden + config.vocab_size) + batch * hidden * (hidden + config.nsp_classes)
    return 2.0 * (config.num_hidden_layers * layer + heads)


def bert_training_flops(config: ModelConfig, batch: int, seq: int, masked: int) -> float:
    """Count a training step: the backward pass costs twice the forward pass."""
    return 3.0 * bert_forward_flops(config, batch, seq, masked)
