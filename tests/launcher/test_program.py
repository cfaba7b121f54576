"""A programme does what its commands do by hand, goes on where it was stopped, and refuses what cannot be."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launcher.program.command import program
from launcher.program.config import read_program
from launcher.program.growth import growth_sizes
from launcher.program.records import count_finished, write_record
from launcher.program.stages import TrainStage
from launcher.start import megacore_command
from megacore.checkpoint.reader import CheckpointReader
from megacore.config import RunConfig
from megacore.errors import ConfigError, DataError, MegacoreError
from megacore.settings import validated
from megacore.training.batches import open_data
from megacore.training.runs import checkpoint_path, checkpoints
from tests.launcher.programs import ENVIRONMENT, GROWTH, assert_one_error, call, edited, planned, program_file
from tests.models import run_config, write_instances

RECIPES = Path(__file__).parents[2] / "recipes" / "demo"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instances(tmp_path_factory.mktemp("data") / "instances")


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(MegacoreError) as caught:
        planned(path)
    for part in parts:
        assert part in str(caught.value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A programme that was run to its end in one go."""
    path = program_file(tmp_path_factory.mktemp("finished"), data)
    result = call("program", path)
    assert result.returncode == 0, result.stdout + result.stderr
    return path


def copied(finished: Path, folder: Path) -> Path:
    """Copy a programme with what it has written, as if it were moved."""
    shutil.copytree(finished.parent / "out", folder / "out", symlinks=True)
    values = yaml.safe_load(finished.read_text())
    values["output_dir"] = str(folder / "out")
    path = folder / "program.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_a_programme_ends_where_its_commands_end(finished: Path, tmp_path: Path, data: Path) -> None:
    small = run_config(tmp_path / "small", data, eval_interval=0, save_interval=2, train_steps=4)
    large = run_config(
        tmp_path / "large", data, eval_interval=0, save_interval=2, train_steps=3, learning_rate=2e-3,
        hidden_size=48, num_attention_heads=8, intermediate_size=81, initial_checkpoint=str(tmp_path / "grown"),
    )  # fmt: skip
    for config in (small, large):
        name = config.training.output_dir.name
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    sizes = ("hidden_size=48", "num_attention_heads=8", "intermediate_size=81", "--seed", "3")
    for words in (
        ("train", tmp_path / "small.yaml"),
        ("grow", checkpoint_path(tmp_path / "small", 4), tmp_path / "grown", *sizes),
        ("train", tmp_path / "large.yaml"),
    ):
        result = call(*words)
        assert result.returncode == 0, result.stderr
    by_hand = CheckpointReader(checkpoint_path(tmp_path / "large", 7)).manifest
    made = CheckpointReader(checkpoint_path(finished.parent / "out" / "03-train", 7)).manifest
    assert made.files == by_hand.files  # with the checksums of every tensor


def test_a_finished_programme_is_not_run_again(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished.parent / "out").rglob("*") if path.is_file()}
    result = call("program", finished)
    assert result.returncode == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["01-train", "02-grow", "03-train"]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_programme_stopped_in_a_stage_goes_on_to_the_same_end(tmp_path: Path, data: Path) -> None:
    """With two processes, whose launcher and ranks must all be gone when the programme is."""
    ends = []
    for name in ("stopped", "whole"):
        (tmp_path / name).mkdir()
        path = program_file(tmp_path / name, data, two_processes)
        if name == "stopped":
            stop_in_first_stage(path)
        result = call("program", path, "--stage", "1")
        assert result.returncode == 0, result.stdout + result.stderr
        ends.append(CheckpointReader(checkpoint_path(path.parent / "out" / "01-train", 40)).manifest)
        assert count_finished(planned(path)) == 1
    assert ends[0].files == ends[1].files and ends[0].progress == ends[1].progress


def two_processes(values: dict[str, Any]) -> None:
    values["processes"] = 2
    values["stages"][0]["train"] = {"train_steps": 40, "save_interval": 10, "tensor_parallel_size": 2}
    values["stages"][1]["grow"]["intermediate_size"] = 80


