"""``megacore grow``: a checkpoint, or a Hugging Face directory, to a larger one that computes the same."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from launcher.bars import byte_bar
from launcher.memory import keep_freed_memory
from launcher.options import DTYPES, LAYOUT, one_of, write_json
from megacore.communicator import mpi_or_alone, together
from megacore.errors import ConfigError
from megacore.publish import check_apart

if TYPE_CHECKING:
    from megacore.checkpoint.writer import FileToWrite
    from megacore.config import ParallelConfig
    from megacore.growth.describe import Note
    from megacore.growth.estimate import Estimate
    from megacore.growth.execute import GrowthOutput
    from megacore.growth.plan import GrowthPlan, Symmetry
    from megacore.growth.proof import GrowthProof
    from megacore.growth.source import GrowthSource
    from megacore.growth.verify import Comparison

_SYMMETRIES = {"noise": ("--noise-scale", "--share-scale"), "uneven": ("--share-scale",), "none": ()}
"""Ways to make copies differ -> the options that each has."""
_SCALE, _MAX_NOISE_SCALE, _MAX_SHARE_SCALE = 0.2, 1.0, 0.39
"""Noise that outgrows the weights would leave the sums to rounding."""
_WIDTH = 160
"""Columns of a plan, at least: names of parameters are long."""


def grow(
    source: Path = typer.Argument(..., help="Checkpoint to grow, or a Hugging Face directory.", show_default=False),
    target: Path = typer.Argument(..., help="Directory to write; must not exist.", show_default=False),
    sizes: list[str] = typer.Argument(
        None,
        metavar="[KEY=VALUE]...",
        show_default=False,
        help="New sizes, and the layout of the files: hidden_size, num_attention_heads, num_key_value_heads, head_dim, "
        "intermediate_size, num_hidden_layers, num_decoder_layers, vocab_size, max_position_embeddings, num_experts, "
        "tensor_parallel_size, pipeline_parallel_size.",
    ),
    to: Path = typer.Option(None, help="Take the sizes and the layout of this run's CONFIG.yaml; words change them."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the plan and what it takes; write nothing."),
    optimizer: str = typer.Option("map", help="map: Adam's moments grow with the weights; reset: they are left out."),
    symmetry: str = typer.Option(
        "noise", help="How copies differ: noise (kernel noise and uneven shares), uneven (shares only), none (even)."
    ),
    noise_scale: float = typer.Option(
        None, min=0, max=_MAX_NOISE_SCALE, help="Of the noise, relative to the weights; 0.2 by default."
    ),
    share_scale: float = typer.Option(
        None, min=0, max=_MAX_SHARE_SCALE, help="Relative spread of the shares; 0.2 by default."
    ),
    seed: int = typer.Option(0, min=0, help="Of noise, shares and new values."),
    dtype: str = typer.Option(None, help="fp32, bf16 (the weights only) or fp64; the source's by default."),
    hold_steps: int = typer.Option(500, min=0, help="Training steps that learning-rate multipliers hold."),
    anneal_steps: int = typer.Option(500, min=0, help="Steps over which the multipliers then go to one."),
    verify: str = typer.Option(
        "auto", help="Compare the models before anything is published: auto (where they are small), always or never."
    ),
    json_file: Path = typer.Option(None, "--json", help="Write the figures of the growth here."),
) -> None:
    """Grow a model without changing what it computes; alone, or in parallel under mpirun."""
    from megacore.growth.execute import GrowthOutput, grow_checkpoint
    from megacore.growth.plan import make_plan
    from megacore.training.runs import followed

    keep_freed_memory()
    group = mpi_or_alone()
    source = followed(source, group)
    with together(group):
        check_options(optimizer, verify, dtype, symmetry, noise_scale, share_scale)
        if dry_run and json_file is not None:
            raise ConfigError(f"--json {json_file}: --dry-run writes nothing; leave one of them out")
        check_apart(source, target, ConfigError)
        small = opened_source(source)
        new_sizes, parallel = _asked(to, sizes or [], small)
        plan = make_plan(small.manifest.model, new_sizes, _symmetry(symmetry, noise_scale, share_scale, seed))
        stored = None if dtype is None else DTYPES[dtype]
        output = GrowthOutput(parallel, optimizer == "map", stored, hold_steps, anneal_steps)
        job = _job(small, plan, output, group.size)
        obstacle = job.proof.obstacle() if verify == "auto" else None
        proves = verify != "never" and obstacle is None
    if dry_run:
        if group.rank == 0:
            _show(job, proves, group.size)
        return
    began = time.perf_counter()
    with byte_bar("growing (rank 0)", job.estimate.bytes_written / group.size, enabled=group.rank == 0) as advance:
        check = job.proof if proves else _unchecked
        grow_checkpoint(small, plan, target, output, group, advance, check)
    if group.rank == 0:
        seconds = time.perf_counter() - began
        _summarise(job, target, group.size, seconds, obstacle)
        if json_file:
            write_json(json_file, _figures(job, source, seconds))


def check_options(
    optimizer: str, verify: str, dtype: str | None, symmetry: str, noise_scale: float | None, share_scale: float | None
) -> None:
    """Refuse what the options do not have, or what does not go together, before anything is read.

    Raises:
        ConfigError: naming the option.
    """
    one_of("--optimizer", optimizer, ("map", "reset"))
    one_of("--verify", verify, ("auto", "always", "never"))
    if dtype is not None:
        one_of("--dtype", dtype, DTYPES)
    one_of("--symmetry", symmetry, _SYMMETRIES)
    for option, scale in {"--noise-scale": noise_scale, "--share-scale": share_scale}.items():
        if scale is not None and option not in _SYMMETRIES[symmetry]:
            raise ConfigError(f"{option} {scale:g}: --symmetry {symmetry} has no such thing; leave one of them out")


def _asked(to: Path | None, words: list[str], source: GrowthSource) -> tuple[dict[str, Any], ParallelConfig]:
    """Read the sizes and the layout of the files, which is the source's where none is given."""
    from megacore.config import ParallelConfig, RunConfig
    from megacore.model_config import NOT_GROWN, ModelConfig
    from megacore.settings import parse_overrides, read_yaml, unknown_key, validated

    sizes = parse_overrides(words)
    if not sizes and to is None:
        raise ConfigError("nothing to grow: give sizes such as hidden_size=1024, or --to CONFIG.yaml")
    layout = {key: getattr(source.manifest.layout, key) for key in LAYOUT}
    given = {key: sizes.pop(key) for key in LAYOUT if key in sizes}
    if to is not None:
        sections = read_yaml(to)
        model, parallel = (sections.get(key) or {} for key in ("model", "parallel"))
        if not isinstance(model, Mapping) or not isinstance(parallel, Mapping):
            raise ConfigError(f"{to}: model and parallel must be sections of keys and values")
        for key in sections:
            if key not in RunConfig.model_fields:
                raise unknown_key(key, RunConfig.model_fields)
        validated(ParallelConfig, parallel, f"{to}: ")
        config = validated(ModelConfig, {**model, **sizes}, f"{to}: ")
        # Growth itself sets some keys; and what a run drops out is its own affair. All others must be the grown model's
        # at the run's start, those that the file leaves to their defaults, too.
        free = {*NOT_GROWN, "logit_multiplier", "preset", "hidden_dropout", "attention_dropout"}
        sizes = {key: getattr(config, key) for key in ModelConfig.model_fields if key not in free}
        layout |= {key: parallel[key] for key in LAYOUT if key in parallel}
    return sizes, validated(ParallelConfig, layout | given)


