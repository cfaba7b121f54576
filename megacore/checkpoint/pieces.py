"""A checkpoint's file and its own manifest: the safetensors header says which piece of what each tensor is.

So the checkpoint's manifest need not: it stays small whatever the number of pieces, and a reader opens the files that
hold what it wants.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.checkpoint.header import whole_number
from megacore.checkpoint.manifest import FileRecord
from megacore.checkpoint.stream import Entry, checksum_of
from megacore.checkpoint.tensor_file import TensorFile
from megacore.errors import CheckpointError, DamagedError
from megacore.specs import Region, region_shape

_WHOLE_BYTES = 32 << 20
"""Size up to which a tensor is read whole when it is checked."""


@dataclass(frozen=True)
class Piece:
    """One stored tensor: a box of a global tensor, or a flat run of the box's entries (a ZeRO partition's share).

    Args:
        parameter: that it is of.
        state: ``weight`` or one of Adam's moments.
        region: the box [start, stop) in the global tensor, one pair for each dim.
        run: [start, stop) in the box's entries in row-major order; none if the whole box is stored, in its shape.
        dtype: of the stored values.
    """

    parameter: str
    state: str
    region: Region
    run: tuple[int, int] | None
    dtype: str

    @property
    def key(self) -> str:
        """The tensor's name in its file."""
        return f"{self.parameter}/{self.state}"

    @property
    def entry(self) -> Entry:
        """The stored tensor."""
        shape = (self.run[1] - self.run[0],) if self.run else region_shape(self.region)
        return Entry(self.key, self.dtype, shape)


def described(pieces: Sequence[Piece], checksums: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a file's header: each tensor's piece and its checksum, as JSON."""
    return {
        piece.key: json.dumps(
            {"region": piece.region, "run": piece.run, "xxh3_128": checksums[piece.key]}, separators=(",", ":")
        )
        for piece in pieces
    }


class PieceFile:
    """A file of a checkpoint, open for reading.

    Args:
        path: the file.
        record: what the manifest says about it.
        shapes: the global shape of every parameter.

    Raises:
        CheckpointError: the file is missing, cut short or altered, or it is not the one that the manifest means.
    """

    def __init__(self, path: Path, record: FileRecord, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            if size != record.size:
                raise DamagedError(f"{path} has {size} bytes instead of {record.size}: it is cut short or altered")
            self._file = TensorFile(path)
        except FileNotFoundError:
            raise DamagedError(f"{path} is missing") from None
        except ValueError as error:
            raise DamagedError(f"{path} cannot be read: {error}") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        self._checksums: dict[str, str] = {}
        self._unchecked = set(self._file.tensors)
        try:
            if self._file.header != record.header:
                raise DamagedError(
                    f"{path}: its header is damaged, or it is another file (its checksum does not match)"
                )
            self.pieces = {key: self._piece(key, record.states, shapes) for key in self._file.tensors}
        except CheckpointError:
            self.close()
            raise

    def _piece(self, key: str, states: Mapping[Any, str], shapes: Mapping[str, tuple[int, ...]]) -> Piece:
        parameter, _, state = key.rpartition("/")
        stored = self._file.tensors[key]
        try:
            about = json.loads(self._file.metadata[key])
            region = tuple((whole_number(start), whole_number(stop)) for start, stop in about["region"])
            run = None if about["run"] is None else (whole_number(about["run"][0]), whole_number(about["run"][1]))
            self._checksums[key] = str(about["xxh3_128"])
        except (KeyError, TypeError, ValueError, IndexError, RecursionError):
            raise CheckpointError(f"{self.path}: its header does not say what {key} is") from None
        piece = Piece(parameter, state, region, run, stored.dtype)
        if stored.dtype != states.get(state):
            raise CheckpointError(f"{self.path}: {key} is stored as {stored.dtype}, other than the manifest says")
        if parameter not in shapes or not _inside(region, run, shapes[parameter]):
            raise CheckpointError(f"{self.path}: the piece {key} does not fit into {parameter}")
        if piece.entry.shape != stored.shape:
            raise CheckpointError(f"{self.path}: {key} has the shape {stored.shape} instead of {piece.entry.shape}")
        return piece

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def check(self, key: str) -> NDArray[Any] | None:
        """Compare a tensor with its checksum, at the first call; return it if it was read whole for that.

        Raises:
            CheckpointError: naming file and tensor.
        """
        if key not in self._unchecked:
            return None
        entry = self.pieces[key].entry
        whole = None
        with self._errors(key):
            if entry.nbytes <= _WHOLE_BYTES:
                whole = self._file.rows(key, 0, entry.shape[0])
                found = checksum_of(whole.reshape(-1).view(np.uint8).data)
            else:
                found = self._file.checksum(key)
        if found != self._checksums[key]:
            raise DamagedError(f"{self.path}: {key} was altered (its checksum does not match)")
        self._unchecked.remove(key)
        return whole

    def rows(self, key: str, start: int, stop: int) -> NDArray[Any]:
        """Return the rows [start, stop) of the first dim of a tensor that was checked."""
        assert key not in self._unchecked
        with self._errors(key):
            return self._file.rows(key, start, stop)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            raise DamagedError(f"{self.path}: {key} cannot be read: {error}") from error
        except OSError as error:
            raise CheckpointError(f"{self.path}: {key} cannot be read: {error.strerror or error}") from error


def _inside(region: Region, run: tuple[int, int] | None, shape: tuple[int, ...]) -> bool:
    if len(region) != len(shape):
        return False
    if not all(0 <= start < stop <= size for (start, stop), size in zip(region, shape, strict=True)):
        return False
    return run is None or 0 <= run[0] < run[1] <= math.prod(region_shape(region))
