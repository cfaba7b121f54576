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
import torch
from numpy.typing import NDArray

from megacore.checkpoint.stream import DTYPES, ITEM_BYTES

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_TORCH = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


class StoredTensor(NamedTuple):
    """A tensor in a file: its dtype (a key of `DTYPES`), its shape, and where its bytes begin."""

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
        header = json.loads(self._read(8, length).tobytes())
        if not isinstance(header, dict):
            raise ValueError("its header is damaged")
        self.tensors = {key: _stored(entry, 8 + length, size) for key, entry in header.items() if key != "__metadata__"}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def rows(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Return the rows [start, stop) of a tensor's first dim."""
        dtype, shape, offset = self.tensors[key]
        row = math.prod(shape[1:]) * ITEM_BYTES[dtype]
        content = self._read(offset + start * row, (stop - start) * row)
        return torch.from_numpy(content).view(_TORCH[dtype]).view(stop - start, *shape[1:])

    def _read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Return bytes of the file."""
        content = np.empty(size, np.uint8)
        done = 0
        while done < size:  # one call reads 2 GiB at most
            count = os.preadv(self._file.fileno(), [content[done:].data], offset + done)
            if count == 0:
                raise ValueError("it is cut short")
            done += count
        return content


def _stored(entry: Any, begin: int, size: int) -> StoredTensor:
    """Check an entry of the header against the file's size."""
    try:
        dtype = {name: key for key, name in DTYPES.items()}[entry["dtype"]]
        shape = tuple(int(length) for length in entry["shape"])
        start, stop = (begin + int(place) for place in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise ValueError("its header is damaged") from None
    if not begin <= start <= stop <= size or stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError("its header does not fit its size")
    return StoredTensor(dtype, shape, start)
