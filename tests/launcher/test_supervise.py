"""Whatever ends a job, none of its processes is left."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher import supervise as module
from launcher.supervise import Stopped, supervise

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
pytestmark = pytest.mark.timeout(method="thread")  # the job's own limit is an alarm


def is_alive(pid_file: Path) -> bool:
    assert pid_file.exists(), "the job did not start"
    try:
        return psutil.Process(int(pid_file.read_text())).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def send_when_started(pid_file: Path, number: signal.Signals) -> None:
    deadline = time.monotonic() + 20
    while not pid_file.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _default_handlers() -> Iterator[None]:
    """A shell's background jobs ignore SIGINT, and what is ignored is not passed on."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def shell(script: str) -> list[str]:
    return ["bash", "-c", script]


def test_the_exit_code_is_the_commands() -> None:
    assert supervise(shell("exit 3"), os.environ) == 3


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_reaches_every_process(tmp_path: Path, number: signal.Signals) -> None:
    child = tmp_path / "child"
    threading.Thread(target=send_when_started, args=(child, number)).start()
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as caught:
        supervise(shell(f"sleep 300 & echo $! > {child}.new; mv {child}.new {child}; wait"), os.environ)
    assert caught.value.signal == number
    assert not is_alive(child)
    assert signal.getsignal(number) == before


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    child = tmp_path / "child"
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    threading.Thread(target=send_when_started, args=(child, signal.SIGHUP)).start()
    assert supervise(shell(f"touch {child}; sleep 1"), os.environ) == 0


def test_what_ignores_a_signal_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE", 1)
    child = tmp_path / "child"
    threading.Thread(target=send_when_started, args=(child, signal.SIGTERM)).start()
    stubborn = f"trap '' TERM; sleep 300 & echo $! > {child}.new; mv {child}.new {child}; wait; sleep 300"
    began = time.monotonic()
    with pytest.raises(Stopped):
        supervise(shell(stubborn), os.environ)
    assert time.monotonic() - began < 20
    assert not is_alive(child)


def test_what_a_killed_launcher_leaves_is_ended(tmp_path: Path) -> None:
    child = tmp_path / "child"
    # Its own process group, as mpirun gives each rank.
    grandchild = f"import os, time; os.setpgid(0, 0); open('{child}', 'w').write(str(os.getpid())); time.sleep(300)"
    script = f'{sys.executable} -c "{grandchild}" & while [ ! -s {child} ]; do sleep 0.1; done; kill -9 $$'
    assert supervise(shell(script), os.environ) == -signal.SIGKILL
    assert not is_alive(child)
