"""Other programs' torch files: tensors, mapped, and plain values; no code of theirs is ever run.

What such a file names besides tensors (settings objects, enumerations) is read as an inert stand-in that holds its
fields: torch's weights-only unpickler never imports or calls what it was not given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from megacore.errors import CheckpointError


class Inert:
    """Stands for an object of a class that is not loaded: its state's fields, and nothing else."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def load_torch_file(path: Path) -> Any:
    """Read a torch file; its tensors stay on the disk until they are used.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        names = get_unsafe_globals_in_checkpoint(path)
        with safe_globals([(Inert, name) for name in names]):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        what = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"{path}: not a usable torch file: {what}") from None
