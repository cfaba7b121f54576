"""Directories that are complete or not there: written under another name by many ranks, renamed when whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megacore.communicator import Communicator, together
from megacore.errors import MegacoreError

INCOMPLETE = ".incomplete"
_MARK = ".being-written"
"""A file in a directory that is not complete: it may be removed if its job is gone."""


@contextmanager
def publishing(path: Path, group: Communicator, error: type[MegacoreError]) -> Iterator[Path]:
    """Yield a fresh directory to write into; on leaving it becomes ``path``, unless anything failed.

    Every rank of ``group`` enters. The block must fail on all ranks or on none (`together`).

    Args:
        path: must not exist.
        group: the ranks that write.
        error: what to raise for ``path`` existing already and for the operating system's errors.
    """
    path = Path(os.path.abspath(path))  # "." has no name
    partial = path.with_name(path.name + INCOMPLETE)
    with together(group), os_errors(path, error):
        if group.rank == 0:
            if path.exists():
                raise error(f"{path} exists already; remove it or choose another directory")
            if (partial / _MARK).exists() or (partial.is_dir() and not any(partial.iterdir())):
                shutil.rmtree(partial)  # left by a job that was killed
            if partial.exists():
                raise error(f"{partial} is in the way, and no killed job has left it; move it, or choose another name")
            partial.mkdir(parents=True)
            write_text(partial / _MARK, "")
    try:
        yield partial
        with together(group), os_errors(path, error):
            if group.rank == 0:
                (partial / _MARK).unlink()
                for folder, _, _ in os.walk(partial):
                    _sync_directory(Path(folder))
                partial.rename(path)
                _sync_directory(path.parent)
    except BaseException:
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def os_errors(path: Path, error: type[MegacoreError]) -> Iterator[None]:
    """Turn the operating system's errors (disk full, no permission) into ``error``, with the path."""
    try:
        yield
    except OSError as problem:
        raise error(f"{path}: cannot be written: {problem.strerror or problem}") from problem


def check_apart(source: Path, target: Path, error: type[MegacoreError]) -> None:
    """Refuse to write a directory into the one that is read, or over it; one that exists is refused elsewhere.

    Raises:
        MegacoreError: of the given kind.
    """
    if target.exists():
        return
    read, written = source.resolve(), target.resolve()
    for place in (written, written.with_name(written.name + INCOMPLETE)):
        if read == place or read in place.parents or place in read.parents:
            raise error(f"{target}: lies in {source}, or contains it; choose another directory")


def write_text(path: Path, text: str) -> None:
    """Write a new file and flush it to the disk."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a new file and flush it to the disk."""
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under another name, then put it in place at once."""
    partial = path.with_name(path.name + INCOMPLETE)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def point_link(link: Path, name: str) -> None:
    """Make a symbolic link to a neighbour, or switch it to another one at once; no reader ever misses it."""
    fresh = link.with_name(link.name + INCOMPLETE)
    fresh.unlink(missing_ok=True)  # left by a job that was killed
    fresh.symlink_to(name)
    fresh.replace(link)
    _sync_directory(link.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
