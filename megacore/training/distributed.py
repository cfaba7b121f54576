"""Join the world that a launcher made, or make a world of one."""

from __future__ import annotations

import logging
import os
import socket
import sys
import warnings
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from megacore.communicator import started_tasks
from megacore.errors import ConfigError

_TIMEOUT = timedelta(minutes=30)


def join_world() -> torch.device:
    """Initialise ``torch.distributed`` and return this process's device.

    ``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Raises:
        ConfigError: the variables are incomplete, or several tasks were started without them (each of which would
            otherwise train alone, believing to be the only one).
    """
    _check_environment()
    # DeepSpeed calls what torch renamed; its users can do nothing about that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"LOCAL_RANK={local_rank}, but this node has {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(local_rank)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed compiles an op here that only its inference uses; the attribute path is shadowed by torch itself.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, timeout=_TIMEOUT, verbose=False)
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


def _check_environment() -> None:
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in needed if name in os.environ]
    if present and len(present) < len(needed):
        missing = ", ".join(name for name in needed if name not in os.environ)
        raise ConfigError(f"{', '.join(present)} set but not {missing}: start with deepspeed or torchrun, or unset all")
    tasks = started_tasks()
    if not present and tasks > 1:
        raise ConfigError(
            f"{tasks} tasks were started without RANK and WORLD_SIZE, so each would train alone; "
            "start training with deepspeed or torchrun"
        )


def leave_world() -> None:
    """Close ``torch.distributed``, so that no rank's exit is taken for a failure by the others."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
