"""A checkpoint written in the background holds what was there when it was asked for; its failure is not lost."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from megacore.checkpoint.manifest import Layout, Manifest, Progress, parameter_records
from megacore.checkpoint.pieces import Piece
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import PieceToWrite
from megacore.communicator import Alone, TorchRanks
from megacore.config import RunConfig
from megacore.errors import CheckpointError
from megacore.models.transformer import declarations
from megacore.parallel.grid import ParallelGrid
from megacore.training.distributed import join_world, leave_world
from megacore.training.loop import TrainingStage
from megacore.training.partition import pieces_to_write
from megacore.training.runs import checkpoint_path
from megacore.training.saver import Saver
from tests.models import model_config, run_config, write_instances
from tests.ranks import run_ranks
from tests.training.test_layout_matrix import deepspeed

STEPS = 4
CONFIG = model_config()
SPECS = declarations(CONFIG)


RECORDS = parameter_records(SPECS, dict.fromkeys(SPECS, (1.0, 1.0)))
MANIFEST = Manifest(model=CONFIG, layout=Layout(), progress=Progress(), parameters=RECORDS, files={})


def pieces(values: dict[str, np.ndarray[Any, Any]]) -> list[PieceToWrite]:
    def whole(name: str) -> PieceToWrite:
        region = tuple((0, size) for size in SPECS[name].shape)
        return PieceToWrite(Piece(name, "weight", region, None, "float32"), lambda: [values[name]])

    return [whole(name) for name in SPECS]


def test_values_that_change_once_they_are_copied_are_not_written(tmp_path: Path) -> None:
    values = {name: np.ones(spec.shape, np.float32) for name, spec in SPECS.items()}
    go, done = Event(), []
    group = Alone()

    def slow(item: Any) -> list[Any]:  # the first exchange comes before anything is written
        go.wait(30)
        return [item]

    group.all_gather = slow  # type: ignore[method-assign]
    saver = Saver(group, in_background=True)
    saver.save(tmp_path / "c", pieces(values), MANIFEST, partial(done.append, 1))
    saver.wait_for_copy()
    for array in values.values():
        array += 1.0
    assert not done and not (tmp_path / "c").exists()  # the call came back before the checkpoint was there
    go.set()
    saver.wait()
    assert done
    reader = CheckpointReader(tmp_path / "c")
    assert all((reader.read(name, "weight") == 1.0).all() for name in SPECS)


@pytest.mark.parametrize("fails", [False, True])
def test_an_update_waits_until_all_is_copied_or_has_failed(tmp_path: Path, fails: bool) -> None:
    values = {name: np.ones(spec.shape, np.float32) for name, spec in SPECS.items()}
    go = Event()

    def late() -> list[np.ndarray[Any, Any]]:
        go.wait(30)
        if fails:
            raise MemoryError
        return [values[list(SPECS)[-1]]]

    saver = Saver(Alone(), in_background=True)
    items = [*pieces(values)[:-1], pieces(values)[-1]._replace(blocks=late)]
    saver.save(tmp_path / "c", items, MANIFEST, lambda: None)
    update = Thread(target=saver.wait_for_copy)
    update.start()
    update.join(0.2)
    assert update.is_alive()
    go.set()
    update.join(30)
    assert not update.is_alive()
    with pytest.raises(MemoryError) if fails else nullcontext():
        saver.wait()


LAYOUTS: dict[str, dict[str, Any]] = {
    "zero1": {},
    "zero2": {"deepspeed_config": deepspeed("zero2")},
    "zero2 offload": {"deepspeed_config": deepspeed("zero2_offload")},
    "zero3": {"deepspeed_config": deepspeed("zero3")},
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
}


def train(configs: list[RunConfig]) -> None:
    """Train; at every update, compare what is there with what was saved of the step before."""
    device = join_world()
    group = TorchRanks()
    for config in configs:
        grid = ParallelGrid.create(config.parallel)
        stage = TrainingStage(config, grid, group, device)
        found: dict[int, dict[Piece, np.ndarray[Any, Any]]] = {}

        def before_update(stage: Any = stage, grid: Any = grid, found: Any = found) -> None:
            stage._saver.wait_for_copy()
            if stage._progress.step not in found:  # ZeRO 3 updates in several parts
                items = pieces_to_write(stage._engine, grid)
                found[stage._progress.step] = {
                    item.piece: np.concatenate([np.array(block).ravel() for block in item.blocks()]) for item in items
                }

        stage._engine.before_update = before_update
        stage.run()
        assert list(found) == list(range(STEPS))
        for step in range(1, STEPS):
            reader = CheckpointReader(checkpoint_path(config.training.output_dir, step))
            for piece, values in found[step].items():
                box = reader.read(piece.parameter, piece.state, piece.region).ravel()
                assert np.array_equal(box[slice(*piece.run)] if piece.run else box, values), (step, piece)
            assert any(not np.array_equal(found[step][piece], found[step - 1][piece]) for piece in found[step])
    leave_world()


def test_what_is_saved_of_a_step_is_what_the_next_update_finds(tmp_path: Path) -> None:
    data = write_instances(tmp_path / "data")
    configs = [
        run_config(
            tmp_path / name, data, train_steps=STEPS, save_interval=1, eval_interval=0, keep_last=STEPS, **changes
        )
        for name, changes in LAYOUTS.items()
    ]
    run_ranks(train, 2, configs)


def test_a_failure_in_the_background_stops_the_next_save(tmp_path: Path) -> None:
    values = {name: np.ones(spec.shape, np.float32) for name, spec in SPECS.items()}
    (tmp_path / "c").mkdir()
    saver = Saver(Alone(), in_background=True)
    saver.save(tmp_path / "c", pieces(values), MANIFEST, lambda: None)
    with pytest.raises(CheckpointError, match=r"c exists already"):
        saver.save(tmp_path / "d", pieces(values), MANIFEST, lambda: None)
    saver.wait()  # said once
    assert not (tmp_path / "d").exists()
