"""A checkpoint of 10,000 files and 1,000 layers is opened by reading one file, and read file by file as needed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from megacore.checkpoint.manifest import MANIFEST, FileRecord, Layout, Manifest, Progress, parameter_records
from megacore.checkpoint.pieces import Piece
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import PieceToWrite, write_checkpoint
from megacore.communicator import Alone
from megacore.errors import CheckpointError
from megacore.models.transformer import declarations
from tests.models import model_config

LAYERS, FILES = 1000, 10_000
NAME = "layers.500.mlp.up_weight"


def test_only_the_files_that_hold_a_parameter_are_touched(tmp_path: Path) -> None:
    config = model_config(num_hidden_layers=LAYERS)
    specs = declarations(config)
    shape = specs[NAME].shape
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    piece = Piece(NAME, "weight", tuple((0, size) for size in shape), None, "float32")
    manifest = Manifest(
        model=config,
        layout=Layout(data_parallel_size=FILES),
        progress=Progress(),
        parameters=parameter_records(specs, dict.fromkeys(specs, (1.0, 1.0))),
        files={},
    )
    file = [("there.safetensors", [PieceToWrite(piece, lambda: [values])])]
    write_checkpoint(tmp_path / "c", Alone(), file, manifest)
    own = sorted(specs).index(NAME)
    there = CheckpointReader(tmp_path / "c").manifest.files
    bounds = [number * len(specs) // (FILES - 1) for number in range(FILES)]
    others = {
        f"rank{number:05d}.safetensors": FileRecord(
            size=1 << 30, header="0" * 32, states={"weight": "float32"}, holds=((start, stop),)
        )
        for number, (start, stop) in enumerate(pairwise(bounds))
        if not start <= own < stop
    }
    (tmp_path / "c" / MANIFEST).write_text(manifest.model_copy(update={"files": {**there, **others}}).to_json())

    reader = CheckpointReader(tmp_path / "c")
    assert len(reader.manifest.files) == FILES - 1 and len(reader.manifest.parameters) == len(specs)
    assert np.array_equal(reader.read(NAME, "weight"), values)  # none of the other files exist
    with pytest.raises(CheckpointError, match=r"rank\d{5}\.safetensors is missing"):
        reader.read("layers.501.mlp.up_weight", "weight")