def stop_in_first_stage(path: Path) -> None:
    job = subprocess.Popen(megacore_command("program", path), env=ENVIRONMENT, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)  # fmt: skip
    run = path.parent / "out" / "01-train"
    deadline = time.monotonic() + 60
    while not checkpoints(run) and time.monotonic() < deadline:
        time.sleep(0.02)
    processes = psutil.Process(job.pid).children(recursive=True)
    assert len(processes) >= 3  # a launcher and two ranks at least
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 2 and "01-train was stopped by SIGTERM" in err and "Traceback" not in out + err
    assert not any(is_alive(process) for process in processes)
    assert checkpoints(run) and not checkpoint_path(run, 40).exists()


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_a_stage_alone_waits_for_those_before_it(tmp_path: Path, data: Path) -> None:
    path = program_file(tmp_path, data)
    with pytest.raises(ConfigError, match="--stage 2: 01-train, which comes before it, is not finished"):
        program(path, [], dry_run=False, slurm=False, stage=2, processes=None)
    with pytest.raises(ConfigError, match=r"--stage 4: .* has 3 stages"):
        program(path, [], dry_run=False, slurm=False, stage=4, processes=None)
    assert not list(tmp_path.glob("out/0*"))


def test_a_dry_run_shows_the_stages_and_writes_nothing(tmp_path: Path, data: Path) -> None:
    path = program_file(tmp_path, data)
    result = call("program", path, "--dry-run")
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["01-train", "02-grow", "03-train"]
    assert "24 × 2" in lines[1] and "48 × 2" in lines[3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["program.yaml"]


@pytest.mark.parametrize(
    ("stage", "section", "key", "value", "parts"),
    [
        (0, "train", "learning_rate", 5.0, ("01-train", "learning_rate=0.01", "learning_rate=5.0")),
        (0, "train", "train_steps", 2, ("01-train", "train_steps=4", "train_steps=2")),
        (1, "grow", "seed", 4, ("02-grow", "seed=3", "seed=4")),
        (1, "grow", "noise_scale", 0.1, ("02-grow", "no noise_scale", "noise_scale=0.1")),
    ],
)
def test_a_changed_finished_stage_is_refused(
    finished: Path, tmp_path: Path, stage: int, section: str, key: str, value: object, parts: tuple[str, ...]
) -> None:
    path = edited(copied(finished, tmp_path), lambda values: values["stages"][stage][section].update({key: value}))
    with pytest.raises(ConfigError) as caught:
        count_finished(planned(path))
    for part in ("is finished", *parts):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({}, "nothing to grow"),
        ({"hidden_size": 48, "symmetry": "odd"}, "--symmetry odd: use noise, uneven or none"),
        ({"hidden_size": 48, "symmetry": "none", "noise_scale": 0.1}, "--noise-scale 0.1"),
        ({"hidden_size": 48, "verify": "maybe"}, "--verify maybe"),
        ({"hidden_size": 48, "optimizer": "none"}, "--optimizer none"),
        ({"hidden_size": 48, "dtype": "fp16"}, "--dtype fp16"),
        ({"hidden_size": 48, "tensor_parallel_size": 2, "sequence_parallel": True}, "'sequence_parallel'"),
    ],
)
def test_what_grow_would_refuse_is_refused_before_the_first_stage(
    tmp_path: Path, data: Path, section: dict[str, object], part: str
) -> None:
    path = edited(program_file(tmp_path, data), lambda values: values["stages"][1].update(grow=section))
    with pytest.raises(ConfigError) as caught:
        planned(path)
    assert "stage 2 (grow): " in str(caught.value) and part in str(caught.value)


def test_a_moved_programme_is_still_finished(finished: Path, tmp_path: Path) -> None:
    assert count_finished(planned(copied(finished, tmp_path))) == 3


