"""Two checkpoints compared value by value, and which ones a run keeps."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launcher.start import megacore_command
from megacore.checkpoint.diff import configuration_differences, tensor_differences
from megacore.checkpoint.reader import CheckpointReader
from megacore.training.runs import checkpoint_path, checkpoints, remove_old
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
