"""Configuration: what cannot be is refused, with the key, the value and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megacore.config import ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from megacore.errors import ConfigError
from megacore.settings import load, parse_overrides, validated
from megacore.training.deepspeed_config import resolve_deepspeed_config
from megacore.training.schedule import learning_rate
from tests.models import MODEL

YAML = """
model: {vocab_size: 100, hidden_size: 24, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 40}
training: {output_dir: out, train_steps: 10, global_batch_size: 8, micro_batch_size: 2, learning_rate: 1e-3}
data: {train_data: there}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    return path


def test_overrides_reach_their_section_by_the_key_alone_or_dotted(file: Path) -> None:
    config = load(RunConfig, file, ["hidden_size=48", "training.learning_rate=2e-4", "tensor_parallel_size=2"])
    assert (config.model.hidden_size, config.training.learning_rate) == (48, 2e-4)
    assert config.parallel.tensor_parallel_size == 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["hiden_size=48"], ["hiden_size", "hidden_size"]),
        (["hidden_size=25"], ["num_attention_heads=4", "hidden_size=25", "5"]),
        (["tensor_parallel_size=3"], ["tensor_parallel_size=3", "num_attention_heads=4", "1, 2, 4"]),
        (["tensor_parallel_size=4", "intermediate_size=42"], ["intermediate_size=42", "tensor_parallel_size=4"]),
        (["pipeline_parallel_size=3"], ["pipeline_parallel_size=3", "2 layers", "num_hidden_layers=2"]),
        (["sequence_parallel=true"], ["sequence_parallel=true", "tensor_parallel_size > 1"]),
        (["ulysses_parallel_size=3"], ["ulysses_parallel_size=3", "num_attention_heads=4", "1, 2, 4"]),
        (
            ["ulysses_parallel_size=2", "tensor_parallel_size=2", "sequence_parallel=true"],
            ["sequence_parallel=true", "ulysses_parallel_size=2"],
        ),
        (["expert_parallel_size=2"], ["expert_parallel_size=2", "num_experts"]),
        (["num_experts=4", "num_experts_per_token=5"], ["num_experts_per_token=5", "num_experts=4"]),
        (["num_experts=4", "residual=sub_norm"], ["residual=sub_norm", "num_experts=4"]),
        (["num_experts=4", "expert_parallel_size=3"], ["expert_parallel_size=3", "num_experts=4", "1, 2, 4"]),
        (["num_experts=4", "tensor_parallel_size=2"], ["tensor_parallel_size=2", "num_experts"]),
        (["num_experts=4", "pipeline_parallel_size=2"], ["pipeline_parallel_size=2", "num_experts"]),
        (["objective=causal_lm"], ["objective=causal_lm", "architecture=encoder", "mlm_nsp, mlm"]),
        (["architecture=decoder", "num_key_value_heads=3"], ["num_key_value_heads=3", "num_attention_heads=4"]),
        (["num_key_value_heads=2", "tensor_parallel_size=4"], ["tensor_parallel_size=4", "num_key_value_heads=2"]),
        (["position_embedding=rotary", "head_dim=5"], ["position_embedding=rotary", "head_dim=5"]),
        (["num_decoder_layers=2"], ["num_decoder_layers=2", "encoder_decoder"]),
        (["learning_rate=fast"], ["learning_rate", "fast"]),
        (["learning_rate=-1"], ["learning_rate", "-1", "greater than 0"]),
        (["warmup_steps=11"], ["warmup_steps=11", "train_steps=10"]),
        (["eval_interval=5"], ["eval_interval", "validation_data"]),
        (["hidden_dropout=1.0"], ["hidden_dropout", "1.0", "less than 1"]),
        (["seed"], ["'seed'", "key=value"]),
        (["seed=1", "seed=2"], ["seed", "twice"]),
        (["model.seed=1"], ["model.seed", "training.seed"]),
        (["hidden_size=2024-13-45"], ["hidden_size=2024-13-45", "YAML"]),
    ],
)
def test_impossible_settings_are_refused_by_name(file: Path, words: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load(RunConfig, file, words)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: [1", "YAML"),
        ("- 1", "mapping"),
        ("model:", "model.vocab_size"),
        ("model: 3", "model=3: Input should be"),
        ("modle: {}", "did you mean model"),
        (YAML + "\nmore: 1", "more"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml") as error:
        load(RunConfig, path)
    assert part in str(error.value)


def test_yaml_tags_do_not_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("model: !!python/object/apply:os.system ['touch /tmp/evil']")
    with pytest.raises(ConfigError, match=r"evil\.yaml"):
        load(RunConfig, path)


def test_values_are_read_as_their_types() -> None:
    words = ["a=1e-3", "b=true", "c=text", "d=3", "e=null", "f=[x, y]"]
    assert parse_overrides(words) == {"a": 1e-3, "b": True, "c": "text", "d": 3, "e": None, "f": ["x", "y"]}


@pytest.mark.parametrize(("world", "tensor", "data"), [(1, 1, 1), (8, 2, 4), (6, 3, 2)])
def test_what_is_left_of_the_world_is_data_parallel(world: int, tensor: int, data: int) -> None:
    assert ParallelConfig(tensor_parallel_size=tensor).data_parallel_size(world) == data


def test_a_world_that_is_no_multiple_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 processes.*tensor_parallel_size=2; start 4 proc"):
        ParallelConfig(tensor_parallel_size=2).data_parallel_size(3)


def training(**changes: Any) -> TrainingConfig:
    values = {"output_dir": "o", "train_steps": 10, "global_batch_size": 8, "micro_batch_size": 2}
    return validated(TrainingConfig, {**values, "learning_rate": 1e-3, **changes})


def test_batches_that_do_not_divide_are_refused() -> None:
    assert training().gradient_accumulation_steps(2) == 2
    with pytest.raises(ConfigError, match=r"global_batch_size=8.*micro_batch_size=2 × data_parallel_size=3.*6, 12"):
        training().gradient_accumulation_steps(3)


def test_the_schedule_warms_up_holds_and_decays_linearly() -> None:
    config = training(warmup_steps=4, decay_steps=3, learning_rate=1.0, min_learning_rate=0.2)
    rates = [learning_rate(config, step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 0.8, 0.6, 0.4])


def resolve(tmp_path: Path, content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    return resolve_deepspeed_config(run(path, **changes), data_parallel_size=2)


def run(deepspeed_config: Path, **changes: Any) -> RunConfig:
    values = training(**changes).model_dump() | {"deepspeed_config": str(deepspeed_config)}
    return validated(RunConfig, {"model": MODEL, "training": values, "data": {"train_data": "there"}})


def test_auto_is_filled_in(tmp_path: Path) -> None:
    content = {"train_batch_size": "auto", "zero_optimization": {"stage": 1}, "wall_clock_breakdown": False}
    resolved = resolve(tmp_path, content, dtype="bf16")
    assert resolved == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 1},
        "wall_clock_breakdown": False,
    }


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ({"zero_optimization": {"stage": 1}, "train_batch_size": 16}, "train_batch_size=16"),
        ({"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}, "bf16.enabled=True"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"stage": 0}}, "stage=0"),
        ({}, "stage=0"),
        ({"zero_optimization": 1}, "zero_optimization=1"),
        ({"zero_optimization": {"stage": 1}, "bf16": True}, "bf16=True"),
        ({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}, "data_types"),
        ({"zero_optimization": {"stage": 4}}, "stage=4"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device"),
        ({"zero_optimization": {"stage": 1}, "scheduler": {"type": "WarmupLR"}}, "scheduler"),
        ({"zero_optimization": {"stage": 1}, "optimizer": {"type": "Lamb"}}, "Lamb"),
        (
            {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": {"lr": 1}}},
            "optimizer.params.lr",
        ),
    ],
)
def test_contradictions_in_the_deepspeed_file_are_refused(tmp_path: Path, content: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=r"ds\.json") as error:
        resolve(tmp_path, content)
    assert part in str(error.value)


def test_every_shipped_deepspeed_file_resolves() -> None:
    files = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))
    assert files
    for file in files:
        assert resolve_deepspeed_config(run(file), 2)["train_batch_size"] == 8


@pytest.mark.parametrize("stage", [2, 3])
def test_pipelines_refuse_the_zero_stages_that_deepspeed_cannot_pipeline(tmp_path: Path, stage: int) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    config = run(path)
    config = config.model_copy(update={"parallel": ParallelConfig(pipeline_parallel_size=2)})
    with pytest.raises(ConfigError, match=rf"stage={stage} .*pipeline_parallel_size=2.*zero1\.json"):
        resolve_deepspeed_config(config, 1)


@pytest.mark.parametrize(
    ("zero", "part"), [({"stage": 3}, "stage=3"), ({"stage": 1, "reduce_scatter": False}, "reduce_scatter=false")]
)
def test_experts_refuse_what_deepspeed_would_average_over_other_experts(
    tmp_path: Path, zero: dict[str, Any], part: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    config = run(path)
    config = config.model_copy(update={"model": validated(ModelConfig, {**MODEL, "num_experts": 4})})
    with pytest.raises(ConfigError, match=f"zero_optimization.{part}"):
        resolve_deepspeed_config(config, 1)


def test_model_config_names_divisors() -> None:
    with pytest.raises(ConfigError, match=r"num_attention_heads=5 does not divide hidden_size=24"):
        validated(ModelConfig, {**MODEL, "num_attention_heads": 5})
