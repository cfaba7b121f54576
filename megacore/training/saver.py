"""Saving while training goes on: a thread copies the state before it is changed, and writes the copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megacore.checkpoint.manifest import Manifest
from megacore.checkpoint.pieces import Piece
from megacore.checkpoint.stream import NUMPY
from megacore.checkpoint.writer import PieceToWrite, write_checkpoint
from megacore.communicator import Communicator, together


class Saver:
    """Writes a run's checkpoints, one at a time.

    Args:
        group: the ranks that write together; nothing else may use it while training goes on.
        in_background: go on training while a checkpoint is written. Each rank then holds a copy of what it saves.
    """

    def __init__(self, group: Communicator, in_background: bool) -> None:
        self._group, self._in_background = group, in_background
        self._thread: Thread | None = None
        self._error: BaseException | None = None
        self._is_copied = Event()
        self._is_copied.set()
        self._buffers: dict[Piece, NDArray[Any]] = {}

    def save(
        self,
        path: Path,
        pieces: Sequence[PieceToWrite],
        manifest: Manifest,
        done: Callable[[], None],
        attach: Callable[[Path], None] = lambda directory: None,
    ) -> None:
        """Write this rank's pieces of a checkpoint; every rank of the group calls this.

        Args:
            path: the checkpoint's directory; must not exist.
            pieces: of this rank; their values may change once `wait_for_copy` has returned.
            manifest: all but the files' records.
            done: called on every rank once the checkpoint is complete.
            attach: adds files of another kind to the checkpoint (called on rank 0).

        Raises:
            CheckpointError: on every rank, if this checkpoint (or, in the background, the one before) failed.
        """
        self.wait()

        def write(pieces: Sequence[PieceToWrite]) -> None:
            files = [(f"rank{self._group.rank:05d}.safetensors", pieces)]
            write_checkpoint(path, self._group, files, manifest, attach)
            done()

        if not self._in_background:
            write(pieces)
            return
        self._is_copied.clear()
        self._thread = Thread(target=self._caught, args=(write, pieces), name="checkpoint", daemon=True)
        self._thread.start()

    def wait_for_copy(self) -> None:
        """Wait until what is being saved may change: a step computes beside the copy, and calls this to update."""
        self._is_copied.wait()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            CheckpointError: on every rank, if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self, seconds: float) -> BaseException | None:
        """Let a checkpoint that is being written come to its end, for so long at most; for a run that has failed.

        Returns:
            Its error, if it failed, too.
        """
        if self._thread is not None:
            self._thread.join(seconds)
        return self._error

    def _copied(self, item: PieceToWrite) -> PieceToWrite:
        """Return a piece with its values in this process's own memory, which every save uses again.

        New memory would cost more than the copy: the system clears each page when it is first touched.
        """
        entry = item.piece.entry
        if item.piece not in self._buffers:
            self._buffers[item.piece] = np.empty(entry.shape, NUMPY[entry.dtype])
        buffer, filled = self._buffers[item.piece], 0
        flat = buffer.reshape(-1)
        for block in item.blocks():
            flat[filled : filled + block.size] = block.reshape(-1)
            filled += block.size
        return item._replace(blocks=lambda: [buffer])

    def _caught(self, write: Callable[[Sequence[PieceToWrite]], None], pieces: Sequence[PieceToWrite]) -> None:
        try:
            with together(self._group):
                copied = self._all_copied(pieces)
            write(copied)
        except BaseException as error:  # raised where the run waits
            self._error = error

    def _all_copied(self, pieces: Sequence[PieceToWrite]) -> list[PieceToWrite]:
        try:
            return [self._copied(item) for item in pieces]
        finally:
            self._is_copied.set()
