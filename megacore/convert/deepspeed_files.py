"""The files of DeepSpeed's checkpoints as tensors by name, in the parts that model-parallel ranks hold of them.

Native files hold flat fp32 partitions. ZeRO 1 and 2 name where each parameter's fragment lies in a replica's partition
(``param_slice_mappings``); ZeRO 3 lays equal parts of every parameter end to end, in the order of ``param_shapes``.
Universal checkpoints have a folder for each parameter, with the whole tensor of each state.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megacore.checkpoint.manifest import MOMENTS, STATES, WEIGHT
from megacore.convert.stored_tensor import StoredTensor, number_in
from megacore.convert.torch_files import load_torch_file
from megacore.errors import CheckpointError
from megacore.params import PLACEHOLDER

FILE_OF = {WEIGHT: "fp32", **{moment: moment for moment in MOMENTS}}
"""State -> the name of its file in a universal checkpoint."""
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_Fragment = dict[str, StoredTensor]
"""A replica's flat part of a parameter, by state."""


@dataclass(frozen=True)
class Part:
    """What a model-parallel rank holds of a tensor.

    Args:
        path: the file, or the directory, that it comes from.
        shape: of the rank's tensor; one dim is all that some universal checkpoints say.
        runs: by state: the flat pieces that make the tensor, in order.
    """

    path: Path
    shape: tuple[int, ...]
    runs: dict[str, list[StoredTensor]]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


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
            for state in opened.states:
                filled = sum(run.shape[0] for run in part.runs.get(state, []))
                if filled != part.size:
                    raise CheckpointError(f"{part.path}: {filled} of {part.size} entries of {name} ({state}) are there")
    return opened


def _tag_folder(path: Path) -> Path:
    """Return the directory with the files: ``path``, or the one in it that ``latest`` names."""
    for name in ("latest_universal", "latest"):
        if (path / name).is_file():
            tag = (path / name).read_text(encoding="utf-8", errors="replace").strip()
            if Path(tag).name != tag or not (path / tag).is_dir():
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
        parts[path.name] = [Part(path, shape, {state: [tensor.flattened()] for state, tensor in tensors.items()})]
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
    return tensor


def _native(folder: Path, facts: dict[str, Any]) -> DeepSpeedFiles:
    fragments: dict[str, dict[int, list[_Fragment]]] = defaultdict(lambda: defaultdict(list))
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
            for name, fragment in _zero3(state, groups, replica) if is_zero3 else _zero12(state):
                if not _fills(name):
                    fragments[name][place].append(fragment)
            moments = state["optimizer_state_dict" if is_zero3 else "base_optimizer_state"]["state"]
            step = max([step, *(number_in(group.get("step", 0), f"{file}: step") for group in moments.values())])
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: not what DeepSpeed's ZeRO optimizers write: {error!r}") from None
    # A tied parameter is on several stages; any other one is on each tensor-parallel rank of its own.
    size = min((len(places) for places in fragments.values()), default=1)
    parts: dict[str, list[Part]] = {}
    for name, places in fragments.items():
        parts[name] = []
        for place in sorted(places)[:size]:  # of a tied parameter's copies, the first stage's
            if (name, place) not in shapes:
                raise CheckpointError(f"{folder}: the *_model_states.pt of mp_rank_{place:02d} lacks {name}")
            about, shape = shapes[name, place]
            runs = {state: [fragment[state] for fragment in places[place]] for state in STATES}
            parts[name].append(Part(about, shape, runs))
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


def _zero3(state: dict[str, Any], groups: list[dict[str, Any]], replica: int) -> Iterator[tuple[str, _Fragment]]:
    """Yield a replica's part of every parameter, without the padding behind the last part."""
    moments, replicas = state["optimizer_state_dict"]["state"], state["partition_count"]
    replicas = replicas[0] if isinstance(replicas, list) else replicas
    for number, (group, flat) in enumerate(zip(groups, state["fp32_flat_groups"], strict=True)):
        tensors = {WEIGHT: flat, **{key: moments[number][key] for key in MOMENTS}}
        start = 0
        for name, shape in group.items():
            size = math.prod(shape)
            part = -(-size // replicas)
            own = max(0, min(part, size - replica * part))
            yield name, {key: tensor.narrow(start, own) for key, tensor in tensors.items()}
            start += part


def _zero12(state: dict[str, Any]) -> Iterator[tuple[str, _Fragment]]:
    moments = state["base_optimizer_state"]["state"]
    flats = state["single_partition_of_fp32_groups"]
    for number, (mapping, flat) in enumerate(zip(state["param_slice_mappings"], flats, strict=True)):
        tensors = {WEIGHT: flat, **{key: moments[number][key] for key in MOMENTS}}
        for name, address in mapping.items():
            yield name, {key: tensor.narrow(address.start, address.numel) for key, tensor in tensors.items()}


def _fills(name: str) -> bool:
    return name.split(".")[-1].startswith(PLACEHOLDER)
