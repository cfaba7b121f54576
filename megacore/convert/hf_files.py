"""A Hugging Face directory's files: tensors by name, read slice by slice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megacore.convert.safetensors_files import load_safetensors
from megacore.convert.stored_tensor import StoredTensor
from megacore.convert.torch_files import load_torch_file
from megacore.errors import CheckpointError

CONFIG = "config.json"
COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files beside the weights that go with a model: its tokenizer's, and how text is made with it."""
_IGNORED = re.compile(
    r"(pytorch_|tf_|flax_|rust_)?model.*\.(bin|safetensors|index\.json|msgpack|h5|ot|onnx)|onnx|openvino"
    r"|.*\.md|LICENSE.*|\.git.*|\.cache"
)
"""Files and folders whose loss is none: the weights in other formats, and words about them."""
_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"


class HuggingFaceFiles:
    """A directory as ``save_pretrained`` writes it: safetensors, or torch files (read as weights only).

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: dict[str, Any] = read_json(path / CONFIG)
        self._open: dict[str, dict[str, StoredTensor]] = {}
        self._files = self._find()

    def _find(self) -> dict[str, str]:
        """Return the file of each tensor."""
        for name in (_SAFE, _PICKLED):
            index = self.path / f"{name}.index.json"
            if index.exists():
                weights = read_json(index).get("weight_map")
                if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
                    raise CheckpointError(f"{index}: weight_map must give the name of each tensor's file")
                for file in set(weights.values()):
                    if Path(file).name != file or not (self.path / file).is_file():
                        raise CheckpointError(f"{index} names {file}, which is missing")
                return weights
        for name in (_SAFE, _PICKLED):
            if (self.path / name).exists():
                return dict.fromkeys(self._tensors(name), name)
        raise CheckpointError(f"{self.path} has neither {_SAFE} nor {_PICKLED}")

    @property
    def others(self) -> list[str]:
        """Names of the files and folders that nothing is done with."""
        known = {CONFIG, *COMPANIONS, *self._files.values()}
        found = {path.name for path in self.path.iterdir()} - known
        return sorted(name for name in found if not _IGNORED.fullmatch(name))

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    def read(self, name: str, box: tuple[slice, ...]) -> NDArray[Any]:
        """Return a box of a tensor, as float32 (float64 stays what it is)."""
        values = self.stored(name).read(box)
        wide = values if values.dtype == torch.float64 else values.float()
        return np.asarray(wide.numpy())

    def stored(self, name: str) -> StoredTensor:
        """Return where a tensor is."""
        file = self._files[name]
        stored = self._tensors(file).get(name)
        if stored is None:
            raise CheckpointError(f"{self.path / file}: {name} is missing, though the index says that it is there")
        return stored

    def _tensors(self, file: str) -> dict[str, StoredTensor]:
        if file not in self._open:
            path = self.path / file
            if file.endswith(".safetensors"):
                self._open[file] = load_safetensors(path)
            else:
                loaded = load_torch_file(path, stand_ins=False)
                if not isinstance(loaded, dict):
                    raise CheckpointError(f"{path}: not a file of weights: expected tensors by name")
                tensors = {name: item for name, item in loaded.items() if isinstance(item, StoredTensor)}
                for name in tensors:
                    if not isinstance(name, str):
                        raise CheckpointError(f"{path}: not a file of weights: {name!r} is no tensor's name")
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
