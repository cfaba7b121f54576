"""``megacore grow``, ``verify`` and ``diff``: what is done to checkpoints."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from launcher.bars import byte_bar
from launcher.memory import keep_freed_memory
from launcher.options import one_of
from megacore.communicator import Alone, mpi_or_alone, together
from megacore.errors import ConfigError
from megacore.publish import check_apart, os_errors, replace_file

if TYPE_CHECKING:
    from megacore.model_config import ModelConfig
    from megacore.models.batch import ModelBatch

_SOURCE = typer.Argument(..., help="Directory of a checkpoint.", show_default=False)


def grow(
    source: Path = typer.Argument(..., help="Directory of the checkpoint to grow.", show_default=False),
    target: Path = typer.Argument(..., help="Directory to write; must not exist.", show_default=False),
    sizes: list[str] = typer.Argument(
        ...,
        metavar="KEY=VALUE...",
        show_default=False,
        help="New sizes and layout: hidden_size, num_attention_heads, intermediate_size, tensor_parallel_size.",
    ),
    optimizer: str = typer.Option("map", help="map: Adam's moments grow with the weights; reset: they are left out."),
    dtype: str = typer.Option(None, help="float32 or float64; the source's by default."),
    noise_scale: float = typer.Option(0.2, min=0, help="Kernel noise in stream readers, relative to their weights."),
    share_scale: float = typer.Option(0.2, min=0, max=0.39, help="Spread of the shares of copied heads and neurons."),
    seed: int = typer.Option(0, min=0, help="Seed of noise and shares."),
    hold_steps: int = typer.Option(500, min=0, help="Training steps that learning-rate multipliers hold."),
    anneal_steps: int = typer.Option(500, min=0, help="Steps over which the multipliers then go to one."),
    json_file: Path = typer.Option(None, "--json", help="Write the figures of the growth here."),
) -> None:
    """Widen a checkpoint without changing what it computes; alone, or in parallel under mpirun."""
    from megacore.checkpoint.files import planned_bytes
    from megacore.checkpoint.reader import CheckpointReader
    from megacore.config import ParallelConfig
    from megacore.growth.execute import GrowthOutput, grow_checkpoint, planned_files
    from megacore.growth.plan import Symmetry, make_plan
    from megacore.settings import parse_overrides, validated
    from megacore.training.runs import followed

    keep_freed_memory()
    group = mpi_or_alone()
    began = time.perf_counter()
    source = followed(source, group)
    with together(group):
        one_of("--optimizer", optimizer, ("map", "reset"))
        if dtype is not None:
            one_of("--dtype", dtype, ("float32", "float64"))
        check_apart(source, target, ConfigError)
        reader = CheckpointReader(source)
        values = parse_overrides(sizes)
        # How the files are cut; a run of any layout can read them.
        parts = values.pop("tensor_parallel_size", reader.manifest.layout.tensor_parallel_size)
        plan = make_plan(reader.manifest.model, values, Symmetry(noise_scale, share_scale, seed))
        parallel = validated(ParallelConfig, {"tensor_parallel_size": parts})
        output = GrowthOutput(parallel, optimizer == "map", dtype, hold_steps, anneal_steps)
        total = planned_bytes(planned_files(reader, plan, output))
    with byte_bar("growing (rank 0)", total / group.size, enabled=group.rank == 0) as advance:
        grow_checkpoint(reader, plan, target, output, group, advance)
    if group.rank == 0:
        seconds = time.perf_counter() - began
        changed = ", ".join(f"{key} {old} → {plan.changes['to'][key]}" for key, old in plan.changes["from"].items())
        before, after = reader.manifest.num_parameters, sum(math.prod(spec.shape) for spec in plan.specs.values())
        typer.echo(f"{target}: {changed or 'same sizes'}; {before:,} → {after:,} parameters")
        typer.echo(f"{total / 1e6:.1f} MB written by {group.size} ranks in {seconds:.1f} s")
        if json_file:
            figures = {
                "source": str(source),
                **plan.changes,
                "parameters_before": before,
                "parameters_after": after,
                "seconds": seconds,
                "bytes_written": total,
            }
            _write_json(json_file, figures)


def verify(
    checkpoint: Path = _SOURCE,
    against: Path = typer.Option(None, help="A checkpoint that must compute the same."),
    data: Path = typer.Option(None, help="Compare on these instances instead of on random tokens."),
    samples: int = typer.Option(64, min=1, help="Instances of --data to compare on."),
    dtype: str = typer.Option("float32", help="Compute the comparison in float32 or float64."),
    tolerance: float = typer.Option(1e-5, min=0, help="Largest relative difference of logits that passes."),
    json_file: Path = typer.Option(None, "--json", help="Write the figures of the comparison here."),
) -> None:
    """Check that a checkpoint is complete, unaltered and finite; with --against, that it computes the same.

    Exit code 0: all is well; 1: the two compute different things; 2: a checkpoint is damaged, or cannot be compared.
    """
    import torch

    from megacore.checkpoint.reader import CheckpointReader
    from megacore.growth.verify import check_integrity, compare, random_batch
    from megacore.training.runs import followed

    one_of("--dtype", dtype, ("float32", "float64"))
    for option, value in (("--data", data), ("--json", json_file)):
        if value is not None and against is None:
            raise ConfigError(f"{option} {value}: is about a comparison; add --against CHECKPOINT, or leave it out")
    checkpoint = followed(checkpoint, Alone())
    reader = CheckpointReader(checkpoint)
    size = sum(file.size for file in reader.manifest.files.values())
    with byte_bar("reading", size, enabled=True) as advance:
        checked = check_integrity(reader, advance)
    typer.echo(f"{checkpoint}: complete, {checked / 1e6:.1f} MB, every checksum right, all values finite")
    if against is None:
        return
    other = CheckpointReader(followed(against, Alone()))
    batches = _data_batches(data, samples, reader.manifest.model) if data else [random_batch(reader.manifest.model)]
    result = compare(other, reader, batches, getattr(torch, dtype))
    worst = max(result.relative_errors.values())
    errors = ", ".join(f"{error:.2e} ({head.upper()})" for head, error in result.relative_errors.items())
    typer.echo(
        f"against {against} in {dtype}: relative |Δlogit| {errors}; "
        f"loss {result.loss_before:.6f} and {result.loss_after:.6f}"
    )
    if json_file:
        _write_json(json_file, result.as_dict())
    if not worst <= tolerance:
        typer.echo(f"error: the difference is above {tolerance:g}: not the same function", err=True)
        raise typer.Exit(1)


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


def _write_json(path: Path, figures: dict[str, Any]) -> None:
    with os_errors(path, ConfigError):
        replace_file(path, (json.dumps(figures) + "\n").encode())


def _data_batches(path: Path, samples: int, model: ModelConfig) -> list[ModelBatch]:
    import torch

    from data_pipeline.loader import PretrainingBatches
    from megacore.training.batches import model_batch, open_data

    batches = PretrainingBatches(
        open_data(path, model), seed=0, global_batch_size=16, micro_batch_size=16, objective=model.objective
    )
    return [model_batch(batch, torch.device("cpu")) for batch in batches.evaluation_batches(samples)]
