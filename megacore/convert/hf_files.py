"""A Hugging Face directory's files: tensors by name, read slice by slice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from megacore.errors import CheckpointError

CONFIG = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"


class HuggingFaceFiles:
    """A directory as ``save_pretrained`` writes it: safetensors, or torch files (read as weights only).

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = read_json(path / CONFIG)
        self._open: dict[str, Any] = {}
        self._files = self._find()

    def _find(self) -> dict[str, str]:
        """Return the file of each tensor."""
        for name in (_SAFE, _PICKLED):
            index = self.path / f"{name}.index.json"
            if index.exists():
                weights = read_json(index).get("weight_map", {})
                for file in set(weights.values()):
                    if Path(file).name != file or not (self.path / file).is_file():
                        raise CheckpointError(f"{index} names {file}, which is missing")
                return dict(weights)
        if (self.path / _SAFE).exists():
            return dict.fromkeys(self._safe(_SAFE).keys(), _SAFE)
        if (self.path / _PICKLED).exists():
            return dict.fromkeys(self._pickled(_PICKLED), _PICKLED)
        raise CheckpointError(f"{self.path} has neither {_SAFE} nor {_PICKLED}")

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        file = self._files[name]
        try:
            if file.endswith(".safetensors"):
                return tuple(self._safe(file).get_slice(name).get_shape())
            return tuple(self._pickled(file)[name].shape)
        except (SafetensorError, KeyError) as error:
            raise CheckpointError(f"{self.path / file}: {name} cannot be read: {error}") from None

    def read(self, name: str, box: tuple[slice, ...]) -> NDArray[Any]:
        """Return a box of a tensor, as float32 (float64 stays what it is)."""
        file = self._files[name]
        try:
            values = self._safe(file).get_slice(name)[box] if file.endswith(".safetensors") else None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.path / file}: {name} cannot be read: {error}") from None
        values = self._pickled(file)[name][box] if values is None else values
        wide = values if values.dtype == torch.float64 else values.float()
        return np.asarray(wide.numpy())

    def _safe(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.path / file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.path / file}: not a safetensors file: {error}") from None
        return self._open[file]

    def _pickled(self, file: str) -> Any:
        if file not in self._open:
            try:
                loaded = torch.load(self.path / file, map_location="cpu", mmap=True, weights_only=True)
                tensors = {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
            except Exception as error:  # torch raises many kinds for a damaged file
                raise CheckpointError(f"{self.path / file}: not a file of weights: {error}") from None
            self._open[file] = tensors
        return self._open[file]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: there is no such file, or it is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value
