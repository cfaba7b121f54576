"""Write a checkpoint from many ranks: complete, or not there.

All files go into ``NAME.incomplete``; when every rank has written its own, rank 0 adds the manifest and renames
the directory. Whatever fails, on whichever rank, leaves no ``NAME``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megacore.checkpoint.manifest import MANIFEST, FileRecord, Manifest, Piece
from megacore.checkpoint.stream import Entry, SafetensorsStream
from megacore.communicator import Communicator, together
from megacore.errors import CheckpointError
from megacore.params import Region, region_shape

INCOMPLETE = ".incomplete"


class PieceToWrite(NamedTuple):
    """A piece of a global tensor and where its values come from."""

    state: str
    parameter: str
    region: Region
    run: tuple[int, int] | None
    dtype: str
    blocks: Callable[[], Iterable[NDArray[np.floating]]]

    @property
    def key(self) -> str:
        """The tensor's name in its file."""
        return f"{self.parameter}/{self.state}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor."""
        return (self.run[1] - self.run[0],) if self.run else region_shape(self.region)


FileToWrite = tuple[str, Sequence[PieceToWrite]]


def write_checkpoint(
    path: Path,
    group: Communicator,
    files: Iterable[FileToWrite],
    manifest: Callable[[dict[str, FileRecord]], Manifest],
) -> None:
    """Write a checkpoint; every rank of ``group`` calls this with its own files.

    Args:
        path: the checkpoint's directory; must not exist.
        group: the ranks that write together.
        files: this rank's files, by name, with their pieces.
        manifest: makes the manifest from the records of all ranks' files (called on rank 0).

    Raises:
        CheckpointError: on every rank, if any rank failed; nothing is left at ``path``.
    """
    partial = path.with_name(path.name + INCOMPLETE)
    with together(group):
        if group.rank == 0:
            with _named(path):
                if path.exists():
                    raise CheckpointError(f"{path} exists already; remove it or choose another directory")
                shutil.rmtree(partial, ignore_errors=True)  # left by a job that was killed
                partial.mkdir(parents=True)
    try:
        records: dict[str, FileRecord] = {}
        with together(group), _named(partial):
            for name, pieces in files:
                records[name] = _write_file(partial / name, pieces)
        gathered = group.all_gather(records)
        with together(group), _named(path):
            if group.rank == 0:
                all_records = {name: record for part in gathered for name, record in part.items()}
                _publish(path, partial, manifest(dict(sorted(all_records.items()))))
    except BaseException:
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_file(path: Path, pieces: Sequence[PieceToWrite]) -> FileRecord:
    entries = [Entry(piece.key, piece.dtype, piece.shape) for piece in pieces]
    written: dict[str, Piece] = {}
    with SafetensorsStream(path, entries) as stream:
        for piece in pieces:
            written[piece.key] = Piece.model_validate(
                {
                    "state": piece.state,
                    "parameter": piece.parameter,
                    "region": piece.region,
                    "run": piece.run,
                    "dtype": piece.dtype,
                    "sha256": stream.write(piece.key, piece.blocks()),
                }
            )
    return FileRecord(size=stream.size, pieces=written)


def _publish(path: Path, partial: Path, manifest: Manifest) -> None:
    file = partial / MANIFEST
    with file.open("x", encoding="utf-8") as stream:
        stream.write(manifest.to_json())
        stream.flush()
        os.fsync(stream.fileno())
    _sync_directory(partial)
    partial.rename(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _named:  # noqa: N801 - reads as a word in a with statement
    """Turn the operating system's errors (disk full, no permission) into `CheckpointError` with the path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise CheckpointError(f"{self._path}: cannot write the checkpoint: {error.strerror or error}") from error
