"""Other programs' safetensors files: tensors that stay on the disk."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from megacore.checkpoint.header import Place, read_header
from megacore.convert.stored_tensor import StoredTensor
from megacore.errors import CheckpointError

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
        return {key: _stored(path, key, place) for key, place in read_header(path).places.items()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, OverflowError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from None


def _stored(path: Path, key: str, place: Place) -> StoredTensor:
    code, shape, start, _ = place
    if code not in _DTYPES:
        raise ValueError(f"{key} has the dtype {code}, which is not read; its weights must be floating-point numbers")
    place.check(key, _DTYPES[code].itemsize)
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return StoredTensor(path, _DTYPES[code], shape, strides, start)
