"""Run the stages of a programme on this machine, one after the other."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

from rich.console import Console

from launcher.program.records import count_finished, write_record
from launcher.program.stages import Stage
from launcher.supervise import Stopped, supervise
from megacore.checkpoint.reader import CheckpointReader
from megacore.errors import ConfigError, MegacoreError
from megacore.publish import os_errors
from megacore.training.runs import lock_run


def run_stages(stages: Sequence[Stage], only: int | None = None) -> None:
    """Do what is not finished of a programme.

    Args:
        stages: all of the programme.
        only: the number of the one stage to do; those before it must be finished.

    Raises:
        MegacoreError: a stage failed or was stopped, finished stages do not fit the programme, or another job runs it.
    """
    _check_one_node()
    console = Console(highlight=False, soft_wrap=True)
    directory = stages[0].directory.parent
    with os_errors(directory, ConfigError):
        lock = lock_run(directory)
    with lock:
        finished = count_finished(stages)
        if only is not None and only > finished + 1:
            raise ConfigError(
                f"--stage {only}: {stages[finished].name}, which comes before it, is not finished; run it first"
            )
        for stage in stages:
            if only is not None and stage.number != only:
                continue
            if stage.number <= finished:
                console.print(f"{stage.name} is finished: {stage.result}", markup=False)
                continue
            # A job that outlives this process, which was killed, still holds the lock.
            _run(stage, console, kept_open=(lock.fileno(),))


def _run(stage: Stage, console: Console, kept_open: Sequence[int]) -> None:
    write_record(stage)
    command = stage.command()
    console.rule(stage.name)
    console.print(f"$ {shlex.join(command)}", style="dim", markup=False)
    try:
        # One thread per process: ranks would fight over the cores.
        code = supervise(command, {"OMP_NUM_THREADS": "1", **os.environ}, kept_open)
    except Stopped as stop:
        raise MegacoreError(
            f"{stage.name} was stopped by {stop.signal.name}; run the same command again to go on"
        ) from None
    if code:
        raise MegacoreError(
            f"{stage.name} failed with exit code {code}; its messages are above. Run the same command again to go on"
        )
    if not stage.result.exists():
        raise MegacoreError(f"{stage.name} ended well, but {stage.result} is not there")
    CheckpointReader(stage.result).check_model(stage.end.model)


def _check_one_node() -> None:
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    if nodes != "1":
        raise ConfigError(f"this job has {nodes} nodes, but a stage's processes start on one; submit with --nodes=1")
