"""Run a job of many processes to its end, and leave none of them behind, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import psutil

_Handler = Callable[[int, FrameType | None], None]
_GRACE = 20
"""Seconds that processes have to end after a signal; Slurm leaves 30 by default."""
_PASSED_ON = {
    # A Ctrl-C or a closed terminal ends the job too, but quietly: Python would print a traceback on every rank.
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}


class Stopped(Exception):
    """The job was ended by a signal that this process was sent."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)


def supervise(command: Sequence[str], environment: Mapping[str, str], kept_open: Sequence[int] = ()) -> int:
    """Run a command in a session of its own and return its exit code.

    SIGTERM, SIGINT, SIGHUP and SIGUSR1 reach all processes of the job. Those that are left 20 seconds after such a
    signal, or after the command itself has ended, are killed.

    Args:
        command: starts the job.
        environment: of the job.
        kept_open: file descriptors that the command inherits.

    Raises:
        Stopped: one of these signals came, and no process of the job is left.
    """
    job: subprocess.Popen[bytes] | None = None
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if job is not None and job.returncode is None:
            _signal_group(job.pid, _PASSED_ON[signal.Signals(number)])
            signal.alarm(_GRACE)

    def kill(number: int, frame: FrameType | None) -> None:
        if job is not None:
            _signal_group(job.pid, signal.SIGKILL)

    handlers: dict[signal.Signals, _Handler] = dict.fromkeys(_PASSED_ON, pass_on)
    with _handling({**handlers, signal.SIGALRM: kill}):
        # In a session of its own, all its processes can be found, even those whose parent is gone.
        job = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True, pass_fds=kept_open
        )
        if received:  # while the job was being started
            pass_on(received.pop(), None)
        code = job.wait()
        signal.alarm(0)
        _end_rest(job.pid, told=bool(received))
    if received:
        raise Stopped(received[0])
    return code


@contextmanager
def _handling(handlers: Mapping[signal.Signals, _Handler]) -> Iterator[None]:
    """Set signal handlers for a block; a signal that is ignored (``nohup``) stays so."""
    before = {number: signal.getsignal(number) for number in handlers}
    wanted = {number: handler for number, handler in handlers.items() if before[number] is not signal.SIG_IGN}
    try:
        for number, handler in wanted.items():
            signal.signal(number, handler)
        yield
    finally:
        for number in wanted:
            signal.signal(number, before[number])


def _signal_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except ProcessLookupError:
        return  # it has just ended


def _end_rest(session: int, told: bool) -> None:
    """End what is left of a session whose first process has ended.

    Args:
        session: its number.
        told: its processes were sent a signal and may be saving.
    """
    left = _members(session)
    if left and not told:
        for process in left:
            _send(process, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE
    while (left := _members(session)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        _send(process, signal.SIGKILL)


def _members(session: int) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _belongs(process, session)]


def _belongs(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, PermissionError, psutil.Error):
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.Error:
        return  # it has just ended
