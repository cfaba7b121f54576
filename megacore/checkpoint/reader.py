"""Read a checkpoint as virtual global tensors: ask for any box, whatever layout wrote it."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megacore.checkpoint.manifest import FileRecord, Manifest, Piece, read_manifest
from megacore.checkpoint.tensor_file import TensorFile
from megacore.errors import CheckpointError
from megacore.params import Region, region_shape

_BLOCK = 1 << 22
"""Entries read at once while a checksum is computed."""
_MAX_OPEN_FILES = 128
"""Of a checkpoint that may have thousands."""

FloatArray = NDArray[np.floating[Any]]
Rows = Callable[[int, int], torch.Tensor]
"""(start, stop) -> those rows of a stored tensor's first dim."""


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
        result = np.empty(region_shape(region), _array_dtype(self.dtype(parameter, state)))
        filled = 0
        for box, pieces in self._boxes(parameter, state).items():
            overlap = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(region, box, strict=True))
            if any(start >= stop for start, stop in overlap):
                continue
            target = tuple(slice(o0 - r0, o1 - r0) for (o0, o1), (r0, _) in zip(overlap, region, strict=True))
            source = tuple((o0 - b0, o1 - b0) for (o0, o1), (b0, _) in zip(overlap, box, strict=True))
            result[target] = self._read_box(box, pieces, source)
            filled += math.prod(region_shape(overlap))
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
            return _array(rows[(slice(None), *slices[1:])])
        # Flat runs: fetch whole rows of the first dim, then cut the other dims.
        inner = math.prod(shape[1:])
        first, stop = part[0][0] * inner, part[0][1] * inner
        flat = np.empty(stop - first, _array_dtype(pieces[0][2].dtype))
        for (low, high), (name, key, piece) in self._runs(box, pieces):
            begin, end = max(first, low), min(stop, high)
            if begin < end:
                stored = self._stored(name, key, piece)
                flat[begin - first : end - first] = _array(stored(begin - low, end - low))
        return flat.reshape(-1, *shape[1:])[(slice(None), *slices[1:])]

    def _runs(
        self, box: Region, pieces: list[tuple[str, str, Piece]]
    ) -> list[tuple[tuple[int, int], tuple[str, str, Piece]]]:
        """Return a box's flat runs in order, having checked that they follow each other from end to end."""
        size = math.prod(region_shape(box))
        runs = sorted(((item[2].run or (0, size), item) for item in pieces), key=lambda run: run[0])
        ends = [0, *(high for (_, high), _ in runs)]
        if [low for (low, _), _ in runs] != ends[:-1] or ends[-1] != size:
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
                    yield name, key, _array(block)

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


def _array(tensor: torch.Tensor) -> FloatArray:
    values: FloatArray = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return values


def _blocks(rows_of: Rows, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Cut a stored tensor along its first dim into blocks of bounded size."""
    rows = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield rows_of(start, min(start + rows, shape[0]))
