"""Command lines that start several processes on this machine: the only place that knows the launchers' flags."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

_BIN = Path(sys.executable).parent


def megacore_command(*words: str | Path) -> list[str]:
    """Return the command line of one process."""
    return [sys.executable, "-m", "launcher", *map(str, words)]


def mpi_command(ranks: int, *words: str | Path) -> list[str]:
    """Return the command line of MPI ranks on this machine, with the ``mpirun`` of this environment."""
    # Open MPI refuses root (a container's only user, often) and more ranks than cores unless told.
    as_root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return [str(_BIN / "mpirun"), *as_root, "--oversubscribe", "-n", str(ranks), *megacore_command(*words)]


def deepspeed_command(processes: int, *words: str | Path) -> list[str]:
    """Return the command line of a training job on this machine, under the ``deepspeed`` launcher."""
    # A port of its own: a job that was killed a moment ago may still hold the default one.
    port = str(_free_port())
    flags = [
        "--no_local_rank",
        "--num_gpus",
        str(processes),
        "--master_port",
        port,
        "--log_level",
        "error",
        "--module",
        "launcher",
    ]
    return [sys.executable, str(_BIN / "deepspeed"), *flags, *map(str, words)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
