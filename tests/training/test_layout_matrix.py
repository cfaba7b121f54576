"""Every family computes the same under every kind of parallelism as plain torch does in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.shards import write_dataset
from megacore.communicator import Alone
from megacore.config import RunConfig
from megacore.model_config import ModelConfig
from tests.models import reference_losses, run_config, write_instances
from tests.ranks import run_ranks
from tests.training.test_training_layouts import figures, train_all

STEPS = 10
SIZES: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 8, "num_hidden_layers": 4}
LLAMA: dict[str, Any] = {
    **SIZES,
    "architecture": "decoder",
    "objective": "causal_lm",
    "num_key_value_heads": 4,
    "position_embedding": "rotary",
    "type_vocab_size": 0,
    "norm": "rms_norm",
    "residual": "pre_norm",
    "embedding_norm": False,
    "activation": "silu",
    "gated_mlp": True,
    "attention_bias": False,
    "linear_bias": False,
    "lm_transform": False,
    "lm_bias": False,
}
ENCODER_DECODER: dict[str, Any] = {
    **LLAMA,
    "num_hidden_layers": 2,
    "architecture": "encoder_decoder",
    "objective": "span_corruption",
    "num_key_value_heads": 8,
    "position_embedding": "relative",
    "activation": "gelu_tanh",
    "initializer_range": 0.1,
}
EXPERTS: dict[str, Any] = {**LLAMA, "num_experts": 4, "intermediate_size": 16, "router_aux_loss_coefficient": 0.1}
GROWN: dict[str, Any] = {
    **LLAMA,
    "residual": "deep_norm",
    "norm": "layer_norm",
    "embedding_norm": True,
    "norm_copies": (20,),
    "norm_eps_of": {"layers.1.mlp_residual.norm": 1e-2, "layers.2.attention_residual.norm": 2e-2},
    "stream_scales": {"decoder": 1.3},
    "rope_frequencies": (1.0, 0.3),
}
"""What only growth makes of a model: norms that weigh copies, constants of their own, listed frequencies."""
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": SIZES,
    "llama": LLAMA,
    "encoder-decoder": ENCODER_DECODER,
    "experts": EXPERTS,
    "grown": GROWN,
}


def deepspeed(name: str) -> str:
    return str(Path(__file__).parents[2] / "ds_configs" / f"{name}.json")


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel_size": 2}),
    "tp2 sp": (2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pp2": (2, {"pipeline_parallel_size": 2}),
    "pp2 recompute": (2, {"pipeline_parallel_size": 2, "activation_checkpointing": True}),
    "dp2 zero1": (2, {}),
    "dp2 zero2": (2, {"deepspeed_config": deepspeed("zero2")}),
    "dp2 zero3": (2, {"deepspeed_config": deepspeed("zero3")}),
    "dp2 zero2 offload": (2, {"deepspeed_config": deepspeed("zero2_offload")}),
    "dp2 zero3 offload recompute": (
        2,
        {"deepspeed_config": deepspeed("zero3_offload"), "activation_checkpointing": True},
    ),
    "ulysses2": (2, {"ulysses_parallel_size": 2}),
    "tp4": (4, {"tensor_parallel_size": 4}),
    "pp4": (4, {"pipeline_parallel_size": 4, "pipeline_partition": "uniform"}),
    "tp2 pp2": (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    "tp2 sp pp2": (4, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "sequence_parallel": True}),
    "tp2 dp2": (4, {"tensor_parallel_size": 2}),
    "pp2 dp2": (4, {"pipeline_parallel_size": 2}),
    "zero3 tp2": (4, {"tensor_parallel_size": 2, "deepspeed_config": deepspeed("zero3")}),
    "ulysses2 tp2": (4, {"ulysses_parallel_size": 2, "tensor_parallel_size": 2}),
}
EXPERT_LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    **{name: LAYOUTS[name] for name in ("dp2 zero1", "dp2 zero2", "dp2 zero2 offload")},
    "ep2": (2, {"expert_parallel_size": 2}),
    "ep2 zero2 recompute": (
        2,
        {"expert_parallel_size": 2, "deepspeed_config": deepspeed("zero2"), "activation_checkpointing": True},
    ),
    "ep4": (4, {"expert_parallel_size": 4}),
    "ep2 dp4 zero2": (4, {"expert_parallel_size": 2, "deepspeed_config": deepspeed("zero2")}),
}
GROWN_LAYOUTS = {name: LAYOUTS[name] for name in ("dp2 zero1", "tp2", "tp2 sp", "dp2 zero3", "ulysses2", "tp2 pp2")}
CASES = {
    (family, layout): case
    for family in FAMILIES
    for layout, case in {"experts": EXPERT_LAYOUTS, "grown": GROWN_LAYOUTS}.get(family, LAYOUTS).items()
}


def write_sequences(path: Path, objective: str, count: int = 96, vocab_size: int = 101) -> Path:
    """Write sequences of different lengths that count upwards, some of them in steps of two."""
    rng = np.random.default_rng(1)

    def flat(shortest: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
        lengths = rng.integers(shortest, longest + 1, count)
        rows = [5 + (rng.integers(0, 101) + np.arange(n) * rng.integers(1, 3)) % 96 for n in lengths]
        return np.concatenate(rows).astype(np.uint16), np.cumsum([0, *lengths], dtype=np.int64)

    ids, offsets = flat(8, 32)
    columns: dict[str, Any] = {"input_ids": ids, "offsets": offsets}
    if objective == "lm":
        columns["prefix_length"] = (np.diff(offsets) // 2).astype(np.uint16)
    else:
        columns["target_ids"], columns["target_offsets"] = flat(4, 12)
    about = {"vocab_size": vocab_size, "sequence_length": 32, "objective": objective}
    write_dataset(path, Alone(), "instances", about, [("all", columns, {"instances": count})])
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], RunConfig]:
    """Train every family at every layout for ten steps; one launch per world size."""
    folder = tmp_path_factory.mktemp("matrix")
    data = {
        "bert": write_instances(folder / "mlm"),
        "llama": write_sequences(folder / "lm", "lm"),
        "encoder-decoder": write_sequences(folder / "spans", "span_corruption"),
    }
    data["experts"] = data["grown"] = data["llama"]
    made: dict[tuple[str, str], RunConfig] = {}
    for (family, layout), (_, changes) in CASES.items():
        out = folder / f"{family} {layout}"
        made[family, layout] = run_config(out, data[family], save_interval=100, **FAMILIES[family], **changes)
    for world in (2, 4):
        cases = [config for case, config in made.items() if CASES[case][0] == world]
        run_ranks(train_all, world, cases, [None] * len(cases), timeout=600)
    return made


@pytest.fixture(scope="module")
def references(runs: dict[tuple[str, str], RunConfig]) -> dict[str, tuple[list[float], list[float]]]:
    return {family: reference_losses(runs[family, "dp2 zero1"], STEPS) for family in FAMILIES}


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_losses_and_gradient_norms_equal_one_process_of_plain_torch(
    runs: dict[tuple[str, str], RunConfig],
    references: dict[str, tuple[list[float], list[float]]],
    family: str,
    layout: str,
) -> None:
    losses, norms = references[family]
    assert min(norms) > 0.1  # clipping is active throughout
    assert max(losses) - min(losses) > 0.1  # and the weights move
    config = runs[family, layout]
    assert config.model.hidden_dropout > 0 and config.model.attention_dropout > 0
    assert figures(config, "loss") == pytest.approx(losses, abs=1e-5)
    assert figures(config, "gradient_norm") == pytest.approx(norms, abs=1e-5)


def test_held_out_losses_do_not_depend_on_the_layout(runs: dict[tuple[str, str], RunConfig]) -> None:
    for family in FAMILIES:
        expected = figures(runs[family, "dp2 zero1"], "loss", "validation")
        for layout in (layout for case, layout in CASES if case == family):
            assert figures(runs[family, layout], "loss", "validation") == pytest.approx(expected, abs=1e-5)


def test_the_families_differ(runs: dict[tuple[str, str], RunConfig]) -> None:
    models: list[ModelConfig] = [runs[family, "dp2 zero1"].model for family in FAMILIES]
    assert len({model.architecture for model in models}) == 3
    assert models[1].num_key_value_heads < models[1].num_attention_heads
