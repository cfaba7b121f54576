"""RoFormerV2, and every residual scheme, against plain references written from their definitions."""

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
from megacore.nn.residual import branch_gain, stream_scale
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared, initialise
from tests.models import model_config

V2: dict[str, Any] = {
    "objective": "mlm",
    "position_embedding": "rotary_interleaved",
    "norm": "rms_norm",
    "norm_affine": False,
    "norm_eps": 1e-7,
    "activation": "relu",
    "attention_bias": False,
    "linear_bias": False,
    "lm_transform": False,
    "lm_bias": False,
}
PLAIN: dict[str, Any] = {**V2, "norm": "layer_norm", "position_embedding": "none"}
CASES: dict[str, dict[str, Any]] = {
    "roformer v2": V2,
    "post_norm": PLAIN,
    **{name: {**PLAIN, "residual": name} for name in ("pre_norm", "deep_norm", "sub_norm", "rezero")},
}


def reference(config: ModelConfig, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Compute the logits of one sequence in plain torch. ids: [2, length], tokens and segments."""
    size, length = config.head_dim, ids.shape[1]

    def norm(x: torch.Tensor) -> torch.Tensor:
        centred = x if config.norm == "rms_norm" else x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + config.norm_eps)

    def turned(x: torch.Tensor) -> torch.Tensor:
        if config.position_embedding == "none":
            return x
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        rate = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * rate
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    def attention(x: torch.Tensor, layer: str) -> torch.Tensor:
        query = turned(torch.einsum("sh,ndh->nsd", x, weights[f"{layer}attention.query_weight"]))
        key, value = torch.einsum("sh,cndh->cnsd", x, weights[f"{layer}attention.key_value_weight"])
        scores = query @ turned(key).transpose(-1, -2) / math.sqrt(size)
        context = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
        context = norm(context) if config.residual == "sub_norm" else context
        return context @ weights[f"{layer}attention.output_weight"].flatten(1).T

    def mlp(x: torch.Tensor, layer: str) -> torch.Tensor:
        inner = F.relu(x @ weights[f"{layer}mlp.up_weight"].T)
        return (norm(inner) if config.residual == "sub_norm" else inner) @ weights[f"{layer}mlp.down_weight"].T

    x = norm(weights["embeddings.word"][ids[0]] + weights["embeddings.segment"][ids[1]])
    for number in range(config.num_hidden_layers):
        layer = f"layers.{number}."
        for branch, name in ((attention, "attention"), (mlp, "mlp")):
            if config.residual in ("pre_norm", "sub_norm"):
                x = x + branch(norm(x), layer)
            elif config.residual == "rezero":
                x = x + weights[f"{layer}{name}_residual.gate"] * branch(x, layer)
            else:
                alpha = (2 * config.num_hidden_layers) ** 0.25 if config.residual == "deep_norm" else 1.0
                x = norm(alpha * x + branch(x, layer))
    x = norm(x) if config.residual in ("pre_norm", "sub_norm") else x
    return x @ weights["embeddings.word"].T


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_definition(name: str) -> None:
    config = model_config(**CASES[name])
    model = Transformer(Kit(config, Declare(config, dtype=torch.float64), ParallelGrid())).eval()
    initialise(model, config, seed=1)
    with torch.no_grad():
        for key, parameter in declared(model):
            if key.endswith("gate"):
                parameter.fill_(0.7)
        weights = {key: parameter.detach() for key, parameter in declared(model)}
        batch = random_batch(config, samples=3)
        (logits,) = model(batch)
        rows = batch.tokens[:2].split(batch.sequences[0].tolist(), dim=1)
        expected = torch.cat([reference(config, weights, row) for row in rows])[batch.label_positions]
    assert float((logits - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


def test_deepnorm_and_sub_ln_constants_are_the_published_ones() -> None:
    def constants(**changes: Any) -> tuple[float, float]:
        config = model_config(**changes)
        return stream_scale(config, "encoder"), branch_gain(config, "encoder")

    expected = {1000: (6.687, 0.1057), 100: (3.761, 0.188), 18: (2.449, 0.2887)}
    for layers, values in expected.items():
        found = constants(residual="deep_norm", num_hidden_layers=layers)
        assert found == pytest.approx(values, rel=1e-3)
    both = model_config(
        architecture="encoder_decoder", residual="deep_norm", num_hidden_layers=100, num_decoder_layers=100
    )
    assert (stream_scale(both, "encoder"), branch_gain(both, "encoder")) == pytest.approx((3.4157, 0.2063), rel=1e-3)
    assert (stream_scale(both, "decoder"), branch_gain(both, "decoder")) == pytest.approx((4.1618, 0.1699), rel=1e-3)
    sub = model_config(residual="sub_norm", num_hidden_layers=12)
    assert branch_gain(sub, "encoder") == pytest.approx(math.sqrt(math.log(24)))


def test_initial_spreads() -> None:
    """DeepNorm's beta is on values, outputs and both feed-forward matrices; RoFormerV2's spread falls with fan-in."""
    sizes = {"hidden_size": 240, "num_attention_heads": 4, "intermediate_size": 960}
    deep = model_config(residual="deep_norm", initialization="xavier", **sizes)
    model = Transformer(Kit(deep, Declare(deep), ParallelGrid()))
    initialise(model, deep, seed=1)
    std = {key.removeprefix("layers.0."): float(parameter.detach().std()) for key, parameter in declared(model)}
    beta, square, wide = (8 * 2) ** -0.25, math.sqrt(2 / 480), math.sqrt(2 / 1200)
    key, value = dict(declared(model))["layers.0.attention.key_value_weight"].detach()
    found = [std["attention.query_weight"], float(key.std()), float(value.std()), std["attention.output_weight"]]
    assert found == pytest.approx([square, square, beta * square, beta * square], rel=0.02)
    assert [std["mlp.up_weight"], std["mlp.down_weight"]] == pytest.approx([beta * wide, beta * wide], rel=0.02)
    v2 = model_config(**{**V2, "initialization": "roformer_v2", **sizes})
    model = Transformer(Kit(v2, Declare(v2), ParallelGrid()))
    initialise(model, v2, seed=1)
    for name, fan in (("layers.0.mlp.up_weight", 240), ("layers.0.mlp.down_weight", 960), ("embeddings.word", 240)):
        values = dict(declared(model))[name].detach()
        spread = (fan * v2.num_hidden_layers) ** -0.5
        assert float(values.std()) == pytest.approx(spread, rel=0.02)
        assert float(values.abs().max()) <= 2 * 1.13684723 * spread * (1 + 1e-6)
