"""The files of DeepSpeed's checkpoints as tensors by name, in the parts that model-parallel ranks hold of them.

Native files hold flat fp32 partitions. ZeRO 1 and 2 name where each parameter's fragment lies in a replica's partition
(``param_slice_mappings``); ZeRO 3 lays equal parts of every parameter end to end, in the order of ``param_shapes``.
Universal checkpoints have a folder for each parameter, with the whole tensor of each state.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from megacore.checkpoint.manifest import MOMENTS, STATES, WEIGHT
from megacore.convert.stored_tensor import StoredTensor, check_floating, number_in
from megacore.convert.torch_files import load_torch_file
from megacore.errors import CheckpointError
from megacore.params import PLACEHOLDER

FILE_OF = {WEIGHT: "fp32", **{moment: moment for moment in MOMENTS}}
"""State -> the name of its file in a universal checkpoint."""
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_Flat = dict[str, StoredTensor]
"""A replica's partition, by state."""
_Span = tuple[int, int, int]
"""(partition, first entry, entries): a replica's piece of a parameter."""


@dataclass(frozen=True)
class Part:
    """What a model-parallel rank holds of a tensor.

    Args:
        path: the file that says its shape.
        shape: of the rank's tensor; one dim is all that some universal checkpoints say.
        flats: partitions that hold pieces of it.
        spans: the pieces, in order, each as three numbers (thousands of replicas have one of every parameter).
    """

    path: Path
    shape: tuple[int, ...]
    flats: list[_Flat]
    spans: array[int]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight's first piece; all replicas have one."""
        return self.flats[self.spans[0]][WEIGHT].dtype

    def runs(self, state: str) -> Iterator[StoredTensor]:
        """Yield the flat pieces that make the tensor, in order."""
        for flat, start, length in zip(*(self.spans[place::3] for place in range(3)), strict=True):
            yield self.flats[flat][state].narrow(start, length)


@dataclass(frozen=True)
class DeepSpeedFiles:
    """A checkpoint of DeepSpeed's, opened.

    Args:
        folder: the tag's directory.
        facts: what its engine saved besides parameters, and a client with it.
        step: that Adam's moments have seen.
        states: stored of every tensor.
        tensor_parallel_size: of the run that saved it; 1 if the tensors are whole.
        parts: by name: the tensor-parallel ranks' parts, in order.
    """

    folder: Path
    facts: dict[str, Any]
    step: int
    states: tuple[str, ...]
    tensor_parallel_size: int
    parts: dict[str, list[Part]]


def open_deepspeed(path: Path) -> DeepSpeedFiles:
    """Open a directory that DeepSpeed's ``save_checkpoint`` wrote, or a universal checkpoint.

    Args:
        path: the directory with ``latest`` (or ``latest_universal``), or one tag's directory in it.

    Raises:
        CheckpointError: a file or a part of a parameter is missing or damaged.
    """
    folder = _tag_folder(path)
    facts = _facts(folder)
    opened = _universal(folder, facts) if (folder / "zero").is_dir() else _native(folder, facts)
    if not opened.parts:
        raise CheckpointError(f"{folder} has no parameters")
    for name, parts in opened.parts.items():
        for part in parts:
            filled = sum(part.spans[2::3])
            if filled != part.size:
                raise CheckpointError(f"{part.path}: {filled} of {part.size} entries of {name} are there")
    return opened


def _tag_folder(path: Path) -> Path:
    """Return the directory with the files: ``path``, or the one in it that ``latest`` names."""
    for name in ("latest_universal", "latest"):
        if (path / name).is_file():
            tag = (path / name).read_text(encoding="utf-8", errors="replace").strip()
            if Path(tag).name != tag or tag in ("", "..") or not (path / tag).is_dir():
                raise CheckpointError(f"{path / name} names {tag!r}, which is not there")
            return path / tag
    return path


def _facts(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("*mp_rank_*_model_states.pt"))
    if not files:
        raise CheckpointError(f"{folder} has no *_model_states.pt: it is not a checkpoint of DeepSpeed's")
    facts = load_torch_file(files[0])
    if not isinstance(facts, dict):
        raise CheckpointError(f"{files[0]}: not what DeepSpeed's engine writes")
    return facts


def _universal(folder: Path, facts: dict[str, Any]) -> DeepSpeedFiles:
    folders = sorted(path for path in (folder / "zero").iterdir() if path.is_dir() and not _fills(path.name))
    trained = [path for path in folders if any((path / f"{moment}.pt").exists() for moment in MOMENTS)]
    states = STATES if trained else (WEIGHT,)
    folders = trained or folders  # the others are buffers, and a tied parameter's other names
    parts, step = {}, 0
    for path in folders:
        tensors = {state: _whole(path / f"{FILE_OF[state]}.pt") for state in states}
        shape = tensors[WEIGHT].shape
        for state, tensor in tensors.items():
            if tensor.shape != shape:
                file = path / f"{FILE_OF[state]}.pt"
                raise CheckpointError(f"{file}: its shape is {tensor.shape}; the weight's is {shape}")
        flat = {state: tensor.flattened() for state, tensor in tensors.items()}
        whole = array("q", (0, 0, math.prod(shape)))
        parts[path.name] = [Part(path / f"{FILE_OF[WEIGHT]}.pt", shape, [flat], whole)]
        if (path / "step.pt").exists():
            step = max(step, number_in(load_torch_file(path / "step.pt"), str(path / "step.pt")))
    return DeepSpeedFiles(folder, facts, step or _step_of_all(folder), states, 1, parts)


