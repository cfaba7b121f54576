"""Real jobs of several processes: a fault gives one clear error, no hang, no half-written output."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launcher.start import deepspeed_command, megacore_command, mpi_command
from megacore.checkpoint.reader import CheckpointReader
from megacore.training.runs import checkpoint_path, checkpoints, lock_run
from tests.models import run_config, write_instances

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
LIMIT = 30
"""Seconds within which a job with a fault must have ended."""


def call(command: Sequence[str], timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)


def assert_one_error(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    lines = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error:")]
    assert result.returncode != 0
    assert len(lines) == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in lines[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instances(tmp_path_factory.mktemp("data") / "instances")


def config_file(folder: Path, data: Path, **changes: Any) -> Path:
    config = run_config(folder / "run", data, **changes)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A checkpoint that two tensor-parallel ranks saved."""
    folder = tmp_path_factory.mktemp("trained")
    config = config_file(folder, data, tensor_parallel_size=2, train_steps=2, save_interval=2)
    result = call(deepspeed_command(2, "train", config))
    assert result.returncode == 0, result.stdout + result.stderr
    return checkpoint_path(folder / "run", 2)


def test_a_killed_run_goes_on_to_the_same_end(tmp_path: Path, data: Path) -> None:
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    steps = {"train_steps": 60, "save_interval": 4, "eval_interval": 0}
    killed, whole = (config_file(tmp_path / name, data, **steps) for name in ("killed", "whole"))
    victim = subprocess.Popen(megacore_command("train", killed), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not checkpoints(tmp_path / "killed" / "run") and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL
    left = checkpoints(tmp_path / "killed" / "run")
    assert left and not checkpoint_path(tmp_path / "killed" / "run", 60).exists()
    for config in (killed, whole):
        result = call(megacore_command("train", config))
        assert result.returncode == 0, result.stderr
    first, second = (CheckpointReader(checkpoint_path(tmp_path / n / "run", 60)).manifest for n in ("killed", "whole"))
    assert first.files == second.files and first.progress == second.progress


def test_a_job_ends_when_one_of_its_ranks_is_killed(tmp_path: Path, data: Path) -> None:
    config = config_file(tmp_path, data, tensor_parallel_size=2, train_steps=100_000, save_interval=5)
    job = subprocess.Popen(deepspeed_command(2, "train", config), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not checkpoints(tmp_path / "run") and time.monotonic() < deadline:
        time.sleep(0.05)
    processes = psutil.Process(job.pid).children(recursive=True)
    ranks = [process for process in processes if "launcher" in process.cmdline() and "train" in process.cmdline()]
    workers = [process for process in ranks if "--module" not in process.cmdline()]
    assert len(workers) == 2
    workers[1].kill()
    assert job.wait(LIMIT) != 0
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
    CheckpointReader(checkpoints(tmp_path / "run")[-1]).check_coverage()


def damaged(trained: Path, folder: Path, how: str) -> Path:
    path = folder / "damaged"
    shutil.copytree(trained, path)
    victim = path / "rank00001.safetensors"
    if how == "truncated":
        os.truncate(victim, 1000)
    elif how == "altered":
        content = bytearray(victim.read_bytes())
        content[-5] ^= 4
        victim.write_bytes(content)
    else:
        victim.unlink()
    return path


@pytest.mark.parametrize("how", ["truncated", "altered", "missing"])
def test_growing_a_damaged_checkpoint_ends_with_one_error(trained: Path, tmp_path: Path, how: str) -> None:
    source = damaged(trained, tmp_path, how)
    result = call(mpi_command(2, "grow", source, tmp_path / "out", "intermediate_size=80"), LIMIT)
    assert_one_error(result, "rank00001.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged"]


def test_training_from_a_damaged_checkpoint_ends_with_one_error(trained: Path, tmp_path: Path, data: Path) -> None:
    """Only the second rank reads the damaged file's last tensors; the first must not wait for it."""
    source = damaged(trained, tmp_path, "altered")
    config = config_file(tmp_path, data, tensor_parallel_size=2, initial_checkpoint=str(source))
    result = call(deepspeed_command(2, "train", config), LIMIT)
    assert_one_error(result, "rank00001.safetensors")
    assert checkpoints(tmp_path / "run") == []


def test_training_on_a_truncated_data_file_ends_with_one_error(tmp_path: Path) -> None:
    data = write_instances(tmp_path / "instances")
    os.truncate(data / "all.safetensors", 500)
    config = config_file(tmp_path, data, tensor_parallel_size=2)
    assert_one_error(call(deepspeed_command(2, "train", config), LIMIT), "all.safetensors", "500 bytes")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["hidden_size=48", "num_attention_heads=8", "tensor_parallel_size=3"], ["tensor_parallel_size=3", "8"]),
        (["hidden_size=12"], ["hidden_size=12", "smaller"]),
        (["activation=relu"], ["activation", "cannot be changed"]),
        (["hiden_size=48"], ["hidden_size"]),
        (["intermediate_size"], ["key=value"]),
    ],
)
def test_impossible_growth_ends_with_one_error(
    trained: Path, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    result = call(mpi_command(2, "grow", trained, tmp_path / "out", *words), LIMIT)
    assert_one_error(result, *parts)
    assert list(tmp_path.iterdir()) == []


def test_a_world_of_the_wrong_size_ends_with_one_error(tmp_path: Path, data: Path) -> None:
    config = config_file(tmp_path, data, tensor_parallel_size=4)
    assert_one_error(call(deepspeed_command(2, "train", config), LIMIT), "2 processes", "tensor_parallel_size=4")


def test_tasks_without_ranks_are_not_run_as_copies(tmp_path: Path, data: Path) -> None:
    config = config_file(tmp_path, data)
    assert_one_error(call(mpi_command(2, "train", config), LIMIT), "2 tasks", "deepspeed")


def test_tasks_that_mpi_does_not_connect_are_not_run_as_copies(trained: Path, tmp_path: Path) -> None:
    command = megacore_command("grow", trained, tmp_path / "out", "intermediate_size=80")
    environment = {**ENVIRONMENT, "SLURM_STEP_NUM_TASKS": "2"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert_one_error(result, "2 tasks", "--mpi=pmix")


def test_a_second_job_in_the_same_directory_is_refused(tmp_path: Path, data: Path) -> None:
    config = config_file(tmp_path, data)
    with lock_run(tmp_path / "run"):
        assert_one_error(call(megacore_command("train", config), LIMIT), "another job is training there")
    assert checkpoints(tmp_path / "run") == []


def test_a_changed_model_is_not_resumed(tmp_path: Path, data: Path, trained: Path) -> None:
    config = config_file(tmp_path, data, hidden_size=48, initial_checkpoint=str(trained))
    assert_one_error(call(megacore_command("train", config), LIMIT), "hidden_size=24", "48")


def test_grow_verify_and_inspect_by_hand(trained: Path, tmp_path: Path, data: Path) -> None:
    target = tmp_path / "large"
    sizes = ("hidden_size=48", "num_attention_heads=8", "intermediate_size=80", "tensor_parallel_size=4")
    grown = call(mpi_command(2, "grow", trained, target, *sizes))
    assert grown.returncode == 0, grown.stderr
    assert {file.name for file in target.iterdir()} == {
        "manifest.json",
        *(f"pp00-tp{r:02d}-0000.safetensors" for r in range(4)),
    }
    proof = tmp_path / "proof.json"
    verified = call(megacore_command("verify", target, "--against", trained, "--data", data, "--json", proof))
    assert verified.returncode == 0, verified.stderr
    figures = json.loads(proof.read_text())
    assert max(figures["mlm_relative_error"], figures["nsp_relative_error"]) <= 1e-5
    assert abs(figures["loss_before"] - figures["loss_after"]) <= 1e-5
    shown = call(megacore_command("inspect", target))
    assert (
        "hidden_size=48" in shown.stdout
        and "lineage" in shown.stdout
        and "[vocab 101 (index), hidden 48]" in shown.stdout
    )


def test_verify_tells_a_different_function(trained: Path, tmp_path: Path) -> None:
    grown = tmp_path / "large"
    assert call(megacore_command("grow", trained, grown, "intermediate_size=80")).returncode == 0
    result = call(megacore_command("verify", grown, "--against", trained, "--tolerance", "1e-12"))
    assert result.returncode == 1
    assert "not the same function" in result.stderr


def test_verify_refuses_data_that_the_model_cannot_take(trained: Path, tmp_path: Path) -> None:
    longer = write_instances(tmp_path / "longer", sequence_length=64)
    result = call(megacore_command("verify", trained, "--against", trained, "--data", longer))
    assert_one_error(result, "max_position_embeddings=32", "64 tokens")


def test_every_command_has_help() -> None:
    for words in ([], ["train"], ["grow"], ["verify"], ["inspect"], ["report"], ["demo"], ["data"], ["data", "build"]):
        result = call([sys.executable, "-m", "launcher", *words, "--help"])
        assert result.returncode == 0 and "Usage" in result.stdout
