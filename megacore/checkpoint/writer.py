"""Write a checkpoint from many ranks: complete, or not there.

When every rank has written its own files, rank 0 adds the manifest. Whatever fails, on whichever rank, leaves no
checkpoint (`megacore.publish`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray

from megacore.checkpoint.manifest import MANIFEST, FileRecord, Manifest, validated_manifest
from megacore.checkpoint.pieces import Piece, described
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.stream import SafetensorsStream
from megacore.communicator import Communicator, together
from megacore.errors import CheckpointError
from megacore.publish import os_errors, publishing, write_text


class PieceToWrite(NamedTuple):
    """A piece of a global tensor and where its values come from."""

    piece: Piece
    blocks: Callable[[], Iterable[NDArray[Any]]]
    """Makes the values, in row-major order; a block must not change after it was given."""


FileToWrite = tuple[str, Sequence[PieceToWrite]]
Check = Callable[[CheckpointReader], Sequence[dict[str, Any]]]
"""Looks at a checkpoint before it is published; returns what its lineage will say of that."""


def write_checkpoint(
    path: Path,
    group: Communicator,
    files: Iterable[FileToWrite],
    manifest: Manifest,
    attach: Callable[[Path], None] = lambda path: None,
    check: Check = lambda reader: (),
) -> None:
    """Write a checkpoint; every rank of ``group`` calls this with its own files.

    Args:
        path: the checkpoint's directory; must not exist.
        group: the ranks that write together.
        files: this rank's files, by name, with their pieces.
        manifest: all but the files' records.
        attach: adds files of another kind to the directory (called on rank 0).
        check: looks at the checkpoint when all of it but the manifest is written (called on rank 0); what it raises
            keeps the checkpoint from being published.

    Raises:
        CheckpointError: on every rank, if any rank failed; nothing is left at ``path``.
    """
    with together(group):
        validated_manifest(manifest.model_dump(), f"{path / MANIFEST}, to be written")
    numbers = manifest.numbers()
    with publishing(path, group, CheckpointError) as directory:
        records: dict[str, FileRecord] = {}
        with together(group), os_errors(directory, CheckpointError):
            for name, pieces in files:
                records[name] = _write_file(directory / name, pieces, numbers)
        gathered = group.all_gather(records)
        with together(group), os_errors(directory, CheckpointError):
            if group.rank == 0:
                attach(directory)
                merged = {name: record for part in gathered for name, record in part.items()}
                whole = manifest.model_copy(update={"files": dict(sorted(merged.items()))})
                reader = CheckpointReader(directory, whole)
                lineage = (*whole.lineage, *check(reader))
                reader.close()
                write_text(directory / MANIFEST, whole.model_copy(update={"lineage": lineage}).to_json())


def _write_file(path: Path, pieces: Sequence[PieceToWrite], numbers: dict[str, int]) -> FileRecord:
    described_pieces = [piece for piece, _ in pieces]
    entries = [piece.entry for piece in described_pieces]
    with SafetensorsStream(path, entries, partial(described, described_pieces)) as stream:
        for piece, blocks in pieces:
            stream.write(piece.key, blocks())
    states = {piece.state: piece.dtype for piece in described_pieces}
    assert all(states[piece.state] == piece.dtype for piece in described_pieces), "one type for each state of a file"
    holds = _runs({numbers[piece.parameter] for piece in described_pieces})
    return FileRecord.model_validate({"size": stream.size, "header": stream.header, "states": states, "holds": holds})


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Join numbers to runs [start, stop)."""
    runs: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    return runs
