"""Read a safetensors file row by row with plain reads, so that a process holds what it asked for and no more."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from megacore.checkpoint.header import Place, read_header
from megacore.checkpoint.stream import CODES, NUMPY, checksum_of

_CHECKED_BYTES = 1 << 20
"""Read at once while a checksum is taken: what a processor's cache holds."""
_NAMES = {code: name for name, code in CODES.items()}


class Stored(NamedTuple):
    """A tensor in a file: its dtype (a key of `CODES`), its shape, and where its bytes begin."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorFile:
    """A safetensors file, open for reading.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not such a file; what is wrong.
    """

    def __init__(self, path: Path) -> None:
        content, self.metadata, places = read_header(path)
        self.header = checksum_of(content)
        """The header's checksum."""
        self.tensors = {key: _stored(key, place) for key, place in places.items()}
        self._file = path.open("rb", buffering=0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def rows(self, key: str, start: int, stop: int) -> NDArray[Any]:
        """Return the rows [start, stop) of a tensor's first dim, in the stored type."""
        dtype, shape, offset = self.tensors[key]
        row = math.prod(shape[1:]) * NUMPY[dtype].itemsize
        content = np.empty((stop - start) * row, np.uint8)
        self._read_into(content, offset + start * row)
        return content.view(NUMPY[dtype]).reshape(stop - start, *shape[1:])

    def checksum(self, key: str) -> str:
        """Return the XXH3-128 of a tensor's bytes."""
        dtype, shape, offset = self.tensors[key]
        stop = offset + math.prod(shape) * NUMPY[dtype].itemsize
        checksum, buffer = xxhash.xxh3_128(), np.empty(_CHECKED_BYTES, np.uint8)
        for start in range(offset, stop, _CHECKED_BYTES):
            part = buffer[: min(_CHECKED_BYTES, stop - start)]
            self._read_into(part, start)
            checksum.update(part.data)
        return checksum.hexdigest()

    def _read_into(self, content: NDArray[np.uint8], offset: int) -> None:
        done = 0
        while done < len(content):  # one call reads 2 GiB at most
            count = os.preadv(self._file.fileno(), [content[done:].data], offset + done)
            if count == 0:
                raise ValueError("it is cut short")
            done += count


def _stored(key: str, place: Place) -> Stored:
    if place.code not in _NAMES:
        raise ValueError(f"its header is damaged: {key} has the type {place.code}")
    dtype = _NAMES[place.code]
    place.check(key, NUMPY[dtype].itemsize)
    return Stored(dtype, place.shape, place.start)
