"""Small files that a checkpoint carries for another program: Hugging Face's configuration and tokenizer."""

from __future__ import annotations

from pathlib import Path

from megacore.communicator import Communicator, together
from megacore.errors import CheckpointError
from megacore.publish import os_errors, write_bytes

ATTACHED = "huggingface"
"""Their directory in a checkpoint."""


class Attached:
    """The files, held in memory: a run outlives the checkpoint that it started from.

    Args:
        files: contents by name.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files

    @classmethod
    def of(cls, checkpoint: Path | None, group: Communicator) -> Attached:
        """Read what a checkpoint carries, on rank 0, which is the one that writes it; every rank calls this.

        Raises:
            CheckpointError: a file cannot be read.
        """
        files: dict[str, bytes] = {}
        with together(group):
            if group.rank == 0 and checkpoint is not None and (checkpoint / ATTACHED).is_dir():
                try:
                    files = {file.name: file.read_bytes() for file in sorted((checkpoint / ATTACHED).iterdir())}
                except OSError as error:
                    raise CheckpointError(f"{checkpoint / ATTACHED}: cannot be read: {error}") from None
        return cls(files)

    def write(self, checkpoint: Path) -> None:
        """Add the files to a checkpoint that is being written."""
        if self._files:
            folder = checkpoint / ATTACHED
            with os_errors(folder, CheckpointError):
                folder.mkdir()
                for name, content in self._files.items():
                    write_bytes(folder / name, content)
