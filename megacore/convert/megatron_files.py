"""Megatron-LM's checkpoint directories: ``iter_NNNNNNN/mp_rank_TT[_PPP]/model_optim_rng.pt``, as whole tensors.

TT is the tensor-parallel rank, PPP the pipeline stage, whose layers are numbered from zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.convert.links import Box2D
from megacore.convert.stored_tensor import StoredTensor, number_in
from megacore.convert.torch_files import load_torch_file
from megacore.errors import CheckpointError, ConfigError

LATEST = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""What stands in `LATEST`, and is the directory's name, for weights that belong to no iteration of a run."""
FILE = "model_optim_rng.pt"
_WITHOUT_OPTIMIZER = "model_rng.pt"
_DISTRIBUTED = "distrib_optim.pt"
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_ITERATION = re.compile(r"[0-9]{1,19}")
_LAYER = re.compile(r"(.*\blayers\.)([0-9]{1,9})(\..*)")
_NOT_WEIGHTS = re.compile(r"(_extra_state|\.inv_freq)$")
"""Transformer Engine's scaling factors, and a table that follows from the configuration."""


def iteration_folder(path: Path) -> Path:
    """Return the directory with the ranks' directories: ``path``, or the one that its `LATEST` names."""
    file = path / LATEST
    if not file.is_file():
        return path
    said = file.read_text(encoding="utf-8", errors="replace").strip()
    folder = path / (f"iter_{int(said):07d}" if _ITERATION.fullmatch(said) else said)
    if (said != RELEASE and not _ITERATION.fullmatch(said)) or not folder.is_dir():
        raise CheckpointError(f"{file} names {said[:40]!r}, which is not there")
    return folder


