"""Read a checkpoint as virtual global tensors: ask for any box, whatever layout wrote it."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.checkpoint.assemble import Rows, Run, assembled, follow_each_other, read_runs
from megacore.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megacore.checkpoint.pieces import Piece, PieceFile
from megacore.checkpoint.stream import NUMPY
from megacore.errors import CheckpointError, ConfigError, DamagedError
from megacore.model_config import ModelConfig
from megacore.specs import ParamSpec, Region, region_shape

_BLOCK = 1 << 22
"""Entries read at once while everything is read."""
_MAX_OPEN_FILES = 128
"""Of a checkpoint that may have thousands."""
Item = tuple[str, Piece]
"""A file's name, and a piece in it."""


class CheckpointReader:
    """A checkpoint opened for reading.

    Opening reads the manifest alone. A file's size and header are checked when it is first opened, a piece's checksum
    when the piece is first touched, so no value of a damaged piece is ever returned.

    Args:
        path: the directory.
        manifest: of a checkpoint that is being written and has none yet.

    Raises:
        CheckpointError: naming the file (and the tensor) that is missing, cut short or altered.
    """

    def __init__(self, path: Path, manifest: Manifest | None = None) -> None:
        self.path = path
        self.manifest: Manifest = manifest or read_manifest(path)
        self._shapes = self.manifest.shapes()
        self._numbers = self.manifest.numbers()
        self._names = list(self.manifest.files)
        holds = [(*run, file) for file, record in enumerate(self.manifest.files.values()) for run in record.holds]
        self._starts, self._stops, self._holders = np.array(holds, np.int64).reshape(-1, 3).T
        self._open: dict[str, PieceFile] = {}
        self._kept: tuple[tuple[str, str], NDArray[Any]] = ("", ""), np.empty(0)
        self._items = lru_cache(maxsize=64)(self._find_items)

    @property
    def states(self) -> tuple[str, ...]:
        """What is stored of every parameter."""
        return self.manifest.states

    def close(self) -> None:
        """Close the files and forget what was kept; a later read opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()
        self._kept = ("", ""), np.empty(0)
        self._items.cache_clear()

    def specs(self) -> dict[str, ParamSpec]:
        """Return the declarations of the model, after a check that the checkpoint is of such a one.

        Raises:
            CheckpointError: this version of megacore makes other parameters of the model's configuration.
        """
        try:
            return self.manifest.specs()
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}/{error}") from None

    def check_model(self, wanted: ModelConfig) -> None:
        """Refuse a model that is not the checkpoint's; dropout may differ.

        Raises:
            ConfigError: naming the key, and both values.
        """
        for key, saved in self.manifest.model.model_dump().items():
            value = getattr(wanted, key)
            if saved != value and "dropout" not in key:
                raise ConfigError(f"{self.path} has {key}={saved}, but the configuration says {value}")

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Return a parameter's global shape."""
        return self._shapes[parameter]

    def dtype(self, parameter: str, state: str) -> str:
        """Return the dtype in which a state of a parameter is stored."""
        records = (self.manifest.files[file].states for file in self._files_of(parameter))
        dtypes = {dtype for states in records for key, dtype in states.items() if key == state}
        if len(dtypes) != 1:
            raise CheckpointError(f"{self.path}: {parameter} has {'several types of' if dtypes else 'no'} {state}")
        return dtypes.pop()

    def read(self, parameter: str, state: str, region: Region | None = None) -> NDArray[np.floating]:
        """Return a box of a global tensor (all of it by default), as a new array; bfloat16 becomes float32."""
        values = self.read_stored(parameter, state, region)
        if values.dtype.itemsize < 4:
            return values.astype(np.float32)
        return values.copy() if np.may_share_memory(values, self._kept[1]) else values

    def read_stored(self, parameter: str, state: str, region: Region | None = None) -> NDArray[Any]:
        """Return a box of a global tensor in the type in which it is stored; it must not be changed."""
        found = self._boxes(parameter, state)
        region = region or tuple((0, size) for size in self.shape(parameter))
        if not found:
            raise CheckpointError(f"{self.path}: {parameter} has no {state}")
        dtype = next(iter(found.values()))[0][1].dtype
        boxes = {box: partial(self._read_box, box, items) for box, items in found.items()}
        result, filled = assembled(region, boxes, NUMPY[dtype])
        if filled != result.size:
            raise DamagedError(f"{self.path}: {filled} of {result.size} entries of {parameter}/{state} are stored")
        return result

    def _find_items(self, parameter: str, state: str) -> list[Item]:
        key = f"{parameter}/{state}"
        found = ((file, self._file(file).pieces.get(key)) for file in self._files_of(parameter))
        return [(file, piece) for file, piece in found if piece is not None]

    def _files_of(self, parameter: str) -> list[str]:
        number = self._numbers.get(parameter)
        if number is None:
            raise CheckpointError(f"{self.path / MANIFEST}: the parameter {parameter} is missing")
        holders = self._holders[(self._starts <= number) & (number < self._stops)]
        return [self._names[holder] for holder in holders]

    def _file(self, name: str) -> PieceFile:
        file = self._open.pop(name, None)
        if file is None:
            if len(self._open) >= _MAX_OPEN_FILES:  # the one that was not used for longest
                self._open.pop(next(iter(self._open))).close()
            file = PieceFile(self.path / name, self.manifest.files[name], self._shapes)
        self._open[name] = file
        return file

    def _boxes(self, parameter: str, state: str) -> dict[Region, list[Item]]:
        boxes: dict[Region, list[Item]] = defaultdict(list)
        for item in self._items(parameter, state):
            boxes[item[1].region].append(item)
        return boxes

    def _read_box(self, box: Region, items: list[Item], part: Region) -> NDArray[Any]:
        """Read ``part`` (in the box's own indices) of a box that is stored whole or in flat runs."""
        if len(items) == 1 and items[0][1].run is None:
            rows = self._rows(items[0])(*part[0])
            cut: NDArray[Any] = rows[(slice(None), *(slice(*bounds) for bounds in part[1:]))]
            return cut
        return read_runs(region_shape(box), self._runs(box, items), NUMPY[items[0][1].dtype], part)

    def _runs(self, box: Region, items: list[Item]) -> list[Run]:
        """Return a box's flat runs in order, having checked that they follow each other from end to end."""
        size = math.prod(region_shape(box))
        runs = sorted(((item[1].run or (0, size), self._rows(item)) for item in items), key=lambda run: run[0])
        if not follow_each_other(runs, size):
            raise DamagedError(f"{self.path}: pieces of {items[0][1].parameter} are missing or overlap")
        return runs

    def _rows(self, item: Item) -> Rows:
        """Return what reads rows of a piece; its file is opened then."""
        return partial(self._read_rows, item[0], item[1].key)

    def _read_rows(self, name: str, key: str, start: int, stop: int) -> NDArray[Any]:
        if self._kept[0] != (name, key):
            file = self._file(name)
            whole = file.check(key)
            if whole is None:
                return file.rows(key, start, stop)
            self._kept = (name, key), whole  # the next rows are likely of this tensor, too
        return self._kept[1][start:stop]

    def scan(self) -> Iterator[tuple[str, str, NDArray[Any]]]:
        """Yield every stored value once, in blocks, as (file, tensor name, block), checking checksums."""
        for name in self._names:
            for key, piece in self._file(name).pieces.items():
                shape = piece.entry.shape
                rows = max(1, _BLOCK // max(1, math.prod(shape[1:])))
                for start in range(0, shape[0], rows):
                    yield name, key, self._rows((name, piece))(start, min(start + rows, shape[0]))

    def check_coverage(self) -> None:
        """Check that every entry of every parameter is stored exactly once, in every state."""
        for parameter, shape in self._shapes.items():
            for state in self.manifest.states:
                boxes = self._boxes(parameter, state)
                for box, items in boxes.items():
                    self._runs(box, items)
                for first, second in itertools.combinations(boxes, 2):
                    if all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in zip(first, second, strict=True)):
                        raise DamagedError(f"{self.path}: pieces of {parameter}/{state} overlap")
                stored, expected = sum(math.prod(region_shape(box)) for box in boxes), math.prod(shape)
                if stored != expected:
                    raise DamagedError(f"{self.path}: {stored} of {expected} entries of {parameter}/{state} are stored")
