"""Functions of single tokens that ``torch.compile`` may fuse; each computes the same compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


@cache
def _compiled(function: F) -> F:
    return torch.compile(function, dynamic=True)  # type: ignore[return-value]


def maybe_compiled(function: F, compile: bool) -> F:
    """Return the function, or what ``torch.compile`` makes of it (once in a process)."""
    return _compiled(function) if compile else function