class MegatronFiles:
    """The files of all ranks.

    Raises:
        CheckpointError: a rank's file is missing or damaged, or the ranks have different tensors.
        ConfigError: they were written in a way that is not read here.
    """

    def __init__(self, path: Path) -> None:
        self.folder = iteration_folder(path)
        self.ranks: dict[tuple[int, int], Path] = dict(sorted(self._find_ranks()))
        """(pipeline stage, tensor-parallel rank) -> the rank's file."""
        self.content = {rank: self._load(file) for rank, file in self.ranks.items()}
        first = next(iter(self.ranks))
        self.file = self.ranks[first]
        """The first rank's file, for messages about what all say."""
        self.has_distributed_optimizer = any(
            file.name == _WITHOUT_OPTIMIZER or file.with_name(_DISTRIBUTED).exists() for file in self.ranks.values()
        )
        self.tensor_parallel_size = 1 + max(rank for _, rank in self.ranks)
        self.args: Mapping[str, Any] = self._args(self.content[first])
        self.iteration = self._iteration(self.content[first])
        self.tensors: dict[str, list[StoredTensor]] = {}
        """Name in the whole model -> the tensor-parallel ranks' parts."""
        self.held: dict[tuple[int, int], dict[str, str]] = {}
        """Rank -> the names in the whole model of its tensors, in its file's order -> their names in its file."""
        self._check_layout()
        self._collect()

    def _find_ranks(self) -> Iterator[tuple[tuple[int, int], Path]]:
        found = {folder.name: folder for folder in self.folder.glob("mp_rank_*") if folder.is_dir()}
        if not found:
            raise CheckpointError(f"{self.folder} has no mp_rank_*: it is not a checkpoint of Megatron's torch format")
        matches = {name: _RANK.fullmatch(name) for name in found}
        places = {}
        for name, match in matches.items():
            if match is None:
                raise ConfigError(f"{found[name]}: files of expert-parallel ranks are not read")
            places[int(match[2] or 0), int(match[1])] = found[name]
        staged = any(match is not None and match[2] for match in matches.values())
        for stage in range(1 + max(stage for stage, _ in places)):
            for rank in range(1 + max(rank for _, rank in places)):
                name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if staged else "")
                file = self.folder / name / FILE
                if not file.is_file() and file.with_name(_WITHOUT_OPTIMIZER).is_file():
                    file = file.with_name(_WITHOUT_OPTIMIZER)
                if not file.is_file():
                    raise CheckpointError(f"{file} is missing")
                yield (stage, rank), file

    def _load(self, file: Path) -> dict[str, Any]:
        content = load_torch_file(file)
        if not isinstance(content, dict):
            raise CheckpointError(f"{file}: not what Megatron-LM writes")
        if "model0" in content:
            raise ConfigError(f"{file}: model0: virtual pipeline stages are not read")
        if not isinstance(content.get("model"), Mapping):
            raise CheckpointError(f"{file}: it has no model")
        version = content.get("checkpoint_version", 0)
        if not isinstance(version, int | float) or not version >= 3:
            raise ConfigError(
                f"{file}: checkpoint_version={version}: versions before 3.0 order queries, keys and values otherwise"
            )
        return content

    def _args(self, content: dict[str, Any]) -> Mapping[str, Any]:
        args = content.get("args")
        return args if isinstance(args, dict) else getattr(args, "__dict__", {})

    def _iteration(self, content: dict[str, Any]) -> int:
        return number_in(content.get("iteration", 0), f"{self.file}: iteration")

    def _check_layout(self) -> None:
        sizes = {
            "tensor_model_parallel_size": self.tensor_parallel_size,
            "pipeline_model_parallel_size": 1 + max(stage for stage, _ in self.ranks),
        }
        for key, size in sizes.items():
            if self.args.get(key, size) != size:
                raise CheckpointError(f"{self.folder}: files of {key}={size} are there; its args say {self.args[key]}")

    def _collect(self) -> None:
        """Gather the ranks' parts of each tensor, and give layers their numbers in the whole model."""
        first_layer = 0
        for stage in range(1 + max(stage for stage, _ in self.ranks)):
            layers = 0
            for rank in range(self.tensor_parallel_size):
                file, held = self.ranks[stage, rank], self.held.setdefault((stage, rank), {})
                for name, tensor in _flattened(self.content[stage, rank]["model"], file, set()):
                    if _NOT_WEIGHTS.search(f".{name}"):
                        continue
                    if not isinstance(tensor, StoredTensor):
                        raise CheckpointError(f"{file}: {name} is not a tensor")
                    match = _LAYER.fullmatch(name)
                    layers = max(layers, int(match[2]) + 1) if match else layers
                    whole = f"{match[1]}{int(match[2]) + first_layer}{match[3]}" if match else name
                    held[whole] = name
                    parts = self.tensors.setdefault(whole, [])
                    if len(parts) != rank:
                        what = "another stage has it, too" if len(parts) > rank else "an earlier rank lacks it"
                        raise CheckpointError(f"{file}: {name}: {what}")
                    parts.append(tensor)
            first_layer += layers
            for whole, name in self.held[stage, 0].items():
                rank = len(self.tensors[whole])
                if rank < self.tensor_parallel_size:
                    raise CheckpointError(f"{self.ranks[stage, rank]}: {name} is missing")


def read_parts(parts: list[StoredTensor], box: Box2D, dim: int | None) -> NDArray[np.float32]:
    """Return a box of a whole tensor in fp32.

    Args:
        parts: the tensor-parallel ranks'.
        box: in the whole tensor.
        dim: that the ranks share; ``None`` if all have the whole tensor.
    """
    if dim is None or len(parts) == 1:
        return _fp32(parts[0], box)
    size, wanted = parts[0].shape[dim], box[dim]
    pieces = []
    for rank in range(wanted.start // size, -(-wanted.stop // size)):
        own = slice(max(wanted.start - rank * size, 0), min(wanted.stop - rank * size, size))
        pieces.append(_fp32(parts[rank], (*box[:dim], own, *box[dim + 1 :])))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=dim)


def _flattened(state: Mapping[str, Any], file: Path, seen: set[int], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the entries of nested dictionaries, as some versions write them, by dotted names."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            if id(value) in seen:  # a few such, one in the other, would be endless names
                raise CheckpointError(f"{file}: {prefix}{name} is the same as another part of the model")
            seen.add(id(value))
            yield from _flattened(value, file, seen, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _fp32(tensor: StoredTensor, box: Box2D) -> NDArray[np.float32]:
    values: NDArray[np.float32] = tensor.read(box).float().numpy()
    return values
