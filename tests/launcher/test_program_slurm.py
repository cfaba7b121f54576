"""A programme as a chain of Slurm jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.program.command import program
from launcher.program.run import run_stages
from launcher.program.slurm import Submission, stage_script
from megacore.checkpoint.reader import CheckpointReader
from megacore.errors import ConfigError
from megacore.training.runs import checkpoint_path
from tests.launcher.programs import assert_one_error, call, planned, program_file
from tests.models import write_instances


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instances(tmp_path_factory.mktemp("data") / "instances")


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def test_scripts_have_the_stage_and_every_option(tmp_path: Path, data: Path) -> None:
    def options(values: dict[str, Any]) -> None:
        values["sbatch"] = ["--partition=long"]
        values["stages"][1].update(sbatch=["--mem=5G"], processes=2)

    path = program_file(tmp_path, data, options)
    stages = planned(path)
    script = stage_script(stages[1], Submission(path, 1, ["--time", "1:00:00", "-p", "my part"]))
    lines = directives(script)
    assert lines[-4:] == ["--partition=long", "--mem=5G", "--time 1:00:00", "-p 'my part'"]
    assert {"--nodes=1", "--ntasks-per-node=2", "--job-name=program-02-grow"} <= set(lines)
    assert f"--output={tmp_path}/out/02-grow.log" in lines
    assert script.rstrip().splitlines()[-1].endswith(f"-m launcher program {path} --stage 2 --processes 1")
    assert "--processes" not in stage_script(stages[0], Submission(path))
    with pytest.raises(ConfigError, match="'stray' is no option"):
        stage_script(stages[0], Submission(path, None, ["--exclusive", "--mem=1G", "stray"]))


def test_options_of_sbatch_need_slurm(tmp_path: Path, data: Path) -> None:
    path = program_file(tmp_path, data)
    assert_one_error(call("program", path, "--partition=gpu"), "'--partition=gpu'", "--slurm")
    with pytest.raises(ConfigError, match="--stage and --slurm"):
        program(path, [], dry_run=False, slurm=True, stage=1, processes=None)


def test_a_job_of_several_nodes_is_refused(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    with pytest.raises(ConfigError, match="2 nodes"):
        run_stages(planned(program_file(tmp_path, data)))


@pytest.mark.skipif(
    shutil.which("sbatch") is None or "SLURM_CONF" not in os.environ,
    reason="SLURM_CONF names no Slurm cluster whose nodes share the temporary directory",
)
def test_a_chain_of_jobs_ends_where_a_local_programme_ends(tmp_path: Path, data: Path) -> None:
    (tmp_path / "local").mkdir()
    local = call("program", program_file(tmp_path / "local", data))
    assert local.returncode == 0, local.stderr
    path = program_file(tmp_path, data)
    submitted = call("program", path, "--slurm", "--time=5:00")
    assert submitted.returncode == 0, submitted.stderr
    jobs = ",".join(line.rpartition(" ")[2] for line in submitted.stdout.splitlines()[:3])
    deadline = time.monotonic() + 240
    while queued(jobs) and time.monotonic() < deadline:
        time.sleep(1)
    subprocess.run(["scancel", *jobs.split(",")], timeout=30)
    end = checkpoint_path(tmp_path / "out" / "03-train", 7)
    assert end.exists(), "".join(log.read_text() for log in (tmp_path / "out").glob("*.log"))
    by_hand = checkpoint_path(tmp_path / "local" / "out" / "03-train", 7)
    assert CheckpointReader(end).manifest.files == CheckpointReader(by_hand).manifest.files
    again = call("program", path, "--slurm")
    assert again.returncode == 0 and "all stages are finished" in again.stdout


def queued(jobs: str) -> str:
    return subprocess.run(["squeue", "-h", "-j", jobs], capture_output=True, text=True, timeout=30).stdout