def test_stages_can_be_added_and_those_to_come_changed(finished: Path, tmp_path: Path) -> None:
    path = copied(finished, tmp_path)
    shutil.rmtree(tmp_path / "out" / "03-train")
    edited(path, lambda values: values["stages"][2]["train"].update(learning_rate=1e-3))
    edited(path, lambda values: values["stages"].append({"train": {"train_steps": 5}}))
    stages = planned(path)
    assert count_finished(stages) == 2
    assert [stage.result.name for stage in stages if isinstance(stage, TrainStage)] == [
        "step-00000004", "step-00000007", "step-00000012"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda out: shutil.rmtree(out / "02-grow"), "02-grow, which comes before it, is not finished"),
        (lambda out: (out / "02-grow.json").unlink(), "its record"),
        (lambda out: (out / "02-grow.json").write_text("{}"), "altered"),
        (lambda out: (out / "01-train.json").rename(out / "01-grow.json"), "01-grow.json is of another stage 1"),
    ],
)
def test_a_directory_in_disorder_is_refused(
    finished: Path, tmp_path: Path, damage: Callable[[Path], object], part: str
) -> None:
    path = copied(finished, tmp_path)
    damage(tmp_path / "out")
    with pytest.raises(ConfigError, match=part):
        count_finished(planned(path))


def test_a_checkpoint_beyond_a_shortened_stage_is_named(finished: Path, tmp_path: Path) -> None:
    path = edited(copied(finished, tmp_path), lambda values: values["stages"][2]["train"].update(train_steps=9))
    stages = planned(path)
    for name in ("03-train.json", "03-train"):
        target = tmp_path / "out" / name
        if target.is_file():
            target.unlink()
    write_record(stages[2])  # as if it had been begun with 9 steps, of which 3 are done
    edited(path, lambda values: values["stages"][2]["train"].update(train_steps=1))
    with pytest.raises(ConfigError, match=r"step-00000007 is beyond this stage's train_steps=1"):
        count_finished(planned(path))


def change_stage(number: int, stage: object) -> Callable[[dict[str, Any]], object]:
    return lambda values: values["stages"].__setitem__(number - 1, stage)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (change_stage(1, {"train": {"train_stepz": 4}}), ("stage 1 (train)", "'train_stepz'", "train_steps")),
        (change_stage(1, {"train": {"train_steps": -1}}), ("stage 1 (train)", "train_steps=-1")),
        (change_stage(1, {"train": {"hidden_size": 48}}), ("stage 1 (train)", "hidden_size", "grow")),
        (change_stage(1, {"train": {"output_dir": "x"}}), ("stage 1 (train)", "output_dir")),
        (change_stage(3, {"train": {"initial_checkpoint": "x"}}), ("stage 3 (train)", "initial_checkpoint")),
        (change_stage(3, {"train": {"train_tokens": 9, "train_steps": 1}}), ("stage 3 (train)", "train_tokens")),
        (change_stage(3, {"train": {"train_tokens": "many"}}), ("stage 3 (train)", "train_tokens='many'")),
        (change_stage(3, {"train": {"train_data": "absent"}}), ("stage 3 (train)", "absent")),
        (change_stage(3, {"train": {"deepspeed_config": "no.json"}}), ("stage 3 (train)", "no.json")),
        (change_stage(3, {"train": {"tensor_parallel_size": 2}}), ("stage 3 (train)", "tensor_parallel_size=2")),
        (change_stage(3, {"train": {}, "processes": 8}), ("stage 3 (train)", "global_batch_size=8")),
        (change_stage(2, {"grow": {"hiden_size": 48}}), ("stage 2 (grow)", "'hiden_size'", "hidden_size")),
        (change_stage(2, {"grow": {"intermediate_size": 39}}), ("stage 2 (grow)", "intermediate_size=39")),
        (change_stage(2, {"grow": {**GROWTH, "seeed": 1}}), ("stage 2 (grow)", "'seeed'", "seed")),
        (change_stage(2, {"grow": {**GROWTH, "seed": "x"}}), ("stage 2 (grow)", "--seed", "integer")),
        (change_stage(2, {"grow": {**GROWTH, "tensor_parallel_size": 3}}), ("stage 2 (grow)", "num_attention_heads=8")),
        (change_stage(1, {"grow": dict(GROWTH)}), ("stage 1 (grow)", "nothing to grow", "initial_checkpoint")),
        (change_stage(2, {"trian": {}}), ("stage 2", "'trian'", "train")),
        (change_stage(2, {"grow": {}, "train": {}}), ("stage 2", "one of the two")),
        (lambda values: values.update(stages=[]), ("stages",)),
        (lambda values: values.pop("run"), ("'run' is missing",)),
        (lambda values: values["run"].pop("model"), ("run", "'model'")),
        (lambda values: values["run"]["model"].update(hidden_size=25), ("run", "hidden_size=25")),
        (lambda values: values["run"]["training"].update(output_dir="x"), ("run", "output_dir")),
        (lambda values: values["run"].update(modle={}), ("stage 1 (train)", "'modle'", "model")),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_stage_and_key(
    tmp_path: Path, data: Path, change: Callable[[dict[str, Any]], object], parts: tuple[str, ...]
) -> None:
    refused(program_file(tmp_path, data, change), "program.yaml", *parts)


