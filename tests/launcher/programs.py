"""Small programmes for the tests, and the command line that runs them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from launcher.program.config import read_program
from launcher.program.stages import Stage, plan_stages
from launcher.start import megacore_command
from tests.models import MODEL, run_config

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
GROWTH = {"hidden_size": 48, "num_attention_heads": 8, "intermediate_size": 81, "seed": 3}


def program_file(folder: Path, data: Path, change: Callable[[dict[str, Any]], object] = lambda values: None) -> Path:
    """Write a programme: 4 steps, growth, 3 steps at another learning rate."""
    run = run_config(folder, data, eval_interval=0, save_interval=2).model_dump(mode="json")
    del run["training"]["output_dir"], run["training"]["initial_checkpoint"]
    values: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "run": {**run, "model": dict(MODEL)},
        "stages": [
            {"train": {"train_steps": 4}},
            {"grow": dict(GROWTH)},
            {"train": {"train_steps": 3, "learning_rate": 2e-3}},
        ],
    }
    change(values)
    path = folder / "program.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def planned(path: Path) -> list[Stage]:
    return plan_stages(read_program(path), str(path))


def call(*words: str | Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = megacore_command(*words)
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def assert_one_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in lines[0]


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
