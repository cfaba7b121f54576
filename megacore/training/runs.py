"""A run's directory: its checkpoints, which one to go on from, and which to remove."""

from __future__ import annotations

import fcntl
import re
import shutil
from pathlib import Path
from typing import TextIO

from megacore.errors import ConfigError
from megacore.publish import INCOMPLETE

_REMOVED = ".removed"
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


def remove_old(run: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove all but a run's newest checkpoints, and those of steps that are multiples of ``keep_every``.

    A checkpoint being removed no longer has a checkpoint's name.
    """
    for suffix in (_REMOVED, INCOMPLETE):  # left by a job that was killed while it removed, or wrote
        for left in (run / "checkpoints").glob(f"*{suffix}"):
            shutil.rmtree(left)
    for path in checkpoints(run)[:-keep_last]:
        if keep_every and int(path.name.removeprefix("step-")) % keep_every == 0:
            continue
        doomed = path.with_name(path.name + _REMOVED)
        path.rename(doomed)
        shutil.rmtree(doomed)


def lock_run(run: Path) -> TextIO:
    """Take a run's directory for this job, until the returned file is closed (or the process ends).

    Raises:
        ConfigError: another job is training there.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / ".lock").open("a", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(f"output_dir={run}: another job is training there; wait for it, or stop it") from None
    return lock