def _step_of_all(folder: Path) -> int:
    """Return the step where it is not said for each parameter: what was ZeRO 3 keeps it with the optimizer's facts."""
    file = folder / "zero" / "optimizer_state.pt"
    if not file.exists():
        return 0
    loaded = load_torch_file(file)
    try:
        groups = loaded["optimizer_state_dict"]["state"].values()
        return max((number_in(group["step"], f"{file}: step") for group in groups), default=0)
    except (KeyError, AttributeError, TypeError):
        return 0


def _whole(file: Path) -> StoredTensor:
    loaded = load_torch_file(file)
    tensor = loaded.get("param") if isinstance(loaded, dict) else loaded
    if not isinstance(tensor, StoredTensor):
        raise CheckpointError(f"{file}: no tensor in it")
    check_floating(tensor, "its tensor")
    return tensor


def _native(folder: Path, facts: dict[str, Any]) -> DeepSpeedFiles:
    flats: dict[int, list[_Flat]] = defaultdict(list)
    spans: dict[str, dict[int, array[int]]] = defaultdict(lambda: defaultdict(lambda: array("q")))
    shapes: dict[tuple[str, int], tuple[Path, tuple[int, ...]]] = {}
    model_facts = lru_cache(maxsize=1)(load_torch_file)
    step = 0
    for place, replica, file in _optimizer_files(folder):
        try:
            state = load_torch_file(file)["optimizer_state_dict"]
            is_zero3 = "fp32_flat_groups" in state
            about = folder / f"{'zero_pp_rank_0_' if is_zero3 else ''}mp_rank_{place:02d}_model_states.pt"
            groups = model_facts(about)["param_shapes"]
            shapes.update({(name, place): (about, tuple(size)) for group in groups for name, size in group.items()})
            moments = state["optimizer_state_dict" if is_zero3 else "base_optimizer_state"]["state"]
            step = max([step, *(number_in(group.get("step", 0), f"{file}: step") for group in moments.values())])
            first = len(flats[place])
            for number, flat in enumerate(state["fp32_flat_groups" if is_zero3 else "single_partition_of_fp32_groups"]):
                flats[place].append({WEIGHT: flat, **{moment: moments[number][moment] for moment in MOMENTS}})
                for name, tensor in flats[place][-1].items():
                    check_floating(tensor, f"partition {number} of {name}")
            for name, (number, start, length) in _zero3(state, groups, replica) if is_zero3 else _zero12(state):
                for tensor in flats[place][first + number].values():
                    tensor.narrow(start, length)
                if not _fills(name):
                    spans[name][place].extend((first + number, start, length))
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: not what DeepSpeed's ZeRO optimizers write: {error!r}") from None
    # A tied parameter is on several stages; any other one is on each tensor-parallel rank of its own.
    size = min((len(places) for places in spans.values()), default=1)
    parts: dict[str, list[Part]] = {}
    for name, places in spans.items():
        parts[name] = []
        for place in sorted(places)[:size]:  # of a tied parameter's copies, the first stage's
            if (name, place) not in shapes:
                raise CheckpointError(f"{folder}: the *_model_states.pt of mp_rank_{place:02d} lacks {name}")
            parts[name].append(Part(*shapes[name, place], flats[place], places[place]))
    return DeepSpeedFiles(folder, facts, step, STATES, size, parts)


def _optimizer_files(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Yield (model-parallel place, replica, file), in order."""
    found = {}
    for file in folder.iterdir():
        match = _OPTIMIZER_FILE.fullmatch(file.name)
        if match:
            found[int(match[2]), int(match[1])] = file
    if not found:
        raise CheckpointError(
            f"{folder} has no *_optim_states.pt: without ZeRO (stage 1 to 3) DeepSpeed keeps no fp32 weights"
        )
    replicas = 1 + max(replica for _, replica in found)
    for place in range(1 + max(place for place, _ in found)):
        for replica in range(replicas):
            if (place, replica) not in found:
                missing = f"zero_pp_rank_{replica}_mp_rank_{place:02d}_optim_states.pt"
                raise CheckpointError(f"{folder / missing} is missing")
            yield place, replica, found[place, replica]


def _zero3(state: dict[str, Any], groups: list[dict[str, Any]], replica: int) -> Iterator[tuple[str, _Span]]:
    """Yield a replica's piece of every parameter, without the padding behind the last piece."""
    replicas = state["partition_count"]
    replicas = replicas[0] if isinstance(replicas, list) else replicas
    for number, (group, _) in enumerate(zip(groups, state["fp32_flat_groups"], strict=True)):
        start = 0
        for name, shape in group.items():
            size = math.prod(shape)
            part = -(-size // replicas)
            yield name, (number, start, max(0, min(part, size - replica * part)))
            start += part


def _zero12(state: dict[str, Any]) -> Iterator[tuple[str, _Span]]:
    for number, mapping in enumerate(state["param_slice_mappings"]):
        for name, address in mapping.items():
            yield name, (number, address.start, address.numel)


def _fills(name: str) -> bool:
    return name.split(".")[-1].startswith(PLACEHOLDER)
