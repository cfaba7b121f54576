"""A run's directory: its checkpoints, which one to go on from, and which to remove."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

_STEP = re.compile(r"step-(\d{8,})")


def checkpoint_path(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step belongs."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """List a run's complete checkpoints, oldest first (an incomplete one has another name)."""
    directory = run / "checkpoints"
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def remove_old(run: Path, keep_last: int) -> None:
    """Remove all but a run's newest checkpoints; a checkpoint being removed no longer has a checkpoint's name."""
    for path in checkpoints(run)[:-keep_last]:
        doomed = path.with_name(path.name + ".removed")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
