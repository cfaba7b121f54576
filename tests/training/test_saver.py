"""A checkpoint written in the background holds what was there when it was asked for; its failure is not lost."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from megacore.checkpoint.manifest import Layout, Manifest, Progress, parameter_records
from megacore.checkpoint.pieces import Piece
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import PieceToWrite
from megacore.communicator import Alone
from megacore.errors import CheckpointError
from megacore.models.transformer import declarations
from megacore.training.saver import Saver
from tests.models import model_config

CONFIG = model_config()
SPECS = declarations(CONFIG)


RECORDS = parameter_records(SPECS, dict.fromkeys(SPECS, (1.0, 1.0)))
MANIFEST = Manifest(model=CONFIG, layout=Layout(), progress=Progress(), parameters=RECORDS, files={})


def pieces(values: dict[str, np.ndarray[Any, Any]]) -> list[PieceToWrite]:
    def whole(name: str) -> PieceToWrite:
        region = tuple((0, size) for size in SPECS[name].shape)
        return PieceToWrite(Piece(name, "weight", region, None, "float32"), lambda: [values[name]])

    return [whole(name) for name in SPECS]


def test_values_that_change_after_the_call_are_not_written(tmp_path: Path) -> None:
    values = {name: np.ones(spec.shape, np.float32) for name, spec in SPECS.items()}
    go, done = Event(), []
    group = Alone()

    def slow(item: Any) -> list[Any]:  # the first exchange comes before anything is written
        go.wait(30)
        return [item]

    group.all_gather = slow  # type: ignore[method-assign]
    saver = Saver(group, in_background=True)
    saver.save(tmp_path / "c", pieces(values), MANIFEST, partial(done.append, 1))
    for array in values.values():
        array += 1.0
    assert not done and not (tmp_path / "c").exists()  # the call came back before the checkpoint was there
    go.set()
    saver.wait()
    assert done
    reader = CheckpointReader(tmp_path / "c")
    assert all((reader.read(name, "weight") == 1.0).all() for name in SPECS)


def test_a_failure_in_the_background_stops_the_next_save(tmp_path: Path) -> None:
    values = {name: np.ones(spec.shape, np.float32) for name, spec in SPECS.items()}
    (tmp_path / "c").mkdir()
    saver = Saver(Alone(), in_background=True)
    saver.save(tmp_path / "c", pieces(values), MANIFEST, lambda: None)
    with pytest.raises(CheckpointError, match=r"c exists already"):
        saver.save(tmp_path / "d", pieces(values), MANIFEST, lambda: None)
    saver.wait()  # said once
    assert not (tmp_path / "d").exists()
