"""fp16 with dynamic loss scaling: overflowing steps are skipped, and a resumed run ends with the same bits.

CPUs compute fp16, slowly; DeepSpeed asks its accelerator whether it may, which is answered here for it.
"""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import patch

import pytest

from megacore.checkpoint.reader import CheckpointReader
from megacore.config import RunConfig
from megacore.training.runs import checkpoint_path
from tests.models import reference_losses, run_config, write_instances
from tests.ranks import run_ranks
from tests.training.test_training_layouts import figures, train_all

STEPS = 10


def train_in_fp16(configs: list[RunConfig], copies: list[tuple[str, str] | None]) -> None:
    from deepspeed.accelerator import get_accelerator

    with patch.object(type(get_accelerator()), "is_fp16_supported", lambda accelerator: True):
        train_all(configs, copies)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    folder = tmp_path_factory.mktemp("fp16")
    data = write_instances(folder / "instances")
    settings: dict[str, Any] = {"zero_optimization": {"stage": 2}, "fp16": {"initial_scale_power": 22, "hysteresis": 1}}
    path = folder / "fp16.json"
    path.write_text(json.dumps(settings))

    def config(name: str, **changes: Any) -> RunConfig:
        return run_config(folder / name, data, dtype="fp16", hidden_dropout=0.0, attention_dropout=0.0, **changes)

    made = {
        "whole": config("whole", deepspeed_config=str(path)),
        "resumed": config("resumed", deepspeed_config=str(path)),
        "pp2": config("pp2", pipeline_parallel_size=2),
    }
    first, second = (str(checkpoint_path(made[name].training.output_dir, 5)) for name in ("whole", "resumed"))
    run_ranks(train_in_fp16, 2, list(made.values()), [None, (first, second), None])
    return made


def manifest(config: RunConfig, step: int = STEPS) -> Any:
    return CheckpointReader(checkpoint_path(config.training.output_dir, step)).manifest


def test_steps_that_overflow_halve_the_scale_and_are_not_counted(runs: dict[str, RunConfig]) -> None:
    scales = figures(runs["whole"], "loss_scale")
    skipped = sum(after < before for before, after in zip([2.0**22, *scales], scales, strict=False))
    assert skipped > 0 and scales[-1] == 2.0 ** (22 - skipped)
    progress = manifest(runs["whole"]).progress
    assert (progress.step, progress.optimizer_step) == (STEPS, STEPS - skipped)
    assert progress.loss_scaling.scale == scales[-1]


def test_a_resumed_run_goes_on_at_the_same_scale_and_ends_with_the_same_bits(runs: dict[str, RunConfig]) -> None:
    assert manifest(runs["whole"], STEPS).files == manifest(runs["resumed"], STEPS).files
    assert manifest(runs["whole"]).progress == manifest(runs["resumed"]).progress


def test_losses_follow_those_of_fp32(runs: dict[str, RunConfig]) -> None:
    config = runs["pp2"]
    assert manifest(config).progress.optimizer_step == STEPS  # none was skipped
    expected, _ = reference_losses(config, STEPS)
    assert figures(config, "loss") == pytest.approx(expected, rel=2e-2)  # fp16 has 11 bits of precision
