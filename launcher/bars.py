"""Progress bars: on a terminal only; elsewhere the lines at the end of each step are enough."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[[int], None]


@contextmanager
def byte_bar(title: str, total: float | None, enabled: bool) -> Iterator[Advance]:
    """Show bytes done; yields the function to call with each further number of bytes."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with _bar(title, total, enabled, columns) as advance:
        yield advance


@contextmanager
def count_bar(title: str, enabled: bool, total: float | None = None) -> Iterator[Advance]:
    """Show things done; yields the function to call with each further number of them."""
    with _bar(title, total, enabled, (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())) as advance:
        yield advance


@contextmanager
def _bar(title: str, total: float | None, enabled: bool, columns: tuple[ProgressColumn, ...]) -> Iterator[Advance]:
    if not enabled or not sys.stderr.isatty():
        yield lambda size: None
        return
    with Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda size: progress.update(task, advance=size)
