"""Other programs' safetensors files: tensors that stay on the disk.

The format (https://github.com/huggingface/safetensors) is described in `megacore.checkpoint.stream`. The library maps
a file, so it would hold all that was ever read of it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from megacore.convert.stored_tensor import StoredTensor
from megacore.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def load_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Read a file's header.

    Raises:
        CheckpointError: it is missing, damaged, or has a tensor of another dtype.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError("its header is damaged")
            header = json.loads(file.read(length))
        return {
            key: _stored(path, key, entry, 8 + length, size) for key, entry in header.items() if key != "__metadata__"
        }
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from None


def _stored(path: Path, key: str, entry: Any, begin: int, size: int) -> StoredTensor:
    try:
        word = str(entry["dtype"])
        shape = tuple(int(length) for length in entry["shape"])
        start, stop = (begin + int(place) for place in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the header's entry of {key} is damaged") from None
    if word not in _DTYPES:
        raise ValueError(f"{key} has the dtype {word}, which is not read; its weights must be floating-point numbers")
    dtype = _DTYPES[word]
    if min(shape, default=1) < 0 or not begin <= start <= stop <= size:
        raise ValueError(f"{key} does not lie in the file: it is cut short or damaged")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the header's entry of {key} is damaged")
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return StoredTensor(path, dtype, shape, strides, start)
