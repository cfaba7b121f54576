"""DeepSpeed's checkpoints of megacore's modules, native (ZeRO 1 to 3, any TP and PP) and universal, as parameters.

Native files hold flat fp32 partitions. ZeRO 1 and 2 name where each parameter's fragment lies in a replica's partition
(``param_slice_mappings``); ZeRO 3 lays equal parts of every parameter end to end, in the order of ``param_shapes``.
Universal ones have a folder for each parameter, with the whole tensor of each state.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megacore.checkpoint.assemble import Rows, Run, assembled, follow_each_other, read_runs
from megacore.checkpoint.manifest import MOMENTS, STATES, WEIGHT, Manifest, carried_manifest
from megacore.convert.imports import fresh_manifest
from megacore.convert.module_names import module_names
from megacore.convert.torch_files import load_torch_file
from megacore.errors import CheckpointError, ConfigError
from megacore.model_config import ModelConfig
from megacore.params import PLACEHOLDER
from megacore.specs import ParamSpec, Region, Shard, region_shape

CARRIED = "megacore"
"""Key of the client state under which an exported checkpoint carries its manifest."""
FILE_OF = {WEIGHT: "fp32", **{moment: moment for moment in MOMENTS}}
"""State -> the name of its file in a universal checkpoint."""
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_FP32 = np.dtype(np.float32)
_Fragment = dict[str, torch.Tensor]
"""A replica's flat part of a parameter, by state."""


class DeepSpeedSource:
    """A directory that DeepSpeed's ``save_checkpoint`` wrote for a megacore model, or a universal one.

    Args:
        path: the directory with ``latest`` (or ``latest_universal``), or one tag's directory in it.
        model: the model that was saved; ``None`` if the checkpoint carries it.

    Raises:
        CheckpointError: a file or a part of a parameter is missing or damaged.
        ConfigError: the model is not known, or is not the one that was saved.
    """

    format = "deepspeed"
    new: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __init__(self, path: Path, model: ModelConfig | None = None) -> None:
        self.path = path
        self._folder = tag_folder(path)
        facts = self._facts()
        self.manifest = self._manifest(facts, model)
        if self.manifest.model.num_experts:
            raise ConfigError(f"{path}: mixtures of experts are not read from DeepSpeed's checkpoints")
        self.specs = self.manifest.specs()
        self._boxes: dict[tuple[str, str], dict[Region, list[Run]]] = defaultdict(dict)
        is_universal = (self._folder / "zero").is_dir()
        step = self._find_universal() if is_universal else self._find_native()
        self.states = tuple(state for state in STATES if any(key[1] == state for key in self._boxes))
        self._check_complete()
        progress = {"step": self._number(facts.get("global_steps", 0), "global_steps"), "optimizer_step": step}
        self.manifest = self.manifest.model_copy(
            update={"progress": self.manifest.progress.model_copy(update=progress)}
        )

    def _facts(self) -> dict[str, Any]:
        files = sorted(self._folder.glob("*mp_rank_*_model_states.pt"))
        if not files:
            raise CheckpointError(f"{self._folder} has no *_model_states.pt: it is not a checkpoint of DeepSpeed's")
        facts = load_torch_file(files[0])
        if not isinstance(facts, dict):
            raise CheckpointError(f"{files[0]}: not what DeepSpeed's engine writes")
        return facts

    def _number(self, value: Any, what: str) -> int:
        try:
            return int(value)
        except (TypeError, ValueError):
            raise CheckpointError(f"{self._folder}: {what} is {value!r} instead of a number") from None

    def _manifest(self, facts: dict[str, Any], model: ModelConfig | None) -> Manifest:
        if CARRIED in facts:
            carried = carried_manifest(facts[CARRIED], str(self._folder))
            if model is not None and model != carried.model:
                raise ConfigError(f"{self.path} says what model it is of, and --config says another: leave it out")
            return carried
        if model is None:
            raise ConfigError(f"{self.path} does not say what model it is of: add --config CONFIG.yaml, the run's")
        return fresh_manifest(model)

    def _find_native(self) -> int:
        """List each parameter's runs; return Adam's step."""
        fragments: dict[str, dict[int, list[_Fragment]]] = defaultdict(lambda: defaultdict(list))
        shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        step = 0
        for place, replica, file in self._optimizer_files():
            try:
                state = load_torch_file(file)["optimizer_state_dict"]
                is_zero3 = "fp32_flat_groups" in state
                prefix = "zero_pp_rank_0_" if is_zero3 else ""
                about = load_torch_file(self._folder / f"{prefix}mp_rank_{place:02d}_model_states.pt")
                groups = about["param_shapes"]
                shapes.update({(name, place): tuple(shape) for group in groups for name, shape in group.items()})
                for name, fragment in _zero3(state, groups, replica) if is_zero3 else _zero12(state):
                    fragments[name][place].append(fragment)
                moments = state["optimizer_state_dict" if is_zero3 else "base_optimizer_state"]["state"]
                step = max([step, *(int(group.get("step", 0)) for group in moments.values())])
            except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
                raise CheckpointError(f"{file}: not what DeepSpeed's ZeRO optimizers write: {error!r}") from None
        names = self._names(fragments)
        # A tied parameter is on several stages; any other one is on each tensor-parallel rank of its own.
        tensor_parts = min(len(fragments[theirs]) for theirs in names)
        for theirs, ours in names.items():
            spec = self.specs[ours]
            places = sorted(fragments[theirs])  # of a tied parameter's copies, the first stage's
            for rank, place in enumerate(places[: tensor_parts if spec.sharded_dim is not None else 1]):
                box, shape = spec.local_region(Shard(rank, tensor_parts)), shapes.get((theirs, place))
                if shape != region_shape(box):
                    raise CheckpointError(
                        f"{self._folder}: {theirs} has the shape {shape}; the model makes it {region_shape(box)}; "
                        "is --config the run's that was saved?"
                    )
                self._add(ours, box, fragments[theirs][place])
        return step

    def _optimizer_files(self) -> Iterator[tuple[int, int, Path]]:
        """Yield (model-parallel place, replica, file), in order."""
        found = {}
        for file in self._folder.iterdir():
            match = _OPTIMIZER_FILE.fullmatch(file.name)
            if match:
                found[int(match[2]), int(match[1])] = file
        if not found:
            raise CheckpointError(
                f"{self._folder} has no *_optim_states.pt: without ZeRO (stage 1 to 3) DeepSpeed keeps no fp32 weights"
            )
        replicas = 1 + max(replica for _, replica in found)
        for place in range(1 + max(place for place, _ in found)):
            for replica in range(replicas):
                if (place, replica) not in found:
                    missing = f"zero_pp_rank_{replica}_mp_rank_{place:02d}_optim_states.pt"
                    raise CheckpointError(f"{self._folder / missing} is missing")
                yield place, replica, found[place, replica]

    def _names(self, fragments: dict[str, Any]) -> dict[str, str]:
        found = {name for name in fragments if not name.split(".")[-1].startswith(PLACEHOLDER)}
        names = module_names(self.manifest.model, pipeline=not any(name.startswith("steps.") for name in found))
        for name in sorted(found ^ names.keys()):
            what = "is missing" if name in names else "does not belong to the model"
            raise CheckpointError(f"{self._folder}: {name} {what}; is --config the run's that was saved?")
        return names

    def _add(self, name: str, box: Region, fragments: list[_Fragment]) -> None:
        for state in fragments[0]:
            runs: list[Run] = []
            start = 0
            for fragment in fragments:
                stop = start + fragment[state].numel()
                if start < stop:
                    runs.append(((start, stop), partial(_rows, fragment[state])))
                start = stop
            self._boxes[name, state][box] = runs

    def _find_universal(self) -> int:
        """List the files of each parameter; return Adam's step."""
        folder, load = self._folder / "zero", lru_cache(maxsize=4)(_whole)
        names = module_names(self.manifest.model, pipeline=not any(folder.glob("steps.*")))
        step = 0
        for theirs, ours in names.items():
            spec = self.specs[ours]
            box = tuple((0, dim.size) for dim in spec.dims)
            states = STATES if (folder / theirs / "exp_avg.pt").exists() else (WEIGHT,)
            for state in states:
                file = folder / theirs / f"{FILE_OF[state]}.pt"
                if not file.is_file():
                    raise CheckpointError(f"{file} is missing")
                self._boxes[ours, state][box] = [((0, math.prod(spec.shape)), _rows_of_file(load, file, spec))]
        first = folder / next(iter(names)) / "step.pt"
        if first.exists():
            step = self._number(load_torch_file(first), "step.pt")
        return step

    def _check_complete(self) -> None:
        for name, spec in self.specs.items():
            for state in self.states:
                boxes = self._boxes.get((name, state), {})
                filled = sum(math.prod(region_shape(box)) for box in boxes)
                whole = all(follow_each_other(runs, math.prod(region_shape(box))) for box, runs in boxes.items())
                if not whole or filled != math.prod(spec.shape):
                    raise CheckpointError(f"{self._folder}: parts of {name} ({state}) are missing")

    def box(self, name: str, state: str, region: Region) -> NDArray[np.floating]:
        """Return a box of a parameter's state."""
        readers: dict[Region, Callable[[Region], NDArray[np.floating]]] = {
            box: partial(read_runs, region_shape(box), runs, _FP32) for box, runs in self._boxes[name, state].items()
        }
        return assembled(region, readers, _FP32)[0]

    def attach(self, directory: Path) -> None:
        """Add nothing."""


