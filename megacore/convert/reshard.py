"""A checkpoint to one of another layout or without its optimizer; a run does not need this to resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megacore.checkpoint.attached import Attached
from megacore.checkpoint.files import layout_of, plan_files, share_of
from megacore.checkpoint.manifest import WEIGHT
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import FileToWrite, write_checkpoint
from megacore.communicator import Communicator, together
from megacore.config import ParallelConfig


def reshard(
    reader: CheckpointReader,
    target: Path,
    parallel: ParallelConfig,
    group: Communicator,
    weights_only: bool = False,
    dtype: str | None = None,
    on_progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a checkpoint with files for another layout; every rank of ``group`` calls this.

    Args:
        reader: the source.
        target: the checkpoint to write; must not exist.
        parallel: its layout.
        group: the ranks that work together.
        weights_only: leave the optimizer's state out.
        dtype: of all tensors, or ``None`` for the source's.
        on_progress: called with the number of bytes of each block this rank has written.

    Raises:
        ConfigError: the layout does not fit the model.
        CheckpointError: the source is damaged, or the target cannot be written; nothing is left there.
    """
    with together(group):
        source = reader.manifest
        parallel.check(source.model)
        states = (WEIGHT,) if weights_only else source.states
        layout = layout_of(parallel)

        def dtype_of(name: str, state: str) -> str:
            return dtype or reader.dtype(name, state)

        box_of = reader.read_stored if dtype is None else reader.read
        files: list[FileToWrite] = plan_files(source.tensors(), states, layout, dtype_of, box_of)
        fresh = {} if len(states) > 1 else {"optimizer_step": 0, "loss_scaling": None}
        progress = source.progress.model_copy(update=fresh)
        manifest = source.model_copy(update={"layout": layout, "progress": progress, "files": {}})
    attached = Attached.of(reader.path, group)
    write_checkpoint(target, group, share_of(files, group, on_progress), manifest, attached.write)
