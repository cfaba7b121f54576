"""Options that several commands have, and what is checked of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megacore.errors import ConfigError
from megacore.publish import os_errors, replace_file

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}
"""Types as they are named on the command line -> as they are named in files."""
LAYOUT = ("tensor_parallel_size", "pipeline_parallel_size")
"""Keys of how the files of a checkpoint are cut."""


def one_of(option: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse a value that an option does not have.

    Raises:
        ConfigError: naming the option and its values.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ConfigError(f"{option} {value}: use {', '.join(allowed[:-1])} or {allowed[-1]}")


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write what ``--json`` asks for.

    Raises:
        ConfigError: it cannot be written.
    """
    with os_errors(path, ConfigError):
        replace_file(path, (json.dumps(figures) + "\n").encode())
