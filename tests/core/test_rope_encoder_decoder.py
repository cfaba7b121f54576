"""An encoder-decoder with rotary positions, pre-norm or DeepNorm, against a plain reference in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megacore.growth.verify import random_batch
from megacore.model_config import ModelConfig
from megacore.models.transformer import Transformer
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared, initialise
from tests.models import model_config

BOTH: dict[str, Any] = {
    "architecture": "encoder_decoder",
    "num_decoder_layers": 3,
    "position_embedding": "rotary",
    "type_vocab_size": 0,
    "embedding_norm": False,
    "lm_transform": False,
    "lm_bias": False,
}
Weights = dict[str, torch.Tensor]


def attention(weights: Weights, name: str, x: torch.Tensor, memory: torch.Tensor, rotate: bool, causal: bool) -> Any:
    def heads(stream: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.einsum("sh,ndh->nsd", stream, weight) + bias[:, None]

    def turned(y: torch.Tensor) -> torch.Tensor:
        """Turn entry i with entry i + size/2, as LLaMA does."""
        size, half = y.shape[-1], y.shape[-1] // 2
        rate = 10000.0 ** (-torch.arange(half, dtype=torch.float64) * 2 / size)
        angle = torch.arange(y.shape[1], dtype=torch.float64)[:, None] * rate
        a, b = y[..., :half], y[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    query = heads(x, weights[f"{name}.query_weight"], weights[f"{name}.query_bias"])
    key, value = (
        heads(memory, weights[f"{name}.key_value_weight"][i], weights[f"{name}.key_value_bias"][i]) for i in (0, 1)
    )
    if rotate:
        query, key = turned(query), turned(key)
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
    context = scores.softmax(-1) @ value
    return torch.einsum("nsd,hnd->sh", context, weights[f"{name}.output_weight"]) + weights[f"{name}.output_bias"]


def reference(config: ModelConfig, weights: Weights, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Compute the logits of one pair of sequences."""
    deep, n, m = config.residual == "deep_norm", config.num_hidden_layers, config.num_decoder_layers
    scales = {"encoder": 0.81 * (n**4 * m) ** (1 / 16), "decoder": (3 * m) ** 0.25}  # DeepNet, table 2

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.norm_eps)

    def mlp(x: torch.Tensor, name: str) -> torch.Tensor:
        inner = F.gelu(x @ weights[f"{name}.up_weight"].T + weights[f"{name}.up_bias"])
        return inner @ weights[f"{name}.down_weight"].T + weights[f"{name}.down_bias"]

    def added(x: torch.Tensor, name: str, stack: str, branch: Any) -> torch.Tensor:
        if deep:
            return norm(scales[stack] * x + branch(x), f"{name}_residual.norm")
        return x + branch(norm(x, f"{name}_residual.norm"))

    table = weights["embeddings.word"]
    x, y = table[source], table[target]
    for number in range(n):
        layer = f"encoder.layers.{number}."
        own = f"{layer}attention"
        x = added(x, own, "encoder", lambda h, own=own: attention(weights, own, h, h, rotate=True, causal=False))
        x = added(x, f"{layer}mlp", "encoder", lambda h, layer=layer: mlp(h, f"{layer}mlp"))
    x = x if deep else norm(x, "encoder.final_norm")
    for number in range(m):
        layer = f"decoder.layers.{number}."
        own, cross = f"{layer}attention", f"{layer}cross_attention"
        y = added(y, own, "decoder", lambda h, own=own: attention(weights, own, h, h, rotate=True, causal=True))
        y = added(
            y, cross, "decoder", lambda h, cross=cross: attention(weights, cross, h, x, rotate=False, causal=False)
        )
        y = added(y, f"{layer}mlp", "decoder", lambda h, layer=layer: mlp(h, f"{layer}mlp"))
    return (y if deep else norm(y, "decoder.final_norm")) @ table.T


@pytest.mark.parametrize("residual", ["pre_norm", "deep_norm"])
def test_logits_equal_the_definition(residual: str) -> None:
    config = model_config(**BOTH, residual=residual)
    model = Transformer(Kit(config, Declare(config, dtype=torch.float64), ParallelGrid())).eval()
    initialise(model, config, seed=1)
    with torch.no_grad():
        for _, parameter in declared(model):  # gains and biases too
            if not parameter.spec.is_matrix:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
        weights = {key: parameter.detach() for key, parameter in declared(model)}
        batch = random_batch(config, samples=3)
        assert batch.target_tokens is not None and batch.target_sequences is not None
        (logits,) = model(batch)
        rows = zip(
            batch.tokens[0].split(batch.sequences[0].tolist()),
            batch.target_tokens[0].split(batch.target_sequences[0].tolist()),
            strict=True,
        )
        expected = torch.cat([reference(config, weights, *row) for row in rows])[batch.label_positions]
    assert float((logits - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
