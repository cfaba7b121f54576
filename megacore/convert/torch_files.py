"""Other programs' torch files: plain values, and tensors that stay on the disk; no code of theirs is ever run.

What such a file names besides tensors (settings objects, enumerations) is read as an inert stand-in that holds its
fields: torch's weights-only unpickler never imports or calls what it was not given.
"""

from __future__ import annotations

import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megacore.convert.stored_tensor import StoredTensor
from megacore.errors import CheckpointError

_LOCAL_HEADER_BYTES = 30
"""Of an entry of a zip file, before its name (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT, 4.3.7)."""


class Inert:
    """Stands for an object of a class that is not loaded: its state's fields, and nothing else."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def load_torch_file(path: Path, stand_ins: bool = True) -> Any:
    """Read a file of ``torch.save``'s; in place of each tensor there is a `StoredTensor`.

    Args:
        path: the file.
        stand_ins: read objects of unknown classes as `Inert` ones, instead of refusing the file.

    Raises:
        CheckpointError: it is missing, damaged, or in a format whose tensors cannot be read in place.
    """
    try:
        records = _records(path)
        names = get_unsafe_globals_in_checkpoint(path) if stand_ins else []
        with safe_globals([(Inert, name) for name in names]) if names else nullcontext():
            # On the meta device a storage has no bytes, but torch tells where in the file they begin.
            loaded = torch.load(path, map_location="meta", weights_only=True)
        return _Located(path, records).of(loaded)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except CheckpointError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        what = " ".join(str(error).split()) or type(error).__name__
        kind = "usable torch file" if stand_ins else "file of weights"
        raise CheckpointError(f"{path}: not a {kind}: {what}") from None


def _records(path: Path) -> dict[int, int]:
    """Return the sizes of the entries of a zip file that are stored as they are, by where their bytes begin."""
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise CheckpointError(
                f"{path}: not a zip file: it is damaged, or torch wrote it in its format of before version 1.6; "
                "if so, load it with torch and save it again"
            )
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(f"{path}: its entries are compressed, which torch.save never does: unpack them first")
        return {_begin(file, entry.header_offset): entry.file_size for entry in entries}


def _begin(file: BinaryIO, header: int) -> int:
    """Return where the bytes of an entry of a zip file begin."""
    file.seek(header)
    content = file.read(_LOCAL_HEADER_BYTES)
    lengths = (int.from_bytes(content[place : place + 2], "little") for place in (26, 28))  # name, extra field
    return header + _LOCAL_HEADER_BYTES + sum(lengths)


class _Located:
    """Replaces the tensors in lists, tuples and dicts: each of them once, however often a file refers to it."""

    def __init__(self, path: Path, records: dict[int, int]) -> None:
        self._path, self._records = path, records
        self._made: dict[int, Any] = {}
        self._inside: set[int] = set()

    def of(self, value: Any) -> Any:
        """Return the value with a `StoredTensor` for each tensor in it."""
        if isinstance(value, torch.Tensor):
            return _stored(value, self._path, self._records)
        if not isinstance(value, dict) and type(value) not in (list, tuple):
            return value
        key = id(value)
        if key in self._inside:
            raise CheckpointError(f"{self._path}: a {type(value).__name__} in it contains itself")
        if key not in self._made:
            self._inside.add(key)
            if isinstance(value, dict):
                self._made[key] = {name: self.of(item) for name, item in value.items()}
            else:
                self._made[key] = type(value)(self.of(item) for item in value)
            self._inside.remove(key)
        return self._made[key]


def _stored(tensor: torch.Tensor, path: Path, records: dict[int, int]) -> StoredTensor:
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise CheckpointError(f"{path}: it has sparse or quantized tensors, which are not read")
    shape, strides, size = tuple(tensor.shape), tensor.stride(), tensor.dtype.itemsize
    offset = int(tensor.storage_offset()) * size
    if not tensor.numel():
        return StoredTensor(path, tensor.dtype, shape, strides, 0)
    end = offset + size * (1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True)))
    begin = tensor.untyped_storage()._checkpoint_offset
    if begin is None or end > records.get(begin, -1):
        raise CheckpointError(f"{path}: a tensor does not lie in an entry of the file: it is damaged")
    return StoredTensor(path, tensor.dtype, shape, strides, begin + offset)