def tag_folder(path: Path) -> Path:
    """Return the directory with the files: ``path``, or the one in it that ``latest`` names."""
    for name in ("latest_universal", "latest"):
        if (path / name).is_file():
            tag = (path / name).read_text(encoding="utf-8", errors="replace").strip()
            if Path(tag).name != tag or not (path / tag).is_dir():
                raise CheckpointError(f"{path / name} names {tag!r}, which is not there")
            return path / tag
    return path


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
            yield name, {key: tensor.narrow(0, start, own) for key, tensor in tensors.items()}
            start += part


def _zero12(state: dict[str, Any]) -> Iterator[tuple[str, _Fragment]]:
    moments = state["base_optimizer_state"]["state"]
    flats = state["single_partition_of_fp32_groups"]
    for number, (mapping, flat) in enumerate(zip(state["param_slice_mappings"], flats, strict=True)):
        tensors = {WEIGHT: flat, **{key: moments[number][key] for key in MOMENTS}}
        for name, address in mapping.items():
            yield name, {key: tensor.narrow(0, address.start, address.numel) for key, tensor in tensors.items()}


def _rows(flat: torch.Tensor, start: int, stop: int) -> NDArray[Any]:
    return flat[start:stop].detach().float().numpy()


def _rows_of_file(load: Callable[[Path], torch.Tensor], file: Path, spec: ParamSpec) -> Rows:
    def rows(start: int, stop: int) -> NDArray[Any]:
        tensor = load(file)
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{file}: its shape is {tuple(tensor.shape)}; the model has {spec.shape}")
        return tensor.flatten()[start:stop].detach().float().numpy()

    return rows


def _whole(file: Path) -> torch.Tensor:
    loaded = load_torch_file(file)
    tensor = loaded.get("param") if isinstance(loaded, dict) else loaded
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{file}: no tensor in it")
    return tensor