def opened_source(path: Path) -> GrowthSource:
    """Open a checkpoint, or a Hugging Face directory."""
    from megacore.checkpoint.manifest import MANIFEST
    from megacore.checkpoint.reader import CheckpointReader

    if (path / MANIFEST).is_file() or not path.is_dir():
        return CheckpointReader(path)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{path}: neither a checkpoint ({MANIFEST}) nor a Hugging Face directory (config.json); "
            "other programs' checkpoints go through megacore convert first"
        )
    from megacore.convert.huggingface import HuggingFaceSource
    from megacore.growth.source import ForeignSource

    return ForeignSource(HuggingFaceSource(path))


def _symmetry(kind: str, noise_scale: float | None, share_scale: float | None, seed: int) -> Symmetry:
    from megacore.growth.plan import Symmetry

    scales = {"--noise-scale": noise_scale, "--share-scale": share_scale}
    noise, share = (
        (_SCALE if scale is None else scale) if option in _SYMMETRIES[kind] else 0.0 for option, scale in scales.items()
    )
    return Symmetry(noise, share, seed)


@dataclass(frozen=True)
class _Job:
    """A growth, known before anything is written."""

    source: GrowthSource
    plan: GrowthPlan
    output: GrowthOutput
    files: list[FileToWrite]
    notes: tuple[Note, ...]
    estimate: Estimate
    proof: GrowthProof

    @property
    def changes(self) -> str:
        """The sizes, before and after."""
        changes = self.plan.changes
        return ", ".join(f"{key} {old} → {changes['to'][key]}" for key, old in changes["from"].items()) or "same sizes"

    @property
    def parameters(self) -> tuple[int, int]:
        """How many the models have."""
        before = self.source.manifest.num_parameters
        return before, self.proof.parameters - before


