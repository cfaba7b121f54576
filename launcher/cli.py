"""The ``megacore`` command line."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import typer

from launcher.checkpoint_commands import diff, verify
from launcher.convert_command import convert
from launcher.data_commands import data_app
from launcher.dry_run import show_dry_run
from launcher.grow_command import grow
from launcher.inspect_command import inspect
from launcher.program.command import program
from megacore.errors import MegacoreError

app = typer.Typer(
    help="Train a Transformer small, grow its checkpoint without losing anything, go on training.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
app.command(no_args_is_help=True)(grow)
app.command(no_args_is_help=True)(convert)
app.command(no_args_is_help=True)(verify)
app.command(no_args_is_help=True)(inspect)
app.command(no_args_is_help=True)(diff)
# What it does not know is sbatch's.
app.command(no_args_is_help=True, context_settings={"ignore_unknown_options": True})(program)


@app.command(no_args_is_help=True)
def train(
    config: Path = typer.Argument(..., help="YAML file of the run.", show_default=False),
    overrides: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Keys of the configuration, e.g. learning_rate=1e-3."
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Check and estimate the run, without starting it."),
    processes: int = typer.Option(1, min=1, help="Of the job that --dry-run is about."),
) -> None:
    """Train a stage, or go on with it from its last checkpoint; one process of a job, or a job of one.

    Start several with: deepspeed --no_local_rank --num_gpus 2 --module launcher train CONFIG.yaml
    """
    from megacore.config import RunConfig
    from megacore.settings import load

    settings = load(RunConfig, config, overrides or ())
    if dry_run:
        show_dry_run(settings, processes)
        return
    from megacore.training.loop import train as run

    run(settings)


@app.command(no_args_is_help=True)
def report(
    runs: list[Path] = typer.Argument(..., help="Directories of runs.", show_default=False),
    out: Path = typer.Option(Path("report.html"), help="The HTML file to write."),
) -> None:
    """Compare runs: a table here, and one self-contained HTML page with all curves."""
    from rich.console import Console

    from launcher.report import summary_table, write_report
    from launcher.report_runs import read_run

    read = [read_run(path) for path in runs]
    write_report(read, out)
    Console().print(summary_table(read))
    typer.echo(f"report: {out}")


@app.command()
def demo(
    directory: Path = typer.Argument(Path("runs/demo"), help="Where everything is written."),
    input: Path = typer.Option(None, help="A .txt or .jsonl file instead of the embedded corpus."),
) -> None:
    """Run the whole job: text, small model, growth, large model, report."""
    from launcher.demo import run_demo

    run_demo(directory, input)


def main() -> None:
    """Run the command line: errors a user can mend are one line and exit code 2."""
    # DeepSpeed would otherwise guess the accelerator and warn about it on every rank.
    if "DS_ACCELERATOR" not in os.environ and not Path("/dev/nvidiactl").exists():
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        app()
    except MegacoreError as error:
        _exit_all_ranks(error)
    except MemoryError as error:  # sizes that no machine holds, most likely mistyped
        _exit_all_ranks(MegacoreError(f"not enough memory: {error}"))
    except BrokenPipeError:
        sys.exit(1)


_RANK_0_FIRST = 5.0
"""Seconds that the other ranks leave rank 0 to report an error that it met too; its exit ends the job."""


def _exit_all_ranks(error: MegacoreError) -> NoReturn:
    """Print an error once, and leave no rank behind.

    Launchers end a job when one of its processes fails. So rank 0 speaks first; another rank speaks only if the job
    still runs then, for an error that it met alone.
    """
    rank = int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
    if rank > 0:
        time.sleep(_RANK_0_FIRST)
    if rank == 0 or not error.agreed:
        print(f"error: {error}", file=sys.stderr, flush=True)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi and mpi.Is_initialized() and not error.agreed:
        mpi.COMM_WORLD.Abort(2)
    sys.stdout.flush()
    os._exit(2)  # without DeepSpeed's and MPI's exit handlers, which would wait for the other ranks
