"""Stages of training for the study of growth, each a directory made by megacore's own commands.

A stage that is complete is skipped and an interrupted one goes on, so a study may be stopped at any time and started
again with the same command.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from launcher.start import megacore_command
from megacore.checkpoint.files import plan_files
from megacore.checkpoint.manifest import Layout, parameter_records
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import write_checkpoint
from megacore.communicator import Alone
from megacore.model_config import ModelConfig
from megacore.models.transformer import declarations
from megacore.settings import validated
from megacore.specs import Region
from megacore.training.runs import checkpoint_path

ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")
_BEGAN = time.monotonic()
_SPEAKING = threading.Lock()


@dataclass(frozen=True)
class Point:
    """A measurement: held-out loss, and what the whole path to it cost (the small model's training included)."""

    loss: float
    flops: float
    tokens: float


@dataclass(frozen=True)
class Origin:
    """A checkpoint to go on from, with its step."""

    checkpoint: Path
    step: int


@dataclass(frozen=True)
class Line:
    """A model trained at a constant learning rate, and branches of it that decay to zero.

    A loss at a constant learning rate cannot be compared with the end of a schedule. So every budget is measured by a
    branch of its own, which leaves the trunk when ``decay`` of the budget is left.

    Args:
        directory: of the line's stages.
        model: configuration.
        training: what all stages have in common (batch, seed, optimizer).
        data: directories of the instances.
        rate: the peak of the learning rate.
        decay: share of a budget over which the learning rate falls.
        warmup: steps, from the line's beginning.
        origin: where the line begins; ``None``: at random weights.
    """

    directory: Path
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    data: Mapping[str, str]
    rate: float
    decay: float
    warmup: int = 0
    origin: Origin | None = None

    def leave(self, budget: int) -> int:
        """Return the step (of this line) at which the branch of a budget leaves the trunk."""
        return budget - round(self.decay * budget)

    def trunk(self, steps: Sequence[int]) -> dict[int, Origin]:
        """Train on through all of ``steps`` (counted from the line's beginning); return the checkpoints there."""
        reached, here, at = {}, self.origin, 0
        for step in sorted(set(steps)):
            here = self._stage(f"trunk-{step:05d}", here, step - at, warmup_steps=self.warmup if at == 0 else 0)
            reached[step], at = here, step
        return reached

    def branches(self, budgets: Sequence[int], wanted: Sequence[int] | None = None) -> dict[int, Point]:
        """Measure budgets (all by default) of those that the trunk is cut for."""
        wanted = budgets if wanted is None else wanted
        trunk = self.trunk([self.leave(budget) for budget in budgets if budget <= max(wanted)])
        points = {}
        for budget in wanted:
            name, steps = f"end-{budget:05d}", budget - self.leave(budget)
            self._stage(name, trunk[self.leave(budget)], steps, decay_steps=steps)
            points[budget] = last_point(self.directory / name)
        return points

    def _stage(self, name: str, origin: Origin | None, steps: int, **schedule: int) -> Origin:
        run = self.directory / name
        step = (origin.step if origin else 0) + steps
        end = Origin(checkpoint_path(run, step), step)
        if end.checkpoint.exists():
            return end
        training = {
            **self.training,
            "output_dir": str(run),
            "initial_checkpoint": str(origin.checkpoint) if origin else None,
            "deepspeed_config": str(ROOT / "ds_configs" / "zero1.json"),
            "train_steps": steps,
            "learning_rate": self.rate,
            "eval_interval": 1_000_000_000,  # the first and the last step are always measured
            "save_interval": max(100, steps // 4),
            "keep_last": 1,
            **schedule,
        }
        run.mkdir(parents=True, exist_ok=True)
        config = run / "stage.yaml"
        config.write_text(yaml.safe_dump({"model": dict(self.model), "training": training, "data": dict(self.data)}))
        execute(run / "train.log", "train", config)
        point = last_point(run)
        say(f"{run}: step {end.step}, held-out loss {point.loss:.4f}, {point.flops:.3g} FLOPs")
        return end


def last_point(run: Path) -> Point:
    """Return a run's last held-out measurement."""
    return _points(run)[-1]


def first_point(run: Path) -> Point:
    """Return a run's first held-out measurement: of what it began from."""
    return _points(run)[0]


def _points(run: Path) -> list[Point]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [Point(line["loss"], line["flops"], line["tokens"]) for line in lines if line["split"] == "validation"]


def grown(origin: Origin, target: Path, words: Sequence[str]) -> Origin:
    """Grow a checkpoint with ``megacore grow``; ``words`` are its sizes and options."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        execute(target.parent / "grow.log", "grow", origin.checkpoint, target, *words)
    return replace(origin, checkpoint=target)


def stacked(origin: Origin, target: Path, num_hidden_layers: int) -> Origin:
    """Repeat a checkpoint's stack of layers, as G_stack does (Du et al. 2024), weights and optimizer.

    What the model computes changes: this is what a lossless growth is compared with.
    """
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        reader = CheckpointReader(origin.checkpoint)
        source = reader.manifest
        model = validated(ModelConfig, source.model.model_dump() | {"num_hidden_layers": num_hidden_layers})
        specs = declarations(model)

        def origin_of(name: str) -> str:
            parts = name.split(".")
            if parts[0] == "layers":
                parts[1] = str(int(parts[1]) % source.model.num_hidden_layers)
            return ".".join(parts)

        def dtype_of(name: str, state: str) -> str:
            return reader.dtype(origin_of(name), state)

        def box_of(name: str, state: str, region: Region) -> Any:
            return reader.read_stored(origin_of(name), state, region)

        manifest = source.model_copy(
            update={
                "model": model,
                "layout": Layout(),
                "parameters": parameter_records(specs, dict.fromkeys(specs, (1.0, 1.0))),
                "files": {},
            }
        )
        write_checkpoint(target, Alone(), plan_files(specs, source.states, Layout(), dtype_of, box_of), manifest)
    return replace(origin, checkpoint=target)


def execute(log: Path, *words: str | Path) -> None:
    """Run a ``megacore`` command with one thread; what it prints goes to ``log``.

    Raises:
        SystemExit: it failed.
    """
    command = megacore_command(*words)
    # Stages run side by side: more threads would fight over the cores.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("a", encoding="utf-8") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        code = subprocess.call(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    if code:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
        raise SystemExit(f"megacore {' '.join(map(str, words))} failed with exit code {code} (see {log}):\n{tail}")


def side_by_side(tasks: Sequence[Callable[[], T]], jobs: int) -> list[T]:
    """Run tasks, ``jobs`` at a time, in order; when one fails, none is begun any more."""
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def say(text: str) -> None:
    """Print a line with the time since the start."""
    with _SPEAKING:
        print(f"[{(time.monotonic() - _BEGAN) / 60:6.1f} min] {text}", flush=True)
