"""A checkpoint as DeepSpeed's universal one, which its engine loads at any of its layouts (``load_universal``)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megacore.checkpoint.manifest import MOMENTS
from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Communicator, together
from megacore.config import ParallelConfig
from megacore.convert.deepspeed import CARRIED
from megacore.convert.deepspeed_files import FILE_OF
from megacore.convert.module_names import module_names
from megacore.errors import CheckpointError, ConfigError
from megacore.publish import os_errors, publishing, write_text

_BLOCK = 1 << 21
"""Entries read at once."""


def export_universal(
    reader: CheckpointReader,
    target: Path,
    parallel: ParallelConfig,
    group: Communicator,
    on_progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a universal checkpoint; every rank of ``group`` calls this.

    DeepSpeed loads it with tensor parallelism where every cut is even: a vocabulary must be a multiple of the ranks.

    Args:
        reader: the checkpoint; it must hold the optimizer's state.
        target: the directory to write; must not exist.
        parallel: of the engine that is to load it: with pipeline stages it names parameters otherwise.
        group: the ranks that work together.
        on_progress: called with the number of bytes of each tensor this rank has written.

    Raises:
        ConfigError: there is no optimizer state, or DeepSpeed cannot load the model at this layout.
        CheckpointError: the source is damaged, or the target cannot be written.
    """
    manifest = reader.manifest
    with together(group):
        if manifest.model.num_experts:
            raise ConfigError("--to deepspeed-universal: mixtures of experts are not written in DeepSpeed's format")
        if MOMENTS[0] not in manifest.states:
            raise ConfigError(f"{reader.path} has no optimizer state, which DeepSpeed's engine needs")
        parallel.check(manifest.model)
        parts = parallel.tensor_parallel_size
        if manifest.model.vocab_size % parts:
            raise ConfigError(
                f"tensor_parallel_size={parts} does not divide vocab_size={manifest.model.vocab_size}: DeepSpeed loads "
                "equal parts only"
            )
        specs, names = reader.specs(), module_names(manifest.model, parallel.pipeline_parallel_size > 1)
    tag = f"global_step{manifest.progress.step}"
    step = torch.tensor(float(manifest.progress.optimizer_step))
    with publishing(target, group, CheckpointError) as directory:
        folder = directory / tag / "zero"
        with together(group), os_errors(directory, CheckpointError):
            for number, (theirs, ours) in enumerate(names.items()):
                if number % group.size != group.rank:
                    continue
                (folder / theirs).mkdir(parents=True)
                for state, file in FILE_OF.items():
                    whole = {"param": _whole(reader, ours, state), "cat_dim": specs[ours].sharded_dim or 0}
                    _save(whole, folder / theirs / f"{file}.pt")
                    del whole  # before the next one is made
                    on_progress(math.prod(specs[ours].shape) * 4)
                _save(step, folder / theirs / "step.pt")
        with together(group), os_errors(directory, CheckpointError):
            if group.rank == 0:
                _save(_optimizer_facts(step, len(specs)), folder / "optimizer_state.pt")
                for name in ("mp_rank_00", "zero_pp_rank_0_mp_rank_00"):  # where ZeRO 1 and 2, and 3, look
                    _save(_facts(reader), directory / tag / f"{name}_model_states.pt")
                write_text(directory / "latest_universal", tag)


def _whole(reader: CheckpointReader, name: str, state: str) -> torch.Tensor:
    """Return a whole tensor, as float32, which is filled block by block, so that it is in memory only once."""
    shape = reader.shape(name)
    values = torch.empty(shape)
    rows = max(1, _BLOCK // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        box = ((start, stop), *((0, size) for size in shape[1:]))
        values[start:stop] = torch.from_numpy(reader.read(name, state, box))
    return values


def _save(value: Any, path: Path) -> None:
    with path.open("xb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def _optimizer_facts(step: torch.Tensor, most_groups: int) -> dict[str, Any]:
    """Return what DeepSpeed's optimizers read besides the parameters: ZeRO 1 and 2 the first keys, 3 the last.

    DeepSpeed pairs its parameter groups with the file's and takes their settings, and loads no group without a
    partner: so there is one for every group that there can be, and empty ones leave the engine its settings.
    """
    return {
        "ds_version": version("deepspeed"),
        "param_groups": [{} for _ in range(most_groups)],
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [{}]},
    }


def _facts(reader: CheckpointReader) -> dict[str, Any]:
    progress = reader.manifest.progress
    return {
        "module": {},
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": progress.step,
        "global_samples": progress.consumed_samples,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": version("deepspeed"),
        CARRIED: reader.manifest.model_copy(update={"files": {}}).model_dump_json(),
    }
