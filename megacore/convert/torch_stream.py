"""Write a torch file tensor by tensor: what ``torch.load`` reads never has to fit into memory.

torch lays out the file without the tensors' values, which are then written into their places.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.serialization import safe_globals, skip_data

from megacore.checkpoint.stream import Entry

_TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class TorchStream:
    """A torch file being written: a dictionary of plain values, with the tensors under one key.

    Use as a context manager; on leaving, the file is flushed to the disk.

    Args:
        path: of the new file.
        rest: the dictionary without the tensors; settings objects may be ``argparse.Namespace``.
        key: under which the dictionary of tensors goes.
        entries: the tensors.
    """

    def __init__(self, path: Path, rest: dict[str, Any], key: str, entries: list[Entry]) -> None:
        with FakeTensorMode():
            empty = {entry.key: torch.empty(entry.shape, dtype=_TORCH[entry.dtype]) for entry in entries}
            with path.open("xb") as file, skip_data(materialize_fake_tensors=True):
                torch.save({**rest, key: empty}, file)
            with safe_globals([argparse.Namespace]):
                laid_out = torch.load(path, weights_only=True)[key]
        self._offsets = {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in laid_out.items()}
        self._missing = set(self._offsets)
        self._file = path.open("r+b")

    def write(self, key: str, values: NDArray[Any]) -> None:
        """Write a tensor's values (bfloat16, which numpy lacks, as its bits)."""
        self._missing.remove(key)
        self._file.seek(self._offsets[key])
        self._file.write(np.ascontiguousarray(values).data)

    def __enter__(self) -> TorchStream:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[0] is None:
                assert not self._missing, f"not written: {sorted(self._missing)}"
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
