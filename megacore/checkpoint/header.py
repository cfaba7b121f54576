"""The header of a safetensors file (https://github.com/huggingface/safetensors), read and checked.

The library itself maps files, and a mapped file's pages count as resident memory.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

_MAX_BYTES = 100_000_000  # the format's own limit


class Place(NamedTuple):
    """A tensor in a file: its dtype by the format's code, its shape, and where its bytes are."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def check(self, key: str, item_bytes: int) -> None:
        """Check that as many bytes are there as entries of this size need.

        Raises:
            ValueError: there are more or fewer.
        """
        if self.stop - self.start != math.prod(self.shape) * item_bytes:
            raise ValueError(f"its header is damaged: {key} has {self.stop - self.start} bytes")


class Header(NamedTuple):
    """What precedes the tensors: its bytes, the metadata, and each tensor's place by name."""

    content: bytes
    metadata: dict[str, Any]
    places: dict[str, Place]


def read_header(path: Path) -> Header:
    """Read a file's header.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file, or is cut short; what is wrong.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = file.read(8)
        end = 8 + int.from_bytes(length, "little")
        if len(length) < 8 or end > min(8 + _MAX_BYTES, size):
            raise ValueError("its header is damaged")
        content = length + file.read(end - 8)
    try:
        entries = dict(json.loads(content[8:]))
        metadata = dict(entries.pop("__metadata__", {}))
    except (TypeError, ValueError, RecursionError):
        raise ValueError("its header is damaged") from None
    return Header(content, metadata, {key: _place(key, entry, end, size) for key, entry in entries.items()})


def whole_number(value: Any) -> int:
    """Return a number of a header.

    Raises:
        ValueError: it is none, or not a whole one.
    """
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _place(key: str, entry: Any, begin: int, size: int) -> Place:
    try:
        code, shape = str(entry["dtype"]), tuple(whole_number(length) for length in entry["shape"])
        start, stop = (begin + whole_number(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"its header is damaged at {key}") from None
    if min(shape, default=1) < 0 or not begin <= start <= stop <= size:
        raise ValueError(f"{key} does not lie in the file: it is cut short or damaged")
    return Place(code, shape, start, stop)
