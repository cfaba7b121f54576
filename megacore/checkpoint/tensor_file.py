"""Read a safetensors file row by row with plain reads.

A mapped file's pages count as resident memory, and a conversion touches all of them: with reads, a process holds what
it asked for and no more. The format is described in `megacore.checkpoint.stream`, which writes it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from megacore.checkpoint.stream import CODES, NUMPY, checksum_of

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_CHECKED_BYTES = 1 << 20
"""Read at once while a checksum is taken: what a processor's cache holds."""


class StoredTensor(NamedTuple):
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
        self._file = path.open("rb", buffering=0)
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._read(0, min(8, size)).tobytes(), "little")
        if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError("its header is damaged")
        content = self._read(0, 8 + length).tobytes()
        self.header = checksum_of(content)
        """The header's checksum."""
        header = json.loads(content[8:])
        if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
            raise ValueError("its header is damaged")
        self.metadata: dict[str, Any] = header.pop("__metadata__", {})
        self.tensors = {key: _stored(entry, 8 + length, size) for key, entry in header.items()}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def rows(self, key: str, start: int, stop: int) -> NDArray[Any]:
        """Return the rows [start, stop) of a tensor's first dim, in the stored type."""
        dtype, shape, offset = self.tensors[key]
        row = math.prod(shape[1:]) * NUMPY[dtype].itemsize
        content = self._read(offset + start * row, (stop - start) * row)
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

    def _read(self, offset: int, size: int) -> NDArray[np.uint8]:
        content = np.empty(size, np.uint8)
        self._read_into(content, offset)
        return content

    def _read_into(self, content: NDArray[np.uint8], offset: int) -> None:
        done = 0
        while done < len(content):  # one call reads 2 GiB at most
            count = os.preadv(self._file.fileno(), [content[done:].data], offset + done)
            if count == 0:
                raise ValueError("it is cut short")
            done += count


def _stored(entry: Any, begin: int, size: int) -> StoredTensor:
    """Check an entry of the header against the file's size."""
    try:
        dtype = {code: name for name, code in CODES.items()}[entry["dtype"]]
        shape = tuple(int(length) for length in entry["shape"])
        start, stop = (begin + int(place) for place in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise ValueError("its header is damaged") from None
    if not begin <= start <= stop <= size or stop - start != math.prod(shape) * NUMPY[dtype].itemsize:
        raise ValueError("its header does not fit its size")
    return StoredTensor(dtype, shape, start)
