"""A conversion's peak memory: the real command on a model that would show if it were held."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from launcher.start import megacore_command
from megacore.checkpoint.files import plan_files
from megacore.checkpoint.manifest import MOMENTS, STATES, WEIGHT, Layout
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import write_checkpoint
from megacore.communicator import Alone
from megacore.convert.imports import fresh_manifest
from megacore.convert.module_names import module_names
from megacore.model_config import ModelConfig
from megacore.specs import Region, region_shape
from tests.models import model_config
from tests.training.test_layout_matrix import LLAMA

BASE = 400_000_000
"""What the interpreter, torch and the blocks that are worked on may take."""
SIZES: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 2304,
    "num_hidden_layers": 8,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
MODEL: ModelConfig = model_config(**{**LLAMA, **SIZES})
"""300 MB of weights, 900 MB with Adam's moments; no tensor of a state is larger than 26 MB."""


def _values(name: str, state: str, region: Region) -> np.ndarray[Any, Any]:
    return np.full(region_shape(region), len(name) + STATES.index(state), np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("memory") / "checkpoint"
    manifest = fresh_manifest(MODEL)
    files = plan_files(manifest.specs(), STATES, Layout(), lambda name, state: "float32", _values)
    write_checkpoint(target, Alone(), files, manifest)
    return target


_MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""
"""Runs a command from a small process: a child's peak begins with what its parent held when it was started."""


def _convert(*words: str | Path) -> int:
    """Run the command; return its peak resident memory in bytes."""
    command = [sys.executable, "-c", _MEASURED, *megacore_command("convert", *words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True, timeout=120)
    return int(done.stdout) * 1024


def _largest_shard(parts: int = 1) -> int:
    shapes = {name: math.prod(spec.shape) / parts for name, spec in fresh_manifest(MODEL).specs().items()}
    return int(4 * max(shapes.values()))


def _in_deepspeeds_layout(source: Path, target: Path) -> None:
    """Write what a ZeRO 1 engine of one replica saves."""
    reader = CheckpointReader(source)
    names = module_names(MODEL, pipeline=False)
    shapes = {theirs: torch.Size(reader.shape(ours)) for theirs, ours in names.items()}
    sizes = np.cumsum([0, *(shape.numel() for shape in shapes.values())]).tolist()
    mapping = {
        name: SimpleNamespace(start=start, numel=stop - start)
        for name, start, stop in zip(names, sizes[:-1], sizes[1:], strict=True)
    }
    flat = {
        state: torch.cat([torch.from_numpy(reader.read(ours, state)).flatten() for ours in names.values()])
        for state in STATES
    }
    moments = {0: {"step": torch.tensor(3.0), **{moment: flat[moment] for moment in MOMENTS}}}
    state = {
        "base_optimizer_state": {"state": moments},
        "single_partition_of_fp32_groups": [flat[WEIGHT]],
        "param_slice_mappings": [mapping],
    }
    target.mkdir()
    torch.save({"optimizer_state_dict": state}, target / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    facts = {"module": {"weights": flat[WEIGHT]}, "param_shapes": [shapes], "global_steps": 3}
    torch.save(facts, target / "mp_rank_00_model_states.pt")


def _as_torch_file(source: Path, target: Path) -> None:
    """Put what a Hugging Face directory's safetensors file holds into a torch file."""
    from safetensors.torch import load_file

    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    torch.save(load_file(source / "model.safetensors"), target / "pytorch_model.bin")


@pytest.fixture
def bounded(tmp_path: Path) -> Callable[..., None]:
    def check(*words: str | Path, parts: int = 1) -> None:
        peak, allowed = _convert(*words), BASE + 2 * _largest_shard(parts)
        print(f"{words[2:]}: {peak / 1e6:.0f} MB of {allowed / 1e6:.0f} MB")
        assert peak <= allowed, f"{peak / 1e6:.0f} MB; allowed are {allowed / 1e6:.0f} MB"

    return check


CUT = ("tensor_parallel_size=4", "pipeline_parallel_size=2")


def test_checkpoints_and_universal_ones(checkpoint: Path, tmp_path: Path, bounded: Callable[..., None]) -> None:
    bounded(checkpoint, tmp_path / "cut", *CUT, parts=4)
    bounded(checkpoint, tmp_path / "universal", "--to", "deepspeed-universal")
    bounded(tmp_path / "universal", tmp_path / "back", *CUT, parts=4)


def test_hugging_face(checkpoint: Path, tmp_path: Path, bounded: Callable[..., None]) -> None:
    bounded(checkpoint, tmp_path / "hf", "--to", "hf")
    bounded(tmp_path / "hf", tmp_path / "from safetensors", *CUT, parts=4)
    _as_torch_file(tmp_path / "hf", tmp_path / "bin")
    bounded(tmp_path / "bin", tmp_path / "from torch", *CUT, parts=4)


def test_deepspeeds_native_files(checkpoint: Path, tmp_path: Path, bounded: Callable[..., None]) -> None:
    _in_deepspeeds_layout(checkpoint, tmp_path / "native")
    (tmp_path / "run.json").write_text(f'{{"model": {MODEL.model_dump_json()}}}')
    bounded(tmp_path / "native", tmp_path / "back", "--config", tmp_path / "run.json", *CUT, parts=4)
    assert CheckpointReader(tmp_path / "back").manifest.progress.optimizer_step == 3


def test_megatron(checkpoint: Path, tmp_path: Path, bounded: Callable[..., None]) -> None:
    bounded(checkpoint, tmp_path / "megatron", "--to", "megatron", *CUT, parts=4)
    bounded(tmp_path / "megatron", tmp_path / "back", *CUT, parts=4)
