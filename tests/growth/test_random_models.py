"""Growth of models that nobody would think of: drawn at random, grown once or twice, compared in float64."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megacore.checkpoint.load import load_model
from megacore.checkpoint.reader import CheckpointReader
from megacore.errors import ConfigError
from megacore.growth.plan import Symmetry, make_plan
from megacore.model_config import OBJECTIVES, ModelConfig
from tests.growth.small import batch_of, grow, relative_errors, save, trained_model
from tests.models import MODEL

CASES = 40


def drawn_model(rng: random.Random) -> ModelConfig:
    architecture = rng.choice(list(OBJECTIVES))
    positions = ["learned", "rotary", "rotary_interleaved", "relative", "none"]
    heads = rng.choice([2, 4])
    return ModelConfig(
        **{
            **MODEL,
            "architecture": architecture,
            "objective": rng.choice(OBJECTIVES[architecture]),
            "num_attention_heads": heads,
            "num_key_value_heads": rng.choice([n for n in (1, 2, 4) if heads % n == 0]),
            "head_dim": rng.choice([4, 6]),
            "num_hidden_layers": rng.choice([2, 3]),
            "position_embedding": rng.choice(positions),
            "type_vocab_size": rng.choice([0, 2]),
            "norm": rng.choice(["layer_norm", "rms_norm"]),
            "norm_eps": rng.choice([1e-5, 1e-12]),
            "norm_affine": rng.random() < 0.8,
            "residual": rng.choice(["post_norm", "pre_norm", "deep_norm", "sub_norm", "rezero"]),
            "attention_scale": rng.choice([0.0, 0.3]),
            **{
                key: rng.random() < 0.5
                for key in (
                    "embedding_norm",
                    "gated_mlp",
                    "attention_bias",
                    "linear_bias",
                    "qk_norm",
                    "tie_word_embeddings",
                    "lm_transform",
                    "lm_bias",
                )
            },
        }
    )


def drawn_sizes(rng: random.Random, model: ModelConfig) -> dict[str, Any]:
    heads, keys = model.num_attention_heads, model.num_key_value_heads
    factor = rng.choice([1, 2, 3])
    sizes = {
        "hidden_size": model.hidden_size + rng.choice([0, 1, 5, 12, model.hidden_size]),
        "num_attention_heads": heads * factor,
        "num_key_value_heads": keys * rng.choice([1, factor]),
        "head_dim": model.head_dim + rng.choice([0, 2, model.head_dim]),
        "intermediate_size": model.intermediate_size + rng.choice([0, 13, model.intermediate_size]),
        "num_hidden_layers": model.num_hidden_layers + rng.choice([0, 1, 2]),
        "vocab_size": model.vocab_size + rng.choice([0, 27]),
    }
    return {key: size for key, size in sizes.items() if rng.random() < 0.6}


def test_most_of_what_is_drawn_grows() -> None:
    grown = 0
    for seed in range(CASES):
        rng = random.Random(seed)
        model = drawn_model(rng)
        rng.choice([1, 2])
        try:
            grown += make_plan(model, drawn_sizes(rng, model), Symmetry()).target != model
        except ConfigError:
            continue
    assert grown >= CASES // 2


@pytest.mark.parametrize("seed", range(CASES))
def test_whatever_grows_computes_the_same_and_the_rest_is_refused(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    model, optimizer = trained_model(drawn_model(rng))
    save(model, optimizer, tmp_path / "0", parts=1)
    for number in range(rng.choice([1, 2])):
        before = CheckpointReader(tmp_path / str(number)).manifest.model
        sizes = drawn_sizes(rng, before)
        try:
            make_plan(before, sizes, Symmetry())
        except ConfigError:
            return
        large = load_model(grow(tmp_path / str(number), tmp_path / str(number + 1), sizes), torch.float64)
        assert max(relative_errors(model, large, batch_of(model.config, 99))) <= 1e-11, (before, sizes)
