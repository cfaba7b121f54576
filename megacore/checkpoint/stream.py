"""Write a safetensors file tensor by tensor, in blocks: no file needs to fit into memory.

The format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, little endian; the
header, JSON that gives each tensor's dtype, shape and place; the tensors' bytes. The library writes whole
dictionaries only; it reads what is written here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DTYPES = {"float32": "F32", "float64": "F64"}


class Entry(NamedTuple):
    """A tensor to be written: its name in the file, dtype (``float32`` or ``float64``) and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]


class SafetensorsStream:
    """A safetensors file being written; tensors must come in the order of ``entries``.

    Use as a context manager; on leaving, the file is flushed to the disk.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        header: dict[str, object] = {}
        offset = 0
        for entry in entries:
            size = np.dtype(entry.dtype).itemsize * math.prod(entry.shape)
            header[entry.key] = {
                "dtype": DTYPES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
        self._expected = list(entries)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self.size = 8 + len(text) + offset

    def write(self, key: str, blocks: Iterable[NDArray[np.floating]]) -> str:
        """Write the next tensor from its blocks in row-major order; return the SHA-256 of its bytes."""
        entry = self._expected.pop(0)
        assert entry.key == key, f"{key} written where {entry.key} was expected"
        checksum = hashlib.sha256()
        written = 0
        for block in blocks:
            data = np.ascontiguousarray(block, dtype=np.dtype(entry.dtype).newbyteorder("<"))
            checksum.update(data.data)
            self._file.write(data.data)
            written += data.size
        assert written == math.prod(entry.shape), f"{key}: {written} entries written, {math.prod(entry.shape)} declared"
        return checksum.hexdigest()

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[0] is None:
                assert not self._expected, f"not written: {self._expected}"
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
