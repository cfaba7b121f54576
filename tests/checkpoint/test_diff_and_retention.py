"""Two checkpoints compared value by value, and which ones a run keeps."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher.start import megacore_command
from megacore.checkpoint.diff import configuration_differences, tensor_differences
from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Alone
from megacore.training.runs import checkpoint_path, checkpoints, followed, point_latest, remove_leftovers, remove_old
from tests.checkpoint import test_reader_and_writer as samples


def test_checkpoints_of_other_layouts_are_the_same(tmp_path: Path) -> None:
    first, second = (CheckpointReader(samples.write(tmp_path / str(n), n, 3 - n)) for n in (1, 2))
    assert not configuration_differences(first, second)
    assert not list(tensor_differences(first, second))


def test_one_changed_value_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples.write(tmp_path / "a", 2)
    original = samples.values

    def changed(name: str) -> object:
        array = original(name)
        if name == "layers.1.mlp.up_weight":
            array[3, 5] += 0.25
        return array

    monkeypatch.setattr(samples, "values", changed)
    samples.write(tmp_path / "b", 1)
    found = list(tensor_differences(*(CheckpointReader(tmp_path / name) for name in "ab")))
    assert [(item.parameter, item.state) for item in found] == [("layers.1.mlp.up_weight", "weight")]
    assert found[0].largest == pytest.approx(0.25, rel=1e-6)
    assert found[0].changed == pytest.approx(1 / (40 * 24))
    result = subprocess.run(megacore_command("diff", tmp_path / "a", tmp_path / "b"), capture_output=True, text=True)
    assert result.returncode == 1 and "layers.1.mlp.up_weight/weight" in result.stdout
    result = subprocess.run(megacore_command("diff", tmp_path / "a", tmp_path / "a"), capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.strip().endswith("the same")


def test_the_newest_and_every_so_manieth_checkpoint_are_kept(tmp_path: Path) -> None:
    for step in range(10, 100, 10):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    remove_old(tmp_path, keep_last=2, keep_every=40)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [40, 80, 90]
    remove_old(tmp_path, keep_last=1)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [90]


def test_what_latest_names_is_never_removed(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
    point_latest(checkpoint_path(tmp_path, 10))  # a job was killed before it could switch it, twice
    remove_old(tmp_path, keep_last=1)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [10, 30]
    point_latest(checkpoint_path(tmp_path, 30))
    remove_old(tmp_path, keep_last=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000030"]


def test_a_dangling_latest_is_mended_and_is_no_checkpoint(tmp_path: Path) -> None:
    checkpoint = checkpoint_path(tmp_path, 10)
    checkpoint.mkdir(parents=True)
    link = checkpoint.with_name("latest")
    link.symlink_to("step-00000005")
    assert checkpoints(tmp_path) == [checkpoint]
    point_latest(checkpoint)
    assert link.readlink() == Path("step-00000010")
    assert followed(link, Alone()) == checkpoint and followed(checkpoint, Alone()) == checkpoint


def test_what_a_killed_job_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step-00000010", "step-00000020.incomplete", "step-00000005.removed", "step-00000008.damaged"):
        (folder / name / "files").mkdir(parents=True)
    (folder / "latest.incomplete").symlink_to("step-00000020")
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000008.damaged", "step-00000010"]
