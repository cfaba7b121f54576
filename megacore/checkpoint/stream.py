"""Write a safetensors file tensor by tensor, in blocks: no file needs to fit into memory.

The format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, little endian; the
header, JSON that gives each tensor's dtype, shape and place; the tensors' bytes. The library writes whole
dictionaries only; it reads what is written here.
"""

from __future__ import annotations

import json
import math
import mmap
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
_PAGE = 4096
"""What lies at multiples of it can be written past the system's page cache."""
_STAGED_BYTES = 16 << 20
"""Brought to the disk at a time, while more is made."""
_STAGES = 3


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

    Use as a context manager. One thread takes checksums and gathers blocks while the next one is made, another brings
    what was gathered to the disk: past the page cache where the file system can do that, so that a checkpoint costs
    no copy there and drives nothing out of it. On leaving, the header is completed and the last of the file flushed.

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
        self._direct = _open_direct(path)
        self._writer, self._flusher = ThreadPoolExecutor(1, "write"), ThreadPoolExecutor(1, "flush")
        self._pending: deque[Future[None]] = deque()
        self._flushing: deque[Future[None]] = deque()
        header, body = self._header(), sum(entry.nbytes for entry in entries)
        _write_all(self._file.fileno(), memoryview(header), 0)
        self.size = len(header) + body
        self._offset = len(header)
        self._stages = deque(_stage(min(_STAGED_BYTES, max(_PAGE, body))) for _ in range(_STAGES))
        self._staged = 0

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
        while content:
            stage = self._stages[0]
            count = min(len(content), len(stage) - self._staged)
            stage[self._staged : self._staged + count] = content[:count]
            content, self._staged = content[count:], self._staged + count
            if self._staged == _STAGED_BYTES:
                self._flush_stage()

    def _flush_stage(self) -> None:
        """Bring a full stage to the disk, and go on with one that is there already."""
        self._flushing.append(self._flusher.submit(self._bring, self._stages[0], self._offset))
        self._stages.rotate(-1)
        self._offset, self._staged = self._offset + _STAGED_BYTES, 0
        if len(self._flushing) == _STAGES:
            self._flushing.popleft().result()

    def _bring(self, stage: mmap.mmap, offset: int) -> None:
        if self._direct is not None:
            _write_all(self._direct, memoryview(stage), offset)
        else:
            _write_all(self._file.fileno(), memoryview(stage), offset)
            os.fdatasync(self._file.fileno())

    def _header(self) -> bytes:
        metadata = self._describe({key: checksum.hexdigest() for key, checksum in self._checksums.items()})
        header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
        offset = 0
        for entry in self._entries:
            place = [offset, offset + entry.nbytes]
            header[entry.key] = {"dtype": CODES[entry.dtype], "shape": entry.shape, "data_offsets": place}
            offset = place[1]
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _PAGE)  # the tensors begin at a page
        return len(text).to_bytes(8, "little") + text

    def __enter__(self) -> SafetensorsStream:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[0] is None:
                assert self._written == len(self._entries), f"not written: {self._entries[self._written :]}"
                while self._pending:
                    self._pending.popleft().result()
                while self._flushing:
                    self._flushing.popleft().result()  # the system tells of a failed flush once: not again below
                _write_all(self._file.fileno(), memoryview(self._stages[0])[: self._staged], self._offset)
                header = self._header()
                _write_all(self._file.fileno(), memoryview(header), 0)
                self.header = checksum_of(header)
                os.fsync(self._file.fileno())
        finally:
            self._writer.shutdown(cancel_futures=True)
            self._flusher.shutdown()
            self._file.close()
            if self._direct is not None:
                os.close(self._direct)


def _stage(size: int) -> mmap.mmap:
    stage = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # fewer pages to hold on to while they are written
        stage.madvise(mmap.MADV_HUGEPAGE)
    return stage


def _open_direct(path: Path) -> int | None:
    """Open a file for writes past the page cache; ``None`` where the system or the file system has no such thing."""
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except (AttributeError, OSError):
        return None


def _write_all(descriptor: int, content: memoryview, offset: int) -> None:
    while content:  # one call writes 2 GiB at most
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count


def checksum_of(content: bytes | memoryview) -> str:
    """Return the XXH3-128 of some bytes: fast, and made to find damage, not to resist forgery."""
    return xxhash.xxh3_128_hexdigest(content)
