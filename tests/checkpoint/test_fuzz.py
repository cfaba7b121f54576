"""Three hundred random corruptions: each is refused with the file's name, or changes no value."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacore.checkpoint.reader import CheckpointReader
from megacore.errors import CheckpointError
from megacore.growth.verify import check_integrity
from tests.checkpoint.test_reader_and_writer import SPECS, values, write

CASES, BATCH = 300, 50


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("fuzz") / "whole", parts=2, replicas=2)


def corrupt(path: Path, rng: np.random.Generator) -> str:
    """Damage a checkpoint in one random way; return what was done."""
    files = sorted(path.iterdir())
    file = files[int(rng.integers(len(files)))]
    content = bytearray(file.read_bytes())
    place = int(rng.integers(len(content)))
    kind = str(rng.choice(["truncate", "flip", "header", "zeros", "delete", "swap", "insert", "replace", "empty"]))
    if kind == "truncate":
        file.write_bytes(content[:place])
    elif kind == "flip":
        content[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
    elif kind == "header":
        content[int(rng.integers(min(2000, len(content))))] = int(rng.integers(256))
        file.write_bytes(content)
    elif kind == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
        file.write_bytes(content)
    elif kind == "delete":
        file.unlink()
    elif kind == "swap":
        other = files[int(rng.integers(len(files)))]
        first, second = file.read_bytes(), other.read_bytes()
        file.write_bytes(second)
        other.write_bytes(first)
    elif kind == "insert":
        file.write_bytes(content[:place] + bytes(rng.integers(0, 256, 8).tolist()) + content[place:])
    elif kind == "replace":
        file.write_bytes(bytes(rng.integers(0, 256, len(content)).tolist()))
    else:
        file.write_bytes(b"")
    return f"{kind} {file.name} at {place}"


@pytest.mark.parametrize("first", range(0, CASES, BATCH))
def test_a_corruption_is_refused_by_name_or_harmless(whole: Path, tmp_path: Path, first: int) -> None:
    for seed in range(first, first + BATCH):
        path = tmp_path / str(seed)
        shutil.copytree(whole, path)
        names = [file.name for file in path.iterdir()]
        what = f"{seed}: {corrupt(path, np.random.default_rng(seed))}"
        read: dict[str, Any] = {}
        try:
            reader = CheckpointReader(path)
            check_integrity(reader)
            read = {name: reader.read(name, "weight") for name in SPECS}
        except CheckpointError as error:
            assert any(name in str(error) for name in names), f"{what}: {error}"
        else:
            assert all(np.array_equal(read[name], values(name)) for name in SPECS), what
        shutil.rmtree(path)
