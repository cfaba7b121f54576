"""``megacore demo``: the whole job on one machine, with the same commands a user would type."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from launcher.report import summary_table, write_report
from launcher.report_runs import growth_savings, read_run
from launcher.start import deepspeed_command, megacore_command, mpi_command
from megacore.errors import ConfigError, MegacoreError
from megacore.settings import parse_yaml
from megacore.training.runs import checkpoints

_ROOT = Path(__file__).resolve().parent.parent
_RECIPE = _ROOT / "recipes" / "demo"
_MARKER = ".megacore-demo"
_RANKS = 2
_FIRST_STEPS, _LAST_STEPS = 20, 100
_GROWTH = ("hidden_size=128", "num_attention_heads=4", "intermediate_size=512", "tensor_parallel_size=2")


def run_demo(directory: Path, text: Path | None) -> None:
    """Run text → small model → growth → large model (and the large model from scratch) → report.

    Args:
        directory: where everything is written; what an earlier demo left there is removed.
        text: a .txt or .jsonl file instead of the embedded corpus.

    Raises:
        MegacoreError: a step failed, or ``directory`` holds something else.
    """
    if text is not None and not text.is_file():
        raise ConfigError(f"{text}: no such file")
    if text is not None and text.resolve().is_relative_to(directory.resolve()):
        raise ConfigError(f"{text} lies in {directory}, which the demo empties; move it elsewhere")
    _prepare(directory)
    steps = _Steps()
    corpus = text or directory / "corpus.jsonl"
    inputs = f"inputs={json.dumps([str(corpus)])}"
    data = (_RECIPE / "data.yaml", inputs, _setting("output_dir", directory / "data"))
    if text is None:
        steps.run("embedded corpus", megacore_command("data", "corpus", corpus))
    steps.run("tokenizer", megacore_command("data", "tokenizer", *data))
    steps.run("sentences, 2 ranks", mpi_command(_RANKS, "data", "build", *data))
    steps.run("instances, 2 ranks", mpi_command(_RANKS, "data", "instances", *data))

    small, grown, scratch = (directory / name for name in ("small", "grown", "scratch"))
    steps.run("small model, TP 2", _train(directory, "small.yaml", small))
    source, target = checkpoints(small)[-1], directory / "grown-checkpoint"
    facts, proof = directory / "growth-facts.json", directory / "growth-proof.json"
    steps.run("growth, 2 ranks", mpi_command(_RANKS, "grow", source, target, *_GROWTH, "--json", facts))
    against = ("--against", source, "--data", directory / "data" / "instances" / "validation")
    steps.run("verification", megacore_command("verify", target, *against, "--json", proof))
    grown.mkdir()
    growth = json.loads(facts.read_text()) | {"verification": json.loads(proof.read_text())}
    (grown / "growth.json").write_text(json.dumps(growth, indent=1) + "\n", encoding="utf-8")
    steps.run("grown model, DP 2", _train(directory, "large.yaml", grown, _setting("initial_checkpoint", target)))
    steps.run("from scratch, DP 2", _train(directory, "large.yaml", scratch, "warmup_steps=100"))

    runs = [read_run(path) for path in (small, grown, scratch)]
    page = directory / "report.html"
    write_report(runs, page)
    console = Console(highlight=False)
    console.print(steps.table())
    console.print(summary_table(runs))
    _print_findings(console, directory)
    console.print(f"report: {page}   TensorBoard: tensorboard --logdir {directory}", soft_wrap=True)


def _prepare(directory: Path) -> None:
    if directory.exists() and any(directory.iterdir()) and not (directory / _MARKER).exists():
        raise ConfigError(f"{directory} is not empty and not from a demo; name another directory")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / _MARKER).touch()


def _train(directory: Path, recipe: str, run: Path, *more: str) -> list[str]:
    instances = directory / "data" / "instances"
    return deepspeed_command(
        _RANKS,
        "train",
        _RECIPE / recipe,
        _setting("output_dir", run),
        _setting("train_data", instances / "train"),
        _setting("validation_data", instances / "validation"),
        _setting("deepspeed_config", _ROOT / "ds_configs" / "zero1.json"),
        *more,
    )


def _setting(key: str, path: Path) -> str:
    """Write a ``key=value`` word; a path that YAML would not read as itself is quoted."""
    text = str(path)
    try:
        plain = parse_yaml(text) == text
    except YAMLError:
        plain = False
    return f"{key}={text if plain else json.dumps(text)}"


class _Steps:
    """Runs commands, shows them, and keeps how long each took."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._seconds: dict[str, float] = {}

    def run(self, title: str, command: list[str]) -> None:
        self._console.rule(title)
        self._console.print(f"$ {shlex.join(command)}", style="dim", markup=False)
        began = time.perf_counter()
        # One thread per process: ranks would fight over the cores.
        code = subprocess.call(command, cwd=Path.cwd(), env={"OMP_NUM_THREADS": "1", **os.environ})
        self._seconds[title] = time.perf_counter() - began
        if code:
            raise MegacoreError(f"{title} failed with exit code {code}; its messages are above")

    def table(self) -> Table:
        table = Table("step", "seconds", title="time")
        for title, seconds in self._seconds.items():
            table.add_row(title, f"{seconds:.1f}")
        table.add_row("all", f"{sum(self._seconds.values()):.1f}", style="bold")
        return table


def _print_findings(console: Console, directory: Path) -> None:
    """Print what the demo is about: is the growth lossless, does training go on, does it pay?"""
    small, grown, scratch = (read_run(directory / name) for name in ("small", "grown", "scratch"))
    growth: dict[str, Any] = json.loads((directory / "grown" / "growth.json").read_text())
    proof = growth["verification"]
    console.print(
        f"growth error ({proof['dtype']}): relative |Δlogit| {proof['mlm_relative_error']:.1e} (MLM), "
        f"{proof['nsp_relative_error']:.1e} (NSP)"
    )
    before, after = small.validation[-1].loss, grown.validation[0].loss
    console.print(
        f"held-out loss: small at its end {before:.5f}, grown at its step 0 {after:.5f} ({after - before:+.1e})"
    )
    last = statistics.fmean(point.loss for point in small.train[-_LAST_STEPS:])
    first = statistics.fmean(point.loss for point in grown.train[:_FIRST_STEPS])
    console.print(
        f"training loss: small's last {_LAST_STEPS} steps {last:.4f}, grown's first {_FIRST_STEPS} {first:.4f} "
        f"({first - last:+.4f})"
    )
    saved = growth_savings(grown, scratch)
    if saved is None:
        console.print("the grown model did not reach the final held-out loss of the one from scratch")
    else:
        console.print(
            f"FLOPs to reach the final held-out loss from scratch, the small model's counted: "
            f"{abs(saved):.0%} {'fewer' if saved >= 0 else 'more'}"
        )
