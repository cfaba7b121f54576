"""A disk that is full or read-only: one clear error, every earlier checkpoint valid, and the run goes on afterwards."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from launcher.start import megacore_command
from megacore.checkpoint.reader import CheckpointReader
from megacore.growth.verify import check_integrity
from megacore.training.metrics import MetricsLog
from megacore.training.progress import StepProgress
from megacore.training.runs import checkpoint_path, checkpoints
from tests.faults.test_jobs_end_cleanly import assert_one_error, call, config_file
from tests.models import write_instances

STEPS = 16


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB: some checkpoints of the tests' model."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)], capture_output=True, text=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)


@pytest.mark.parametrize("async_save", [True, False], ids=["background", "foreground"])
def test_a_full_disk_stops_a_run_at_its_last_good_checkpoint(tmp_path: Path, disk: Path, async_save: bool) -> None:
    data = write_instances(tmp_path / "data")
    settings = {"train_steps": STEPS, "save_interval": 1, "eval_interval": 0, "keep_last": 99}
    config = config_file(disk, data, **settings, async_save=async_save)
    result = call(megacore_command("train", config))
    good = checkpoints(disk / "run")
    assert 0 < len(good) < STEPS
    failed = checkpoint_path(disk / "run", len(good) + 1)
    assert_one_error(result, str(failed), "No space left on device", f"the last good checkpoint is {good[-1]}")
    for path in good:
        check_integrity(CheckpointReader(path))
    assert (disk / "run" / "checkpoints" / "latest").readlink() == Path(good[-1].name)
    remount(disk, "size=64m")
    assert call(megacore_command("train", config)).returncode == 0
    assert len(checkpoints(disk / "run")) == STEPS


def test_a_last_save_that_fails_is_no_success(tmp_path: Path, disk: Path) -> None:
    config = config_file(disk, write_instances(tmp_path / "data"), train_steps=2, save_interval=2, eval_interval=0)
    (disk / "filler").write_bytes(bytes(1_900_000))
    result = call(megacore_command("train", config))
    assert_one_error(result, str(checkpoint_path(disk / "run", 2)), "No space left", "the run has no checkpoint yet")
    assert "old checkpoints" not in result.stdout and "saved" not in result.stdout


def test_a_read_only_disk_is_named_before_anything_is_trained(tmp_path: Path, disk: Path) -> None:
    config = config_file(disk, write_instances(tmp_path / "data"), train_steps=2, save_interval=2)
    remount(disk, "ro")
    result = call(megacore_command("train", config))
    assert_one_error(result, str(disk / "run"), "Read-only file system")
    assert "step" not in result.stdout


def test_figures_that_cannot_be_logged_do_not_end_a_run(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 1)
    whole = log._lines
    with redirect_stdout(StringIO()) as said, Path("/dev/full").open("a") as full:
        display = StepProgress(0, 2, enabled=True)
        log.write("train", 1, {"loss": 3.0})
        log._lines = full
        for step in (2, 3):
            with display.surviving("figures could not be logged"):
                log.write("train", step, {"loss": 2.0})
        with display.surviving("figures could not be logged"):
            full.close()
        log._lines = whole
        log.write("train", 4, {"loss": 1.0})
        log.close()
    assert said.getvalue().count("No space left on device") == 1
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"split": "train", "step": 1, "loss": 3.0}',
        '{"split": "train", "step": 4, "loss": 1.0}',
    ]
