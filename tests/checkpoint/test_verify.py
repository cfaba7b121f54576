"""``megacore verify``: every family against every layout, what is not finite, and what the exit code says."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from launcher.cli import app
from launcher.start import megacore_command
from megacore.checkpoint.files import layout_of, plan_files
from megacore.checkpoint.manifest import MOMENTS, WEIGHT, Manifest, Progress, parameter_records
from megacore.checkpoint.writer import write_checkpoint
from megacore.communicator import Alone
from megacore.config import ParallelConfig
from megacore.model_config import ModelConfig
from megacore.models.transformer import declarations
from megacore.specs import Region
from tests.models import model_config, write_instances
from tests.training.test_layout_matrix import ENCODER_DECODER, FAMILIES, LLAMA

MODELS: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "prefix lm": {**LLAMA, "objective": "prefix_lm"},
    "rope encoder-decoder": {**ENCODER_DECODER, "position_embedding": "rotary"},
}


def last_gain(config: ModelConfig) -> str:
    """Name the norm before the logits; no bias follows it that is not zero at first."""
    return next(
        name
        for name in reversed(declarations(config))
        if name in ("lm_head.norm.weight", "final_norm.weight", "decoder.final_norm.weight")
        or name.endswith("mlp_residual.norm.weight")  # of a post-norm model's last layer
    )


def write(
    path: Path, config: ModelConfig, changed: dict[tuple[str, str], Any], tensor_parts: int = 1, stages: int = 1
) -> Path:
    """Write the model's initial values, some of them with a factor for its first dim."""
    specs = declarations(config)

    def box(name: str, state: str, region: Region) -> NDArray[np.floating]:
        values = specs[name].initial_values(name, 3, config, region)
        if state != WEIGHT:
            values = values**2
        factor = np.broadcast_to(changed.get((name, state), 1.0), specs[name].shape[0])[slice(*region[0])]
        return values * factor.reshape(-1, *(1,) * (values.ndim - 1)).astype(np.float32)

    layout = layout_of(ParallelConfig(tensor_parallel_size=tensor_parts, pipeline_parallel_size=stages))
    files = plan_files(specs, (WEIGHT, *MOMENTS), layout, lambda name, state: "float32", box)
    records = parameter_records(specs, dict.fromkeys(specs, (1.0, 1.0)))
    manifest = Manifest(model=config, layout=layout, progress=Progress(), parameters=records, files={})
    write_checkpoint(path, Alone(), files, manifest)
    return path


def verify(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["verify", *map(str, words)])


@pytest.mark.parametrize("family", MODELS)
def test_every_family_is_compared_across_layouts(tmp_path: Path, family: str) -> None:
    config = model_config(**MODELS[family])
    one = write(tmp_path / "one", config, {})
    other = write(tmp_path / "other", config, {}, tensor_parts=2, stages=2)
    louder = write(tmp_path / "louder", config, {(last_gain(config), WEIGHT): 1.5}, tensor_parts=2)
    head = "mlm" if family == "bert" else "lm"
    same = verify(other, "--against", one, "--json", tmp_path / "same.json")
    assert same.exit_code == 0, same.output
    assert json.loads((tmp_path / "same.json").read_text())[f"{head}_relative_error"] == 0.0
    # All logits are 1.5 times as large: the difference is half of the largest.
    different = verify(louder, "--against", one, "--json", tmp_path / "louder.json")
    assert different.exit_code == 1 and "not the same function" in different.output
    figures = json.loads((tmp_path / "louder.json").read_text())
    assert figures[f"{head}_relative_error"] == pytest.approx(0.5, rel=1e-4)
    assert figures.get("nsp_relative_error", 0.0) == 0.0


@pytest.mark.parametrize("state", MOMENTS)
def test_a_moment_that_is_not_finite_is_named_with_its_file(tmp_path: Path, state: str) -> None:
    config = model_config()
    name = "layers.1.mlp.up_weight"
    factor = np.ones(40)
    factor[-1] = np.nan  # in the second rank's half of the rows
    path = write(tmp_path / "c", config, {(name, state): factor}, tensor_parts=2)
    result = subprocess.run(megacore_command("verify", path), capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {path}/pp00-tp01-0000.safetensors: {name}/{state} holds values")
    assert result.stderr.count("\n") == 1


def test_what_cannot_be_compared_is_exit_code_2(tmp_path: Path) -> None:
    bert, llama = (write(tmp_path / name, model_config(**MODELS[name]), {}) for name in ("bert", "llama"))
    result = subprocess.run(megacore_command("verify", bert, "--against", llama), capture_output=True, text=True)
    assert result.returncode == 2
    assert "architecture is decoder in one and encoder in the other" in result.stderr
    result = subprocess.run(megacore_command("verify", bert, "--json", "x"), capture_output=True, text=True)
    assert result.returncode == 2 and "--against" in result.stderr


def test_models_that_say_nothing_are_the_same(tmp_path: Path) -> None:
    """Logits that are all zero: 0 / 0 is no difference."""
    config = model_config(**LLAMA)
    silent = [write(tmp_path / name, config, {("final_norm.weight", WEIGHT): 0.0}) for name in "ab"]
    assert verify(silent[0], "--against", silent[1]).exit_code == 0


def test_real_data_is_taken_for_a_comparison(tmp_path: Path) -> None:
    config = model_config()
    one, other = (write(tmp_path / str(parts), config, {}, parts) for parts in (1, 2))
    data = write_instances(tmp_path / "data", count=20)
    figures = tmp_path / "figures.json"
    assert verify(other, "--against", one, "--data", data, "--samples", "16", "--json", figures).exit_code == 0
    assert json.loads(figures.read_text())["samples"] == 16
