"""A run's directory: its checkpoints, which of them is the latest, and which to remove.

``RUN/checkpoints`` holds a directory ``step-XXXXXXXX`` for each complete checkpoint and ``latest``, a link to the
newest of them for readers (``megacore verify RUN/checkpoints/latest``). The link is switched after the checkpoint is
complete, so a job that is killed in between leaves it one checkpoint behind; that is why a run goes on from the newest
directory, not from the link. Other names are no checkpoints: ``.incomplete`` is being written, ``.removed`` being
removed, ``.damaged`` was found unusable and is kept for whoever wants to look at it.
"""

from __future__ import annotations

import fcntl
import re
import shutil
from pathlib import Path
from typing import TextIO

from megacore.communicator import Communicator, together
from megacore.errors import CheckpointError, ConfigError
from megacore.publish import INCOMPLETE, os_errors, point_link

LATEST = "latest"
_REMOVED, _DAMAGED = ".removed", ".damaged"
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


def point_latest(checkpoint: Path) -> None:
    """Make ``latest`` a link to a complete checkpoint of its run, at once.

    Raises:
        OSError: the link cannot be written.
    """
    link = checkpoint.with_name(LATEST)
    if not link.is_symlink() or link.readlink() != Path(checkpoint.name):
        point_link(link, checkpoint.name)


def followed(path: Path, group: Communicator) -> Path:
    """Return the directory that a link such as ``latest`` names now, as rank 0 sees it; every rank calls this.

    A reader then stays with one checkpoint while the run switches the link, and says the checkpoint's own name.
    """
    with together(group), os_errors(path, CheckpointError):
        here = path.parent / path.readlink() if path.is_symlink() else path
    named: Path = group.all_gather(here)[0]
    return named


def remove_old(run: Path, keep_last: int, keep_every: int = 0) -> None:
    """Remove all but a run's newest checkpoints, and those of steps that are multiples of ``keep_every``.

    A checkpoint being removed no longer has a checkpoint's name; what ``latest`` names is never removed.

    Raises:
        OSError: one of them cannot be removed.
    """
    remove_leftovers(run)
    link = run / "checkpoints" / LATEST
    latest = link.readlink().name if link.is_symlink() else None
    for path in checkpoints(run)[:-keep_last]:
        kept = keep_every and int(path.name.removeprefix("step-")) % keep_every == 0
        if kept or path.name == latest:
            continue
        doomed = path.with_name(path.name + _REMOVED)
        path.rename(doomed)
        shutil.rmtree(doomed)


def remove_leftovers(run: Path) -> None:
    """Remove what a job left that was killed while it wrote or removed a checkpoint.

    Raises:
        OSError: some of it cannot be removed.
    """
    for suffix in (_REMOVED, INCOMPLETE):
        for left in (run / "checkpoints").glob(f"*{suffix}"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()


def set_aside(checkpoint: Path) -> None:
    """Rename an unusable checkpoint, so that its step can be saved again.

    Raises:
        OSError: it cannot be renamed.
    """
    kept = checkpoint.with_name(checkpoint.name + _DAMAGED)
    if kept.exists():  # of the same step, from an earlier time
        shutil.rmtree(kept)
    checkpoint.rename(kept)


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
