"""Write a safetensors file tensor by tensor, in blocks: no file needs to fit into memory.

The format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, little endian; the
header, JSON that gives each tensor's dtype, shape and place; the tensors' bytes. The library writes whole
dictionaries only; it reads what is written here.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import xxhash
from numpy.typing import NDArray

CODES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16"}
"""The dtypes that are stored, by their names in manifests -> in safetensors' headers."""
NUMPY = {name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in CODES}
"""Numpy's types of the stored values."""
_QUEUED = 8
"""Blocks that may wait to be written, so that a writer that lags behind does not fill the memory."""
_FLUSHED_BYTES = 16 << 20
"""Flushed at a time while more is written, so that little is left to be flushed at the end."""


class Entry(NamedTuple):
    """A tensor to be written: its name in the file, dtype (a key of `CODES`) and shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * NUMPY[self.dtype].itemsize


Describe = Callable[[Mapping[str, str]], dict[str, str]]
"""Each tensor's checksum -> the header's metadata; its length must not depend on the checksums' values."""


class SafetensorsStream:
    """A safetensors file being written; tensors must come in the order of ``entries``.

    Use as a context manager. One thread takes checksums and writes while the next block is made, another flushes what
    was written to the disk; on leaving, the header is completed and the last of the file is flushed.

    Args:
        path: must not exist.
        entries: the tensors.
        describe: makes the header's metadata.
    """

    header: str
    """The header's checksum, known at the end."""

    def __init__(self, path: Path, entries: Sequence[Entry], describe: Describe = lambda checksums: {}) -> None:
        self._entries, self._describe = tuple(entries), describe
        self._checksums = {entry.key: xxhash.xxh3_128() for entry in entries}
        self._written = 0
        self._file = path.open("xb", buffering=0)
        self._writer, self._flusher = ThreadPoolExecutor(1, "write"), ThreadPoolExecutor(1, "flush")
        self._pending: deque[Future[None]] = deque()
        self._flushing: Future[None] | None = None
        self._unflushed = 0
        header = self._header()
        self._write_all(header)
        self.size = len(header) + sum(entry.nbytes for entry in entries)

    def write(self, key: str, blocks: Iterable[NDArray[Any]]) -> None:
        """Write the next tensor from its blocks in row-major order; a block must not change after it was given."""
        entry = self._entries[self._written]
        assert entry.key == key, f"{key} written where {entry.key} was expected"
        size = 0
        for block in blocks:
            data = np.ascontiguousarray(block, dtype=NUMPY[entry.dtype])
            while len(self._pending) >= _QUEUED:
                self._pending.popleft().result()
            self._pending.append(self._writer.submit(self._put, key, data))
            size += data.nbytes
        assert size == entry.nbytes, f"{key}: {size} bytes written, {entry.nbytes} declared"
        self._written += 1

    def _put(self, key: str, data: NDArray[Any]) -> None:
        content = data.reshape(-1).view(np.uint8).data
        self._checksums[key].update(content)
        self._write_all(content)
        self._unflushed += len(content)
        if self._unflushed >= _FLUSHED_BYTES and (self._flushing is None or self._flushing.done()):
            if self._flushing is not None:
                self._flushing.result()
            self._unflushed = 0
            self._flushing = self._flusher.submit(os.fdatasync, self._file.fileno())

    def _write_all(self, content: bytes | memoryview) -> None:
        view = memoryview(content)
        while view:  # one call writes 2 GiB at most
            view = view[self._file.write(view) :]

    def _header(self) -> bytes:
        metadata = self._describe({key: checksum.hexdigest() for key, checksum in self._checksums.items()})
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for entry in self._entries:
            place = [offset, offset + entry.nbytes]
            header[entry.key] = {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": place}
            offset = place[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
        return len(text).to_bytes(8, "little") + text

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[0] is None:
                assert self._written == len(self._entries), f"not written: {self._entries[self._written :]}"
                while self._pending:
                    self._pending.popleft().result()
                if self._flushing is not None:
                    self._flushing.result()  # the system tells of a failed flush once: not again below
                header = self._header()
                self._file.seek(0)
                self._write_all(header)
                self.header = checksum_of(header)
                os.fsync(self._file.fileno())
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._flusher.shutdown()
            self._file.close()


def checksum_of(content: bytes | memoryview) -> str:
    """Return the XXH3-128 of some bytes: fast, and made to find damage, not to resist forgery."""
    return xxhash.xxh3_128_hexdigest(content)
