"""Run a function on several real ranks of one gloo world, and bring back what each returned."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``function(*args)`` in ``world_size`` processes with the variables a launcher would set.

    The function must be importable by name. The first failing rank's traceback is raised here; no process is left.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder, "task")
        task.write_bytes(pickle.dumps((function.__module__, function.__name__, args)))
        processes = []
        for rank in range(world_size):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
            world = {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
            with Path(folder, f"log{rank}").open("w") as log:
                command = [sys.executable, "-m", "tests.ranks", folder, str(rank)]
                environment = {**os.environ, **_ENVIRONMENT, **world}
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        try:
            _wait(processes, folder, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(world_size)]


def _wait(processes: list[subprocess.Popen[bytes]], folder: str, deadline: float) -> None:
    while any(process.poll() is None for process in processes):
        failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for rank, process in enumerate(processes):
        if process.poll() != 0:
            what = "did not end in time" if process.poll() is None else f"exited with {process.poll()}"
            log = Path(folder, f"log{rank}").read_text()[-6000:]
            if process.poll() is not None or all(other.poll() in (None, 0) for other in processes):
                raise AssertionError(f"rank {rank} {what}:\n{log}")


def _main(folder: str, rank: str) -> None:
    import importlib

    module, name, args = pickle.loads(Path(folder, "task").read_bytes())
    result = getattr(importlib.import_module(module), name)(*args)
    Path(folder, f"result{rank}").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may still be closing


if __name__ == "__main__":
    _main(*sys.argv[1:])
