"""A run whose newest checkpoint is damaged says so and goes on from the one before, on all ranks; never from scratch.

Each case is a copy of one run of two tensor-parallel ranks, cut off after its third checkpoint and damaged.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megacore.checkpoint.diff import tensor_differences
from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Alone, TorchRanks
from megacore.config import ParallelConfig, RunConfig
from megacore.convert.reshard import reshard
from megacore.errors import CheckpointError, MegacoreError
from megacore.parallel.grid import ParallelGrid
from megacore.training.distributed import join_world, leave_world
from megacore.training.loop import TrainingStage
from megacore.training.runs import checkpoint_path, checkpoints
from megacore.training.start import Start
from tests.checkpoint.test_reader_and_writer import edited, write
from tests.models import run_config, write_instances
from tests.ranks import run_ranks

SAVED, LAST = (2, 4, 6), 8
OTHER_RANK = "rank00001.safetensors"
"""Read by the second rank alone, but for parameters that are not sharded."""


def altered(checkpoint: Path) -> None:
    file = checkpoint / OTHER_RANK
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)


def cut_short(checkpoint: Path) -> None:
    os.truncate(checkpoint / OTHER_RANK, 1000)


def file_missing(checkpoint: Path) -> None:
    (checkpoint / OTHER_RANK).unlink()


def manifest_damaged(checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"consumed_samples": ', '"consumed_samples": 1', 1))


def manifest_missing(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def moments_missing(checkpoint: Path) -> None:
    whole = checkpoint.with_name("whole")
    checkpoint.rename(whole)
    reshard(CheckpointReader(whole), checkpoint, ParallelConfig(), Alone(), weights_only=True)
    shutil.rmtree(whole)


class Case(NamedTuple):
    """What is done to the checkpoints of which steps, and what the message names."""

    damage: Callable[[Path], None]
    steps: tuple[int, ...]
    names: tuple[str, ...]


CASES = {
    "altered": Case(altered, (6,), (OTHER_RANK, "checksum")),
    "cut short": Case(cut_short, (6,), (OTHER_RANK, "cut short")),
    "file missing": Case(file_missing, (6,), (OTHER_RANK, "missing")),
    "manifest damaged": Case(manifest_damaged, (6,), ("manifest.json", "checksum")),
    "manifest missing": Case(manifest_missing, (6,), ("manifest.json",)),
    "moments missing": Case(moments_missing, (6,), ("exp_avg",)),
    "two altered": Case(altered, (4, 6), (OTHER_RANK, "step-00000004", "step-00000006")),
    "all altered": Case(altered, SAVED, (OTHER_RANK, *(f"step-{step:08d}" for step in SAVED), "another output_dir")),
    "all manifests missing": Case(manifest_missing, SAVED, ("no checkpoint of", "another output_dir")),
}
LOST = [name for name, case in CASES.items() if case.steps == SAVED]
RESUMED = [name for name in CASES if name not in LOST]


def train_cases(whole: RunConfig, cases: dict[str, RunConfig], others: dict[str, RunConfig]) -> dict[str, str]:
    """Train a run to its end, then each damaged copy of it; return what each said, or its error."""
    device, group = join_world(), TorchRanks()

    def said(config: RunConfig) -> str:
        with redirect_stdout(StringIO()) as text:
            try:
                TrainingStage(config, ParallelGrid.create(config.parallel), group, device).run()
            except MegacoreError as error:
                assert error.agreed
                return f"error: {error}"
        return text.getvalue()

    said(whole)
    for name, config in cases.items():
        if group.rank == 0:
            for step in SAVED:
                source, target = (checkpoint_path(c.training.output_dir, step) for c in (whole, config))
                shutil.copytree(source, target)
            for step in CASES[name].steps:
                CASES[name].damage(checkpoint_path(config.training.output_dir, step))
        group.all_gather(None)
    result = {name: said(config) for name, config in (cases | others).items()}
    leave_world()
    return result


class Outcome(NamedTuple):
    folder: Path
    said: list[dict[str, str]]
    """By case, of each rank."""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("damaged")
    data = write_instances(folder / "data")
    common: dict[str, Any] = {
        "tensor_parallel_size": 2,
        "train_steps": LAST,
        "save_interval": 2,
        "eval_interval": 0,
        "keep_last": 9,
    }
    whole = run_config(folder / "whole", data, **common)
    first = checkpoint_path(folder / "whole", SAVED[0])
    cases = {
        # A run that has lost all of its checkpoints must not go back to where it once started.
        name: run_config(folder / name, data, **common, **({"initial_checkpoint": str(first)} if name in LOST else {}))
        for name in CASES
    }
    others = {
        "other data order": run_config(folder / "altered", data, **common, seed=7),
        "from latest": run_config(
            folder / "from latest",
            data,
            **{**common, "train_steps": 2},
            initial_checkpoint=str(folder / "whole" / "checkpoints" / "latest"),
        ),
    }
    return Outcome(folder, run_ranks(train_cases, 2, whole, cases, others, timeout=200))


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(outcome: Outcome, name: str) -> None:
    case, run = CASES[name], outcome.folder / name
    lines = outcome.said[0][name].splitlines()
    told = [line for line in lines if "passing over" in line]
    assert len(told) == len(case.steps)
    for part in case.names:
        assert any(part in line for line in told), told
    resumed = max(step for step in SAVED if step not in case.steps)
    assert any(line.startswith("resuming from") and f"step {resumed}," in line for line in lines)
    assert all(checkpoint_path(run, step).with_name(f"step-{step:08d}.damaged").is_dir() for step in case.steps)
    assert not outcome.said[1][name]


@pytest.mark.parametrize("name", RESUMED)
def test_after_damage_a_run_comes_to_the_same_end(outcome: Outcome, name: str) -> None:
    ends = [CheckpointReader(checkpoint_path(outcome.folder / run, LAST)) for run in ("whole", name)]
    assert not list(tensor_differences(*ends))
    assert ends[0].manifest.progress == ends[1].manifest.progress
    for path in checkpoints(outcome.folder / name):  # the steps of damaged ones were saved again
        assert not list(
            tensor_differences(
                CheckpointReader(outcome.folder / "whole" / "checkpoints" / path.name), CheckpointReader(path)
            )
        )
    assert [int(path.name[5:]) for path in checkpoints(outcome.folder / name)] == [*SAVED, LAST]
    assert (outcome.folder / name / "checkpoints" / "latest").readlink() == Path(f"step-{LAST:08d}")


def test_a_second_load_replaces_all_that_the_first_has_set_under_zero3(tmp_path: Path) -> None:
    data = write_instances(tmp_path / "data")
    zero3 = str(Path(__file__).parents[2] / "ds_configs" / "zero3.json")
    common: dict[str, Any] = {"train_steps": LAST, "save_interval": 2, "eval_interval": 0, "keep_last": 9}
    whole, case = (run_config(tmp_path / n, data, **common, deepspeed_config=zero3) for n in ("whole", "altered"))
    said = run_ranks(train_cases, 2, whole, {"altered": case}, {})
    assert "passing over step-00000006" in said[0]["altered"]
    ends = [CheckpointReader(checkpoint_path(tmp_path / name, LAST)) for name in ("whole", "altered")]
    assert not list(tensor_differences(*ends))


@pytest.mark.parametrize("name", LOST)
def test_a_run_without_a_usable_checkpoint_stops_and_names_them_all(outcome: Outcome, name: str) -> None:
    for said in outcome.said:
        assert said[name].startswith("error: ") and "\n" not in said[name]
        for part in CASES[name].names:
            assert part in said[name]
    assert [int(path.name[5:]) for path in checkpoints(outcome.folder / name)] == list(SAVED)  # found again next time


def test_another_data_order_is_no_damage(outcome: Outcome) -> None:
    assert all("data order of seed=" in said["other data order"] for said in outcome.said)


def test_the_link_latest_can_be_started_from_and_its_target_is_named(outcome: Outcome) -> None:
    source = checkpoint_path(outcome.folder / "whole", LAST)
    assert f"starting from {source} (step {LAST}," in outcome.said[0]["from latest"]
    end = CheckpointReader(checkpoint_path(outcome.folder / "from latest", LAST + 2))
    assert end.manifest.progress.stage_first_step == LAST


def test_a_checkpoint_of_another_version_is_not_passed_over(tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", tmp_path / "data")
    older, newer = (checkpoint_path(tmp_path / "run", step) for step in (2, 4))
    for path in (older, newer):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    edited(newer, lambda body: body.update(version=3))
    with pytest.raises(CheckpointError, match="format version 3"):
        Start(config, {}, Alone())
    assert newer.is_dir() and older.is_dir()
