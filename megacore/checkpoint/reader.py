"""Read a checkpoint as virtual global tensors: ask for any box, whatever layout wrote it."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from megacore.checkpoint.assemble import FloatArray, Rows, Run, as_array, assembled, follow_each_other, read_runs
from megacore.checkpoint.manifest import FileRecord, Manifest, Piece, read_manifest
from megacore.checkpoint.tensor_file import TensorFile
from megacore.errors import CheckpointError
from megacore.specs import Region, region_shape

_BLOCK = 1 << 22
"""Entries read at once while a checksum is computed."""
_MAX_OPEN_FILES = 128
"""Of a checkpoint that may have thousands."""


class CheckpointReader:
    """A checkpoint opened for reading.

    Opening checks the manifest and that every file is there in its full size. A piece's checksum is checked when
    the piece is first touched, so no value of a damaged piece is ever returned.

    Raises:
        CheckpointError: naming the file (and the tensor) that is missing, cut short or altered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest = read_manifest(path)
        self._pieces: dict[tuple[str, str], list[tuple[str, str, Piece]]] = defaultdict(list)
        for name, record in self.manifest.files.items():
            self._check_size(name, record)
            for key, piece in record.pieces.items():
                self._pieces[piece.parameter, piece.state].append((name, key, piece))
        self._open: dict[str, TensorFile] = {}
        self._checked: set[tuple[str, str]] = set()

    def _check_size(self, name: str, record: FileRecord) -> None:
        file = self.path / name
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing") from None
        if size != record.size:
            raise CheckpointError(f"{file} has {size} bytes instead of {record.size}: it is cut short or altered")

    def shape(self, parameter: str) -> tuple[int, ...]:
        """Return a parameter's global shape."""
        return tuple(axis.size for axis in self.manifest.parameters[parameter].axes)

    def dtype(self, parameter: str, state: str) -> str:
        """Return the dtype in which a state of a parameter is stored."""
        pieces = self._pieces[parameter, state]
        if not pieces:
            raise CheckpointError(f"{self.path}: {parameter} has no {state}")
        return pieces[0][2].dtype

    def read(self, parameter: str, state: str, region: Region | None = None) -> FloatArray:
        """Return a box of a global tensor (all of it by default), as a new array; bfloat16 becomes float32."""
        region = region or tuple((0, size) for size in self.shape(parameter))
        boxes = {box: partial(self._read_box, box, pieces) for box, pieces in self._boxes(parameter, state).items()}
        result, filled = assembled(region, boxes, _array_dtype(self.dtype(parameter, state)))
        if filled != result.size:
            raise CheckpointError(f"{self.path}: {filled} of {result.size} entries of {parameter}/{state} are stored")
        return result

    def _boxes(self, parameter: str, state: str) -> dict[Region, list[tuple[str, str, Piece]]]:
        boxes: dict[Region, list[tuple[str, str, Piece]]] = defaultdict(list)
        for item in self._pieces[parameter, state]:
            boxes[item[2].region].append(item)
        return boxes

    def _read_box(self, box: Region, pieces: list[tuple[str, str, Piece]], part: Region) -> FloatArray:
        """Read ``part`` (in the box's own indices) of a box that is stored whole or in flat runs."""
        shape = region_shape(box)
        slices = tuple(slice(start, stop) for start, stop in part)
        if len(pieces) == 1 and pieces[0][2].run is None:
            rows = self._stored(*pieces[0])(*part[0])
            return as_array(rows[(slice(None), *slices[1:])])
        return read_runs(shape, self._runs(box, pieces), _array_dtype(pieces[0][2].dtype), part)

    def _runs(self, box: Region, pieces: list[tuple[str, str, Piece]]) -> list[Run]:
        """Return a box's flat runs in order, having checked that they follow each other from end to end."""
        size = math.prod(region_shape(box))

        def rows_of(item: tuple[str, str, Piece]) -> Rows:
            return lambda start, stop: self._stored(*item)(start, stop)  # opened when it is read

        runs = sorted(((item[2].run or (0, size), rows_of(item)) for item in pieces), key=lambda run: run[0])
        if not follow_each_other(runs, size):
            raise CheckpointError(f"{self.path}: pieces of {pieces[0][2].parameter} are missing or overlap")
        return runs

    def _stored(self, name: str, key: str, piece: Piece) -> Rows:
        """Return what reads rows of a stored tensor, after its checksum was found right once."""
        file = self.path / name
        try:
            if name not in self._open:
                if len(self._open) >= _MAX_OPEN_FILES:
                    self._open.pop(next(iter(self._open))).close()
                self._open[name] = TensorFile(file)
            stored = self._open[name].tensors.get(key)
            if stored is None or (stored.shape, stored.dtype) != (piece.shape, piece.dtype):
                raise CheckpointError(f"{file}: {key} has another shape or type than the manifest says")
            rows: Rows = partial(self._open[name].rows, key)
            if (name, key) not in self._checked:
                checksum = hashlib.sha256()
                for block in _blocks(rows, piece.shape):
                    checksum.update(block.view(torch.uint8).numpy().data)
                if checksum.hexdigest() != piece.sha256:
                    raise CheckpointError(f"{file}: {key} was altered (its checksum does not match)")
                self._checked.add((name, key))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: {key} cannot be read: {error}") from error
        return rows

    def scan(self) -> Iterator[tuple[str, str, FloatArray]]:
        """Yield every stored value once, in blocks, as (file, tensor name, block), checking checksums."""
        for name, record in self.manifest.files.items():
            for key, piece in record.pieces.items():
                for block in _blocks(self._stored(name, key, piece), piece.shape):
                    yield name, key, as_array(block)

    def check_coverage(self) -> None:
        """Check that every entry of every parameter is stored exactly once, in every state."""
        for parameter in self.manifest.parameters:
            for state in self.manifest.states:
                boxes = self._boxes(parameter, state)
                for box, pieces in boxes.items():
                    self._runs(box, pieces)
                for first, second in itertools.combinations(boxes, 2):
                    if all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in zip(first, second, strict=True)):
                        raise CheckpointError(f"{self.path}: pieces of {parameter}/{state} overlap")
                stored = sum(math.prod(region_shape(box)) for box in boxes)
                expected = math.prod(self.shape(parameter))
                if stored != expected:
                    raise CheckpointError(
                        f"{self.path}: {stored} of {expected} entries of {parameter}/{state} are stored"
                    )


def _array_dtype(dtype: str) -> str:
    """Return the numpy type that holds a stored one: numpy has no bfloat16."""
    return "float32" if dtype == "bfloat16" else dtype


def _blocks(rows_of: Rows, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Cut a stored tensor along its first dim into blocks of bounded size."""
    rows = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield rows_of(start, min(start + rows, shape[0]))
