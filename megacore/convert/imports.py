"""Another program's checkpoint to one of megacore's: slice by slice, in parallel over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megacore.checkpoint.files import layout_of, plan_files, share_of
from megacore.checkpoint.manifest import WEIGHT, Layout, Manifest, Progress, parameter_records
from megacore.checkpoint.writer import write_checkpoint
from megacore.communicator import Communicator, together
from megacore.config import ParallelConfig
from megacore.errors import ConfigError
from megacore.model_config import ModelConfig
from megacore.models.transformer import declarations
from megacore.specs import Region


class Source(Protocol):
    """A checkpoint of another program's, as megacore's parameters."""

    path: Path
    format: str
    manifest: Manifest
    """What it says about the model and its training; its files are empty."""
    states: tuple[str, ...]
    """What is stored of every parameter."""
    new: tuple[str, ...]
    """Parameters that the source lacks, which start from initial values."""
    left_out: tuple[str, ...]
    """What the source has and the checkpoint will not: tensors that no model of megacore has, padding."""
    float64: int
    """How many of its tensors are more exact than fp32, to which they are rounded."""

    def box(self, name: str, state: str, region: Region) -> NDArray[np.floating]:
        """Return a box of a parameter's state."""

    def attach(self, directory: Path) -> None:
        """Add the source's other files (a tokenizer) to a checkpoint that is being written."""


def fresh_manifest(model: ModelConfig) -> Manifest:
    """Return what is known of a model that nothing but its configuration is known of."""
    specs = declarations(model)
    parameters = parameter_records(specs, dict.fromkeys(specs, (1.0, 1.0)))
    return Manifest(model=model, layout=Layout(), progress=Progress(), parameters=parameters, files={})


def import_event(source: Source) -> dict[str, Any]:
    """Return what a lineage says of an import."""
    return {
        "event": "import",
        "format": source.format,
        "source": source.path.name,
        "new": list(source.new),
        "left_out": list(source.left_out),
    }


@dataclass(frozen=True)
class Import:
    """What an import does, known before anything is written.

    Args:
        new: parameters that the source lacks, which start from initial values.
        left_out: what the source has and the checkpoint will not.
        rounded: tensors of float64, which are rounded to fp32 though no ``dtype`` was asked for.
    """

    new: tuple[str, ...]
    left_out: tuple[str, ...]
    rounded: int


def import_checkpoint(
    open_source: Callable[[], Source],
    target: Path,
    parallel: ParallelConfig,
    group: Communicator,
    dtype: str | None = None,
    weights_only: bool = False,
    on_start: Callable[[Import], None] = lambda facts: None,
    on_progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write another program's checkpoint as one of megacore's; every rank of ``group`` calls this.

    Args:
        open_source: opens the source, on every rank.
        target: the checkpoint to write; must not exist.
        parallel: the layout of its files; a run of any layout can read them.
        group: the ranks that work together.
        dtype: ``float32`` or ``bfloat16``; float32 by default.
        weights_only: leave the optimizer's state out.
        on_start: told what is new and what is left out.
        on_progress: called with the number of bytes of each block this rank has written.

    Raises:
        MegacoreError: on every rank, if any rank failed; nothing is left at ``target``.
    """
    with together(group):
        source = open_source()
        known = source.manifest
        parallel.check(known.model)
        layout = layout_of(parallel)
        states = (WEIGHT,) if weights_only else source.states
        if dtype == "bfloat16" and len(states) > 1:
            raise ConfigError("--dtype bf16 would round the optimizer's state: add --weights-only")
        files = plan_files(known.tensors(), states, layout, lambda name, state: dtype or "float32", source.box)
        fresh = {} if len(states) > 1 else {"optimizer_step": 0, "loss_scaling": None}
        manifest = known.model_copy(
            update={
                "layout": layout,
                "progress": known.progress.model_copy(update=fresh),
                "lineage": (*known.lineage, import_event(source)),
            }
        )
    on_start(Import(source.new, source.left_out, 0 if dtype else source.float64))
    write_checkpoint(target, group, share_of(files, group, on_progress), manifest, source.attach)
