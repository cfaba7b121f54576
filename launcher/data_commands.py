"""``megacore data``: from text to pretraining instances."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launcher.bars import byte_bar, count_bar
from megacore.communicator import mpi_or_alone, together

if TYPE_CHECKING:
    from data_pipeline.shards import DatasetManifest

data_app = typer.Typer(
    help="From text to pretraining instances: corpus, tokenizer, build, instances.", no_args_is_help=True
)
_CONFIG = typer.Argument(..., help="YAML file with the keys of the data configuration.", show_default=False)
_OVERRIDES = typer.Argument(None, metavar="[KEY=VALUE]...", help="Keys of the configuration, e.g. vocab_size=8192.")


@data_app.command()
def corpus(
    out: Path = typer.Argument(..., help="The .jsonl file to write.", show_default=False),
    max_mb: float = typer.Option(12.0, min=0.01, help="Keep about so many MB."),
) -> None:
    """Write the embedded corpus: the docstrings of the packages installed here."""
    from data_pipeline.embedded import write_embedded_corpus

    group = mpi_or_alone()
    began = time.perf_counter()
    documents = 0
    with together(group), byte_bar("reading sources", None, enabled=group.rank == 0) as advance:
        if group.rank == 0:
            documents = write_embedded_corpus(out, max_mb, advance)
    if group.rank > 0:
        return
    seconds = time.perf_counter() - began
    typer.echo(f"{out}: {documents:,} documents, {out.stat().st_size / 1e6:.1f} MB, {seconds:.1f} s")


@data_app.command()
def tokenizer(config: Path = _CONFIG, overrides: list[str] = _OVERRIDES) -> None:
    """Train the sentencepiece tokenizer on the corpus; writes OUTPUT_DIR/tokenizer.model."""
    from data_pipeline.build import build_tokenizer
    from data_pipeline.config import DataBuildConfig
    from megacore.settings import load

    group = mpi_or_alone()
    settings = load(DataBuildConfig, config, overrides or ())
    began = time.perf_counter()
    with together(group), byte_bar("reading text", _size(settings.inputs), enabled=group.rank == 0) as advance:
        if group.rank == 0:  # one process trains, also where a script starts all steps alike
            build_tokenizer(settings, advance)
    if group.rank > 0:
        return
    typer.echo(f"{settings.tokenizer_path}: {settings.vocab_size:,} pieces, {time.perf_counter() - began:.1f} s")


@data_app.command()
def build(config: Path = _CONFIG, overrides: list[str] = _OVERRIDES) -> None:
    """Split and tokenise the corpus, alone or under mpirun; writes OUTPUT_DIR/sentences."""
    from data_pipeline.build import build_sentences
    from data_pipeline.config import DataBuildConfig
    from megacore.settings import load

    group = mpi_or_alone()
    settings = load(DataBuildConfig, config, overrides or ())
    began = time.perf_counter()
    total = _size(settings.inputs)
    with byte_bar("tokenising (rank 0)", total / group.size, enabled=group.rank == 0) as advance:
        manifest = build_sentences(settings, group, advance)
    if group.rank > 0:
        return
    if manifest is None:
        typer.echo(f"{settings.sentences_path}: already built")
        return
    seconds = time.perf_counter() - began
    counts = ", ".join(f"{manifest.total(name):,} {name}" for name in ("documents", "sentences", "tokens"))
    speed = f"{total / 1e6 / seconds:.1f} MB/s with {group.size} ranks"
    typer.echo(f"{settings.sentences_path}: {counts}, {seconds:.1f} s, {speed}")


@data_app.command()
def instances(config: Path = _CONFIG, overrides: list[str] = _OVERRIDES) -> None:
    """Make the instances of an objective, alone or under mpirun; writes OUTPUT_DIR/instances/{train,validation}.

    objective=mlm_nsp (default) for MLM with or without NSP, lm for causal and prefix LM, span_corruption for
    encoder-decoder models.
    """
    from data_pipeline.build import SPLITS
    from data_pipeline.config import DataBuildConfig
    from data_pipeline.instances import build_instances
    from megacore.settings import load

    group = mpi_or_alone()
    settings = load(DataBuildConfig, config, overrides or ())
    for split in SPLITS:
        if split == "validation" and settings.validation_fraction == 0:
            continue
        began = time.perf_counter()
        with count_bar(f"{split} instances (rank 0)", enabled=group.rank == 0) as advance:
            manifest = build_instances(settings, split, group, advance)
        if group.rank > 0:
            continue
        path = settings.instances_path(split)
        if manifest is None:
            typer.echo(f"{path}: already built")
            continue
        seconds = time.perf_counter() - began
        typer.echo(f"{path}: {_summary(manifest)}, {seconds:.1f} s with {group.size} ranks")


def _summary(manifest: DatasetManifest) -> str:
    """Say what was made; the shares are of the objective's own."""
    words = [f"{manifest.total(name):,} {name}" for name in ("instances", "tokens")]
    shares = (
        ("masked", "tokens", "masked"),
        ("random_next", "instances", "random next"),
        ("noise", "corpus_tokens", "of the text taken out"),
    )
    for part, whole, what in shares:
        if manifest.total(part):
            words.append(f"{manifest.total(part) / manifest.total(whole):.1%} {what}")
    return ", ".join(words)


def _size(paths: tuple[Path, ...]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())
