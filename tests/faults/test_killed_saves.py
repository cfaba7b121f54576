"""A job killed at any instant leaves valid checkpoints; a run killed again and again comes to the same end."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil

from launcher.start import deepspeed_command
from megacore.checkpoint.diff import tensor_differences
from megacore.checkpoint.manifest import STATES, Layout, Manifest, Progress, parameter_records
from megacore.checkpoint.pieces import Piece
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import PieceToWrite
from megacore.communicator import Alone
from megacore.growth.verify import check_integrity
from megacore.models.transformer import declarations
from megacore.training.runs import (
    checkpoint_path,
    checkpoints,
    point_latest,
    remove_leftovers,
    remove_old,
)
from megacore.training.saver import Saver
from tests.faults.test_jobs_end_cleanly import ENVIRONMENT, call, config_file
from tests.models import model_config, write_instances

KILLS = 30
STEPS = 30
CONFIG = model_config(vocab_size=1009, hidden_size=64, intermediate_size=256)
SPECS = declarations(CONFIG)


def save_until_killed(run: Path) -> None:
    """Save back to back in the background, as a run does: each checkpoint holds its own step's number everywhere."""
    remove_leftovers(run)
    found = checkpoints(run)
    step = int(found[-1].name[5:]) if found else 0
    values = {name: np.full(spec.shape, step, np.float32) for name, spec in SPECS.items()}
    saver = Saver(Alone(), in_background=True)

    records = parameter_records(SPECS, dict.fromkeys(SPECS, (1.0, 1.0)))

    def done(path: Path) -> None:
        point_latest(path)
        remove_old(run, keep_last=2)

    def piece(name: str, state: str) -> PieceToWrite:
        region = tuple((0, size) for size in SPECS[name].shape)
        return PieceToWrite(Piece(name, state, region, None, "float32"), lambda: [values[name]])

    while True:
        step += 1
        saver.wait_for_copy()
        for array in values.values():
            array[...] = step  # while the step before may still be being written
        path = checkpoint_path(run, step)
        pieces = [piece(name, state) for name in SPECS for state in STATES]
        manifest = Manifest(model=CONFIG, layout=Layout(), progress=Progress(step=step), parameters=records, files={})
        saver.save(path, pieces, manifest, partial(done, path))


def assert_sound(run: Path) -> None:
    """Check every checkpoint of a run down to its values, and where ``latest`` points."""
    found = checkpoints(run)
    for path in found:
        reader = CheckpointReader(path)
        check_integrity(reader)
        step = int(path.name[5:])
        assert reader.manifest.progress.step == step
        assert all((reader.read(name, state) == step).all() for name in SPECS for state in STATES)
    link = run / "checkpoints" / "latest"
    if link.is_symlink():
        assert link.readlink().name in [path.name for path in found[-2:]]
    else:  # killed before the first was whole, or in the instant between the two
        assert len(found) <= 1


def test_a_kill_at_any_instant_of_a_save_leaves_valid_checkpoints(tmp_path: Path) -> None:
    rng = random.Random(0)
    # Processes that have everything imported already, so that nearly every kill hits a save.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    half_written, steps = 0, [0]
    for _ in range(KILLS):
        before = set(checkpoints(tmp_path))
        victim = context.Process(target=save_until_killed, args=(tmp_path,))
        victim.start()
        wait_for(lambda before=before: set(checkpoints(tmp_path)) - before)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.3))
        victim.kill()
        victim.join()
        half_written += any((tmp_path / "checkpoints").glob("step-*.incomplete"))
        assert_sound(tmp_path)
        steps.append(int(checkpoints(tmp_path)[-1].name[5:]))
    assert all(later > earlier for earlier, later in itertools.pairwise(steps))
    assert half_written > KILLS // 3  # most of the time is spent writing
    remove_leftovers(tmp_path)
    left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert left == {"latest", *(path.name for path in checkpoints(tmp_path))}


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_tree(job: subprocess.Popen[bytes]) -> None:
    """Kill a launcher with all its ranks, the launcher first so that it can end nothing in order."""
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in processes:
        process.kill()
    job.wait()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []


def test_a_run_killed_three_times_comes_to_the_same_end(tmp_path: Path) -> None:
    """Two tensor-parallel ranks, saved at every step in the background."""
    data = write_instances(tmp_path / "data")
    rng = random.Random(1)
    settings = {"tensor_parallel_size": 2, "train_steps": STEPS, "save_interval": 1, "eval_interval": 0, "keep_last": 2}
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    killed, whole = (config_file(tmp_path / name, data, **settings) for name in ("killed", "whole"))
    run = tmp_path / "killed" / "run"
    for _ in range(3):
        before = {path.name for path in checkpoints(run)}
        job = subprocess.Popen(deepspeed_command(2, "train", killed), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        wait_for(lambda before=before: {path.name for path in checkpoints(run)} - before)  # type: ignore[misc]
        time.sleep(rng.uniform(0, 0.2))
        kill_tree(job)
        assert before != {path.name for path in checkpoints(run)}
        for path in checkpoints(run):
            check_integrity(CheckpointReader(path))
        assert not checkpoint_path(run, STEPS).exists()
    for config in (killed, whole):
        result = call(deepspeed_command(2, "train", config))
        assert result.returncode == 0, result.stdout + result.stderr
    ends = [CheckpointReader(checkpoint_path(tmp_path / name / "run", STEPS)) for name in ("killed", "whole")]
    assert not list(tensor_differences(*ends))
    assert ends[0].manifest.progress == ends[1].manifest.progress
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"latest", f"step-{STEPS - 1:08d}", f"step-{STEPS:08d}"}
    assert os.readlink(run / "checkpoints" / "latest") == f"step-{STEPS:08d}"
