"""``megacore program``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from megacore.errors import ConfigError

if TYPE_CHECKING:
    from launcher.program.stages import Stage


def program(
    file: Path = typer.Argument(..., metavar="PROGRAM.yaml", help="The programme.", show_default=False),
    sbatch: list[str] = typer.Argument(
        None,
        metavar="[SBATCH OPTION]...",
        help="With --slurm: options of sbatch, e.g. --partition=gpu --time=24:00:00.",
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Check the whole programme and show its stages (with --slurm: its scripts)."
    ),
    slurm: bool = typer.Option(False, "--slurm", help="Submit what is not finished as a chain of jobs."),
    stage: int = typer.Option(None, min=1, help="Do this stage only; those before it must be finished."),
    processes: int = typer.Option(None, min=1, help="Of stages that do not say; instead of the file's 'processes'."),
) -> None:
    """Train, grow, train, ... as a YAML file says; given again, it goes on where it was stopped."""
    from launcher.program.config import read_program
    from launcher.program.records import count_finished
    from launcher.program.run import run_stages
    from launcher.program.slurm import Submission, stage_script, submit
    from launcher.program.stages import plan_stages

    if sbatch and not slurm:
        raise ConfigError(f"'{sbatch[0]}' is no option of this command; options of sbatch come with --slurm")
    if slurm and stage is not None:
        raise ConfigError("--stage and --slurm: jobs are submitted for all stages that are not finished; leave one out")
    stages = plan_stages(read_program(file, processes), str(file))
    if stage is not None and stage > len(stages):
        raise ConfigError(f"--stage {stage}: {file} has {len(stages)} stages")
    finished = count_finished(stages)
    left, submission = stages[finished:], Submission(file, processes, sbatch or ())
    if slurm and not left:
        typer.echo(f"all stages are finished: {stages[-1].result}")
    elif slurm and dry_run:
        for one in left:
            typer.echo(stage_script(one, submission))
    elif slurm:
        for name, job in submit(left, submission).items():
            typer.echo(f"{name}: job {job}")
        typer.echo(f"each job waits for the one before it; logs: {left[0].directory.parent}/*.log")
    elif dry_run:
        _show(stages, finished)
    else:
        run_stages(stages, stage)


def _show(stages: Sequence[Stage], finished: int) -> None:
    """Print a line for each stage."""
    from rich.console import Console
    from rich.table import Table

    from launcher.program.stages import TrainStage
    from megacore.models.transformer import declarations
    from megacore.training.runs import checkpoints

    table = Table("stage", "hidden × layers", "parameters", "steps", "tokens", "processes", "is", box=None)
    for stage in stages:
        model = stage.end.model
        parameters = sum(math.prod(spec.shape) for spec in declarations(model).values())
        begun = checkpoints(stage.directory)
        state = "finished" if stage.number <= finished else f"at {begun[-1].name}" if begun else "to do"
        steps, tokens = "", ""
        if isinstance(stage, TrainStage):
            steps, tokens = f"{stage.config.training.train_steps:,}", f"{stage.tokens:.2e}"
        size = f"{model.hidden_size} × {model.num_hidden_layers}"
        table.add_row(stage.name, size, f"{parameters:,}", steps, tokens, str(stage.processes), state)
    Console(highlight=False, soft_wrap=True).print(table)
