"""``megacore verify`` and ``diff``: is a checkpoint sound, and does it compute what another one does?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launcher.bars import byte_bar
from launcher.grow_command import figures_line, opened_source
from launcher.options import DTYPES, one_of, write_json
from megacore.communicator import Alone, Communicator, TorchRanks, started_tasks, together
from megacore.errors import ConfigError

if TYPE_CHECKING:
    from megacore.model_config import ModelConfig
    from megacore.models.batch import ModelBatch
    from megacore.parallel.grid import ParallelGrid

_SOURCE = typer.Argument(..., help="Directory of a checkpoint.", show_default=False)


def verify(
    checkpoint: Path = _SOURCE,
    against: Path = typer.Option(None, help="A checkpoint that must compute the same: the smaller one after a growth."),
    data: Path = typer.Option(None, help="Compare on these instances instead of on random tokens."),
    samples: int = typer.Option(64, min=1, help="Instances of --data to compare on."),
    dtype: str = typer.Option("fp32", help="Compute the comparison in fp32, bf16 or fp64."),
    tolerance: float = typer.Option(
        None, min=0, help="Largest relative difference of logits that passes; by default what rounding allows."
    ),
    record_it: bool = typer.Option(False, "--record", help="Add the comparison to the checkpoint's lineage."),
    json_file: Path = typer.Option(None, "--json", help="Write the figures of the comparison here."),
) -> None:
    """Check that a checkpoint is complete, unaltered and finite; with --against, that it computes the same.

    Several processes, started as for training, share both models by tensor parallelism. Exit code 0: all is well; 1:
    the two compute different things; 2: a checkpoint is damaged, or cannot be compared.
    """
    from megacore.checkpoint.reader import CheckpointReader
    from megacore.config import ParallelConfig
    from megacore.growth.proof import record, stored_tolerance
    from megacore.growth.verify import check_integrity, compare, random_batch
    from megacore.training.runs import followed

    one_of("--dtype", dtype, DTYPES)
    options = {f"--data {data}": data, f"--json {json_file}": json_file, "--record": record_it or None}
    for option, value in options.items():
        if value is not None and against is None:
            raise ConfigError(f"{option}: is about a comparison; add --against CHECKPOINT, or leave it out")
    with _ranks() as (group, grid):
        checkpoint = followed(checkpoint, group)
        with together(group):
            reader = CheckpointReader(checkpoint)
            if group.rank == 0:
                size = sum(file.size for file in reader.manifest.files.values())
                with byte_bar("reading", size, enabled=True) as advance:
                    checked = check_integrity(reader, advance)
                typer.echo(f"{checkpoint}: complete, {checked / 1e6:.1f} MB, every checksum right, all values finite")
        if against is None:
            return
        other_path = followed(against, group)
        with together(group):
            other = opened_source(other_path)
            for model in (reader.manifest.model, other.manifest.model):
                ParallelConfig(tensor_parallel_size=group.size).check(model)
            model = other.manifest.model
            batches = _data_batches(data, samples, model) if data else [random_batch(model)]
        result = compare(other, reader, batches, DTYPES[dtype], grid)
        limit = stored_tolerance(DTYPES[dtype], other, reader) if tolerance is None else tolerance
        with together(group):
            if group.rank == 0:
                typer.echo(f"against {against} {figures_line(result)}; tolerance {limit:.0e}")
                if json_file:
                    write_json(json_file, result.as_dict() | {"tolerance": limit})
                if record_it:
                    record(reader, result.event(other, limit))
                if not result.worst <= limit:
                    typer.echo(f"error: the difference is above {limit:.3g}: not the same function", err=True)
    if not result.worst <= limit:
        raise typer.Exit(1)


@contextmanager
def _ranks() -> Iterator[tuple[Communicator, ParallelGrid]]:
    """Join the processes that ``deepspeed`` or ``torchrun`` started, on the CPU; or be alone."""
    from megacore.parallel.grid import ParallelGrid

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        tasks = started_tasks()
        if tasks > 1:
            raise ConfigError(f"{tasks} tasks were started, each of which would do all; use deepspeed or torchrun")
        yield Alone(), ParallelGrid()
        return
    import torch.distributed as dist

    from megacore.config import ParallelConfig

    dist.init_process_group("gloo")
    try:
        group = TorchRanks()
        yield group, ParallelGrid.create(ParallelConfig(tensor_parallel_size=group.size))
    finally:
        dist.destroy_process_group()


def diff(
    first: Path = _SOURCE,
    second: Path = typer.Argument(..., help="The other one.", show_default=False),
) -> None:
    """Show what differs between two checkpoints of any layouts.

    Exit code 0: nothing; 1: something; 2: a checkpoint is damaged.
    """
    from megacore.checkpoint.diff import configuration_differences, tensor_differences
    from megacore.checkpoint.reader import CheckpointReader
    from megacore.training.runs import followed

    readers = CheckpointReader(followed(first, Alone())), CheckpointReader(followed(second, Alone()))
    settings = configuration_differences(*readers)
    with byte_bar("comparing", None, enabled=True) as advance:
        tensors = list(tensor_differences(*readers, advance))
    for key, (a, b) in settings.items():
        typer.echo(f"{key}: {a} | {b}")
    for tensor in tensors:
        name = f"{tensor.parameter}/{tensor.state}"
        if tensor.what == "values":
            typer.echo(f"{name}: {tensor.changed:.1%} of the values, by up to {tensor.largest:.3g}")
        elif tensor.what == "shape":
            typer.echo(f"{name}: {' | '.join(str(list(reader.shape(tensor.parameter))) for reader in readers)}")
        else:
            typer.echo(f"{name}: {tensor.what}")
    if settings or tensors:
        raise typer.Exit(1)
    typer.echo("the same")


def _data_batches(path: Path, samples: int, model: ModelConfig) -> list[ModelBatch]:
    import torch

    from data_pipeline.loader import PretrainingBatches
    from megacore.training.batches import model_batch, open_data

    batches = PretrainingBatches(
        open_data(path, model), seed=0, global_batch_size=16, micro_batch_size=16, objective=model.objective
    )
    return [model_batch(batch, torch.device("cpu")) for batch in batches.evaluation_batches(samples)]
