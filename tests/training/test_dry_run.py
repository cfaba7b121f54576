"""A dry run says what each rank would hold, and refuses what cannot be, before anything is started."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch.distributed as dist

from megacore.errors import ConfigError
from megacore.models.transformer import declarations
from megacore.training.dry_run import estimate
from tests.models import model_config, run_config

WHOLE = {name: math.prod(spec.shape) for name, spec in declarations(model_config()).items()}


def test_one_rank_holds_the_whole_model_and_adam(tmp_path: Path) -> None:
    found = estimate(run_config(tmp_path, tmp_path), 1)
    (stage,) = found.stages
    assert stage.parameters == sum(WHOLE.values())
    assert (stage.weights, stage.gradients, stage.optimizer) == tuple(stage.parameters * n for n in (4, 4, 12))
    assert not dist.is_initialized()


def test_zero_shares_what_its_stage_shares(tmp_path: Path) -> None:
    names = ("zero1", "zero2", "zero3")
    folder = Path(__file__).parents[2] / "ds_configs"
    configs = [run_config(tmp_path, tmp_path, dtype="bf16", deepspeed_config=str(folder / f"{n}.json")) for n in names]
    stages = [estimate(config, 4).stages[0] for config in configs]
    size = stages[0].parameters
    shared = [(size * 2, size * 2), (size * 2, size * 2 // 4), (size * 2 // 4, size * 2 // 4)]
    assert [(stage.weights, stage.gradients) for stage in stages] == shared
    assert {stage.optimizer for stage in stages} == {size * 12 // 4}


def test_experts_are_shared_by_the_expert_parallel_ranks(tmp_path: Path) -> None:
    config = run_config(tmp_path, tmp_path, num_experts=4, expert_parallel_size=2)
    (stage,) = estimate(config, 4).stages
    sizes = {name: math.prod(spec.shape) for name, spec in declarations(config.model).items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    dense = sum(sizes.values()) - experts
    assert experts > 0
    assert stage.parameters == dense + experts // 2
    assert stage.optimizer == 12 * dense // 4 + 12 * (experts // 2) // 2  # two replicas of each half of the experts


def test_the_tied_table_is_on_the_first_and_the_last_stage(tmp_path: Path) -> None:
    found = estimate(run_config(tmp_path, tmp_path, pipeline_parallel_size=2), 2)
    assert sum(stage.parameters for stage in found.stages) == sum(WHOLE.values()) + WHOLE["embeddings.word"]


def test_an_impossible_world_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"3 processes.*tensor_parallel_size=2"):
        estimate(run_config(tmp_path, tmp_path, tensor_parallel_size=2), 3)
    assert not dist.is_initialized()