def _job(source: GrowthSource, plan: GrowthPlan, output: GrowthOutput, ranks: int) -> _Job:
    from megacore.growth.describe import notes
    from megacore.growth.estimate import estimate
    from megacore.growth.execute import dtypes_of, planned_files, written_states
    from megacore.growth.proof import GrowthProof

    files, states = planned_files(source, plan, output), written_states(source, output)
    dtypes = dtypes_of(source, plan, output)
    found = notes(plan, dtypes, output.keep_optimizer, len(states) > 1)
    needs = estimate(source, plan, files, states, ranks)
    return _Job(source, plan, output, files, found, needs, GrowthProof(source, plan, dtypes))


def _unchecked(grown: object) -> tuple[dict[str, Any], ...]:
    return ()


def _show(job: _Job, proves: bool, ranks: int) -> None:
    """Print the plan."""
    from rich.console import Console

    from launcher.growth_table import growth_table
    from megacore.growth.estimate import RATE
    from megacore.growth.execute import dtypes_of, written_states

    console = Console(highlight=False, width=max(Console().width, _WIDTH))
    moments = len(written_states(job.source, job.output)) > 1
    console.print(growth_table(job.plan, dtypes_of(job.source, job.plan, job.output), moments))
    before, after = job.parameters
    lines = [f"{job.changes}; {before:,} → {after:,} parameters in {len(job.files)} files", *_exactness(job)]
    for note in job.notes:
        lines.append(f"  {note.about}, {note.name}: {note.reason}")
    needs = job.estimate
    memory = needs.memory + (job.proof.memory if proves else 0)
    compared = f"compared in {job.proof.dtype}, to {job.proof.limit:.0e}" if proves else "not compared"
    lines += [
        f"reads {_size(needs.bytes_read)}, writes {_size(needs.bytes_written)}; the models are {compared}",
        f"memory of a rank: about {_size(memory)}; time: about {needs.seconds:.0f} s for {ranks} ranks of "
        f"{RATE / 1e6:.0f} MB/s",
        "nothing was written (--dry-run)",
    ]
    for line in lines:
        console.print(line, markup=False)


def _exactness(job: _Job) -> list[str]:
    from megacore.growth.describe import exactness

    return [f"{about}: {exactness(job.notes, about)}" for about in ("function", "optimizer")]


def _summarise(job: _Job, target: Path, ranks: int, seconds: float, obstacle: str | None) -> None:
    """Print what was done."""
    before, after = job.parameters
    typer.echo(f"{target}: {job.changes}; {before:,} → {after:,} parameters")
    for line in _exactness(job):
        typer.echo(line)
    if job.proof.result is not None:
        typer.echo(f"compared with the source {figures_line(job.proof.result)} (tolerance {job.proof.limit:.0e})")
    else:
        why = obstacle or "--verify never"
        typer.echo(f"not compared with the source: {why}; do so with megacore verify {target} --against SOURCE")
    read, written = _size(job.estimate.bytes_read), _size(job.estimate.bytes_written)
    typer.echo(f"{read} read, {written} written by {ranks} ranks in {seconds:.1f} s")


def figures_line(result: Comparison) -> str:
    """Return the figures of a comparison in a line."""
    errors = ", ".join(f"{error:.2e} ({head.upper()})" for head, error in result.relative_errors.items())
    old = result.loss_after_old_tokens
    only = f" ({old:.6f} if only the old tokens could be predicted)" if old != result.loss_after else ""
    losses = f"{result.loss_before:.6f} and {result.loss_after:.6f}"
    return f"in {result.dtype}: relative |Δlogit| {errors}; loss {losses}{only}"


def _figures(job: _Job, source: Path, seconds: float) -> dict[str, Any]:
    before, after = job.parameters
    result = job.proof.result
    return {
        "source": str(source),
        **job.plan.changes,
        "parameters_before": before,
        "parameters_after": after,
        "not_exact": [note._asdict() for note in job.notes],
        "verification": None if result is None else result.as_dict() | {"tolerance": job.proof.limit},
        "seconds": seconds,
        "bytes_read": job.estimate.bytes_read,
        "bytes_written": job.estimate.bytes_written,
    }


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"