def test_a_bad_last_stage_is_found_before_the_first_starts(tmp_path: Path, data: Path) -> None:
    path = program_file(tmp_path, data, change_stage(3, {"train": {"learning_rte": 1}}))
    assert_one_error(call("program", path), "stage 3 (train)", "'learning_rte'", "learning_rate")
    assert not (tmp_path / "out").exists()


def test_tokens_become_the_steps_that_train_on_as_many(tmp_path: Path, data: Path) -> None:
    def tokens(values: dict[str, Any]) -> None:
        values["run"]["training"]["train_steps"] = 99
        values["stages"][0]["train"] = {"train_tokens": 5e3}

    stage = planned(program_file(tmp_path, data, tokens))[0]
    assert isinstance(stage, TrainStage)
    instances = open_data(data, stage.config.model)
    mean = sum(len(instances[number]["input_ids"]) for number in range(len(instances))) / len(instances)
    steps = stage.config.training.train_steps
    assert (steps - 1) * 8 * mean < 5e3 <= steps * 8 * mean


def test_a_programme_may_begin_by_growing_a_checkpoint(finished: Path, tmp_path: Path, data: Path) -> None:
    source = checkpoint_path(finished.parent / "out" / "01-train", 4)

    def begin_with_it(values: dict[str, Any]) -> None:
        values["run"]["training"]["initial_checkpoint"] = str(source)
        del values["stages"][0]

    stages = planned(program_file(tmp_path, data, begin_with_it))
    assert [stage.name for stage in stages] == ["01-grow", "02-train"]
    assert str(source) in stages[0].command()
    assert stages[1].result.name == "step-00000007"
    other = tmp_path / "other"
    other.mkdir()
    path = program_file(other, data, begin_with_it)
    refused(
        edited(path, lambda values: values["run"]["model"].update(vocab_size=102)), "run: ", "vocab_size=101", "102"
    )


def test_missing_data_is_named(tmp_path: Path, data: Path) -> None:
    path = program_file(tmp_path, data, lambda values: values["run"]["data"].update(train_data="nowhere"))
    with pytest.raises(DataError, match=r"stage 1 \(train\): .*nowhere"):
        planned(path)


def test_records_are_sealed(finished: Path) -> None:
    record = json.loads((finished.parent / "out" / "02-grow.json").read_text())
    assert record["settings"] == {"grow": GROWTH} and len(record["sha256"]) == 64
    resolved = yaml.safe_load((finished.parent / "out" / "03-train.yaml").read_text())
    assert validated(RunConfig, resolved).model.hidden_size == 48


def test_the_recipe_is_the_demos_two_models() -> None:
    values = read_program(RECIPES / "program.yaml")
    sizes = growth_sizes(values.parsed_stages("recipe")[1].grow or {})
    small, large = (yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["model"] for name in ("small", "large"))
    assert values.run["model"] == small and small | sizes == large
