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
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

DTYPES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16"}
ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}


class Entry(NamedTuple):
    """A tensor to be written: its name in the file, dtype (a key of `DTYPES`) and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]


class SafetensorsStream:
    """A safetensors file being written; tensors must come in the order of ``entries``.

    Use as a context manager; on leaving, the file is flushed to the disk. ``metadata`` goes into the header.
    """

    def __init__(self, path: Path, entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> None:
        header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
        offset = 0
        for entry in entries:
            size = ITEM_BYTES[entry.dtype] * math.prod(entry.shape)
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
            data = _encoded(block, entry.dtype)
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


def _encoded(block: NDArray[np.floating], dtype: str) -> NDArray[Any]:
    """Return a block's little-endian values, or, for bfloat16, which numpy lacks, their bits."""
    if dtype == "bfloat16":
        bits: NDArray[Any] = torch.from_numpy(np.ascontiguousarray(block)).bfloat16().view(torch.int16).numpy()
        return bits
    return np.ascontiguousarray(block, dtype=np.dtype(dtype).newbyteorder("<"))
