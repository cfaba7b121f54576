"""What measurements of commands against the disk share: timing, peak memory, plain writes of as many bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def flush(folder: Path) -> None:
    """Flush a directory's files to the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def zeros_by_two(target: Path, size: int) -> None:
    """Let two ``dd`` write ``size`` bytes past the page cache, as fast as the disk takes them."""
    target.mkdir()
    options = ["if=/dev/zero", "bs=16M", "oflag=direct", f"count={size // 2 // (16 << 20)}", "status=none"]
    running = [subprocess.Popen(["dd", f"of={target / name}", *options]) for name in "ab"]
    assert not any([process.wait() for process in running])
    flush(target)


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long a call takes, and what it returns."""
    os.sync()
    began = time.perf_counter()
    result = run()
    return time.perf_counter() - began, result


MEASURED = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, text=True)
print(done.stdout, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(done.returncode)
"""
"""Runs a command from a small process: a child's peak begins with what its parent held when it was started."""


def peak_of(words: list[str]) -> int:
    """Run a command; return its peak resident memory in bytes."""
    return 1024 * int(said_by([sys.executable, "-c", MEASURED, *words]).split()[-1])


def said_by(words: list[str]) -> str:
    """Run a command of one thread for each process; return what it says."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
