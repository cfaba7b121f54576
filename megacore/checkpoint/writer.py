"""Write a checkpoint from many ranks: complete, or not there.

When every rank has written its own files, rank 0 adds the manifest. Whatever fails, on whichever rank, leaves no
checkpoint (`megacore.publish`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megacore.checkpoint.manifest import MANIFEST, FileRecord, Manifest, Piece
from megacore.checkpoint.stream import Entry, SafetensorsStream
from megacore.communicator import Communicator, together
from megacore.errors import CheckpointError
from megacore.publish import os_errors, publishing, write_text
from megacore.specs import Region, region_shape


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
    attach: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Write a checkpoint; every rank of ``group`` calls this with its own files.

    Args:
        path: the checkpoint's directory; must not exist.
        group: the ranks that write together.
        files: this rank's files, by name, with their pieces.
        manifest: makes the manifest from the records of all ranks' files (called on rank 0).
        attach: adds files of another kind to the directory (called on rank 0).

    Raises:
        CheckpointError: on every rank, if any rank failed; nothing is left at ``path``.
    """
    with publishing(path, group, CheckpointError) as partial:
        records: dict[str, FileRecord] = {}
        with together(group), os_errors(partial, CheckpointError):
            for name, pieces in files:
                records[name] = _write_file(partial / name, pieces)
        gathered = group.all_gather(records)
        with together(group), os_errors(partial, CheckpointError):
            if group.rank == 0:
                attach(partial)
                all_records = {name: record for part in gathered for name, record in part.items()}
                write_text(partial / MANIFEST, manifest(dict(sorted(all_records.items()))).to_json())


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
