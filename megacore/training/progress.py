"""What rank 0 shows while training: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 15.0
"""Where there is no terminal, a line at least this far apart."""


class StepProgress:
    """Shows the step, the loss and the speed.

    Args:
        done: steps done already.
        last: the last step.
        enabled: false on all ranks but one.
    """

    def __init__(self, done: int, last: int, enabled: bool) -> None:
        self._console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self._step, self._last, self._enabled = done, last, enabled
        self._shown = time.monotonic()
        self._survived: set[str] = set()
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:,.0f} tokens/s"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=last, completed=done, loss=float("nan"), speed=0.0)
            self._bar.start()

    def advance(self, loss: float, tokens_per_second: float) -> None:
        """Show that a step is done."""
        self._step += 1
        if self._bar is not None:
            self._bar.update(self._task, advance=1, loss=loss, speed=tokens_per_second)
        elif self._step == self._last or time.monotonic() - self._shown > _LINE_SECONDS:
            self._shown = time.monotonic()
            self.say(f"step {self._step}/{self._last}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s")

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False)

    @contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """Let the operating system's errors (disk full) pass where the run itself is well; say each ``what`` once."""
        try:
            yield
        except OSError as error:
            if what not in self._survived:
                self._survived.add(what)
                self.say(f"{what}: {error}; the run goes on")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
