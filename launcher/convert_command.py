"""``megacore convert``: checkpoints to other layouts, and from and to Hugging Face, DeepSpeed and Megatron-LM."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launcher.bars import byte_bar
from launcher.memory import keep_freed_memory
from launcher.options import DTYPES, LAYOUT, one_of
from megacore.communicator import mpi_or_alone, together
from megacore.errors import ConfigError
from megacore.publish import check_apart

if TYPE_CHECKING:
    from launcher.bars import Advance
    from megacore.checkpoint.reader import CheckpointReader
    from megacore.communicator import Communicator
    from megacore.config import ParallelConfig
    from megacore.convert.imports import Import, Source
    from megacore.model_config import ModelConfig

_SOURCES = ("auto", "megacore", "hf", "deepspeed", "megatron")
_TARGETS = ("megacore", "hf", "deepspeed-universal", "megatron")
_DTYPES = ("fp32", "bf16")


def convert(
    source: Path = typer.Argument(..., help="Checkpoint, or directory of another format.", show_default=False),
    target: Path = typer.Argument(..., help="Directory to write; must not exist.", show_default=False),
    layout: list[str] = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Layout of the files: tensor_parallel_size=T pipeline_parallel_size=P."
    ),
    source_format: str = typer.Option(
        "auto", "--from", help="auto, megacore, hf (Hugging Face), deepspeed or megatron."
    ),
    target_format: str = typer.Option("megacore", "--to", help="megacore, hf, deepspeed-universal or megatron."),
    dtype: str = typer.Option(None, help="fp32 or bf16; checkpoints keep the source's by default."),
    config: Path = typer.Option(None, help="The run's CONFIG.yaml, where a source does not say what model it is of."),
    weights_only: bool = typer.Option(False, "--weights-only", help="Leave the optimizer's state out."),
) -> None:
    """Convert a checkpoint; alone, or in parallel under mpirun.

    A run needs none of this to resume at another layout.
    """
    from megacore.config import ParallelConfig
    from megacore.model_config import ModelConfig
    from megacore.settings import parse_overrides, read_yaml, validated
    from megacore.training.runs import followed

    keep_freed_memory()
    group = mpi_or_alone()
    began = time.perf_counter()
    source = followed(source, group)
    with together(group):
        check_apart(source, target, ConfigError)
        one_of("--from", source_format, _SOURCES)
        one_of("--to", target_format, _TARGETS)
        if dtype is not None:
            one_of("--dtype", dtype, _DTYPES)
        if source.is_file():
            raise ConfigError(f"{source} is a file; give its directory")
        known = _detected(source) if source_format == "auto" else source_format
        if known != "megacore" and target_format != "megacore":
            raise ConfigError(f"--from {known} --to {target_format}: convert to megacore first, then from it")
        if target_format == "deepspeed-universal" and (dtype or weights_only):
            raise ConfigError("--to deepspeed-universal holds fp32 and optimizer: leave out --dtype, --weights-only")
        if dtype == "bf16" and known == target_format == "megacore" and not weights_only:
            raise ConfigError("--dtype bf16 would round the optimizer's state: add --weights-only")
        if config is not None and known not in ("deepspeed", "megatron"):
            raise ConfigError(
                f"--config {config}: a source of the format {known} says what model it is of; leave it out"
            )
        if layout and target_format == "hf":
            raise ConfigError(f"{layout[0]}: a Hugging Face directory has no layout")
        words = parse_overrides(layout or ())
        for key, value in words.items():
            if key not in LAYOUT:
                raise ConfigError(f"{key}={value}: the layout of files is {' and '.join(LAYOUT)}")
        parallel = validated(ParallelConfig, words)
        model = None if config is None else validated(ModelConfig, read_yaml(config).get("model", {}), f"{config}: ")
    with byte_bar("converting (rank 0)", None, enabled=group.rank == 0) as advance:
        job = _Job(target, parallel, None if dtype is None else DTYPES[dtype], weights_only, group, advance)
        if known == "megacore":
            _from_megacore(source, target_format, job)
        else:
            _to_megacore(source, known, model, job)
    if group.rank == 0:
        typer.echo(f"{target}: {known} → {target_format}, {time.perf_counter() - began:.1f} s with {group.size} ranks")


@dataclass(frozen=True)
class _Job:
    target: Path
    parallel: ParallelConfig
    dtype: str | None
    weights_only: bool
    group: Communicator
    advance: Advance


# What a format needs is imported with it: torch and its models take longer to start than many a checkpoint to move.


def _from_megacore(source: Path, target_format: str, job: _Job) -> None:
    from megacore.checkpoint.reader import CheckpointReader

    with together(job.group):
        reader = CheckpointReader(source)
    if target_format == "hf":
        from megacore.convert.huggingface import export_huggingface

        export_huggingface(reader, job.target, job.dtype or "float32", job.group, job.advance)
        _say_lost(reader, job, "the optimizer's state")
    elif target_format == "megatron":
        from megacore.convert.megatron_export import export_megatron

        export_megatron(reader, job.target, job.parallel, job.dtype or "float32", job.group, job.advance)
        _say_lost(reader, job, "the optimizer's state")
        _say(job.group, "start Megatron-LM with", ("--transformer-impl local --no-load-optim --no-load-rng",))
    elif target_format == "deepspeed-universal":
        from megacore.convert.universal import export_universal

        export_universal(reader, job.target, job.parallel, job.group, job.advance)
        _say_lost(reader, job, None)
    else:
        from megacore.convert.reshard import reshard

        reshard(reader, job.target, job.parallel, job.group, job.weights_only, job.dtype, on_progress=job.advance)


def _to_megacore(source: Path, known: str, model: ModelConfig | None, job: _Job) -> None:
    from megacore.convert.deepspeed import DeepSpeedSource
    from megacore.convert.huggingface import HuggingFaceSource
    from megacore.convert.imports import import_checkpoint
    from megacore.convert.megatron import MegatronSource

    def opened() -> Source:
        if known == "hf":
            return HuggingFaceSource(source)
        return MegatronSource(source, model) if known == "megatron" else DeepSpeedSource(source, model)

    def started(facts: Import) -> None:
        _say(job.group, "new, from initial values", facts.new)
        _say(job.group, "left out", facts.left_out)
        _say_rounded(job.group, facts.rounded)

    import_checkpoint(opened, job.target, job.parallel, job.group, job.dtype, job.weights_only, started, job.advance)


def _say_lost(reader: CheckpointReader, job: _Job, optimizer: str | None) -> None:
    """Say what of a checkpoint its export lacks.

    Args:
        reader: the checkpoint.
        job: the export.
        optimizer: what to call the optimizer's state; ``None`` if it was exported.
    """
    manifest = reader.manifest
    records = manifest.parameters.values()
    scaled = sum((record.learning_rate_multiplier, record.adam_eps_multiplier) != (1.0, 1.0) for record in records)
    left_out = [] if optimizer is None or len(manifest.states) == 1 or job.weights_only else [optimizer]
    left_out += [f"the multipliers of learning rate and eps of {scaled} parameters"] if scaled else []
    _say(job.group, "left out", left_out)
    states = manifest.states if optimizer is None else manifest.states[:1]
    if job.dtype is None and any("float64" in file.states.values() for file in manifest.files.values()):
        _say_rounded(
            job.group, sum(reader.dtype(name, state) == "float64" for name in reader.specs() for state in states)
        )


def _say_rounded(group: Communicator, count: int) -> None:
    _say(group, "rounded to fp32", [f"{count} tensors of float64"] if count else [])


def _say(group: Communicator, what: str, names: Sequence[str]) -> None:
    if names and group.rank == 0:
        typer.echo(f"{what}: {', '.join(names)}")


_MARKS = {
    "manifest.json": "megacore",
    "config.json": "hf",
    "latest_universal": "deepspeed",
    "latest": "deepspeed",
    "*_model_states.pt": "deepspeed",
    "latest_checkpointed_iteration.txt": "megatron",
    "mp_rank_*/model_*rng.pt": "megatron",
}
"""Files by which a format is known."""


def _detected(path: Path) -> str:
    for pattern, kind in _MARKS.items():
        if any(file.is_file() for file in path.glob(pattern)):  # a run's "latest" is a link to a directory
            return kind
    raise ConfigError(
        f"{path}: neither a checkpoint (manifest.json), nor a Hugging Face directory (config.json), nor DeepSpeed's "
        "(latest, *_model_states.pt) or Megatron-LM's (latest_checkpointed_iteration.txt, mp_rank_*)"
    )
