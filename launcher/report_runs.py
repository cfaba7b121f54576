"""Runs as they were measured: ``metrics.jsonl`` read back, and the figures a growth is judged by."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from megacore.errors import MegacoreError
from megacore.settings import read_yaml


@dataclass(frozen=True)
class Point:
    """One line of ``metrics.jsonl``; ``step``, ``tokens`` and ``flops`` count from the lineage's beginning."""

    step: int
    loss: float
    mlm_loss: float
    nsp_loss: float
    mlm_accuracy: float
    nsp_accuracy: float
    tokens: float
    flops: float
    learning_rate: float = math.nan
    gradient_norm: float = math.nan
    tokens_per_second: float = math.nan


@dataclass(frozen=True)
class Run:
    """A run directory's measurements, by step, and what was run."""

    name: str
    path: Path
    train: Sequence[Point]
    validation: Sequence[Point]
    config: Mapping[str, Any]
    growth: Mapping[str, Any] | None

    @property
    def final_loss(self) -> float:
        """Held-out loss of the last measurement; not a number where there is none."""
        return self.validation[-1].loss if self.validation else math.nan

    @property
    def best(self) -> Point | None:
        """The measurement of the lowest held-out loss."""
        measured = [p for p in self.validation if math.isfinite(p.loss)]
        return min(measured, key=lambda p: p.loss) if measured else None

    @property
    def last(self) -> Point:
        """The last measurement of either split."""
        return max((*self.train, *self.validation), key=lambda p: p.step)


def read_run(path: Path) -> Run:
    """Read a run directory: ``metrics.jsonl``, ``config.yaml`` and, if the run began with a growth, ``growth.json``.

    Raises:
        MegacoreError: a file is missing, empty or damaged; the message names it.
    """
    if not path.is_dir():
        raise MegacoreError(f"{path}: no such run directory")
    points = _read_metrics(path / "metrics.jsonl")
    growth = path / "growth.json"
    return Run(
        name=path.resolve().name,
        path=path,
        train=points["train"],
        validation=points["validation"],
        config=read_yaml(path / "config.yaml"),
        growth=_read_object(growth) if growth.exists() else None,
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise MegacoreError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise MegacoreError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_metrics(path: Path) -> dict[str, list[Point]]:
    """Return the points of each split by step; of a step written twice (a resumed run) the last."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise MegacoreError(f"{path}: no such file; has the run been started?") from None
    except OSError as error:
        raise MegacoreError(f"{path}: cannot be read: {error}") from error
    found: dict[str, dict[int, Point]] = {"train": {}, "validation": {}}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):
                break  # the run was killed while it wrote this line
            raise MegacoreError(f"{where}: not JSON; if a killed run left it, delete this line") from None
        split = record.get("split") if isinstance(record, dict) else None
        if split not in found:
            raise MegacoreError(f"{where}: expected an object with split 'train' or 'validation', got split {split!r}")
        point = _point(record, where)
        found[split][point.step] = point
    if not any(found.values()):
        raise MegacoreError(f"{path}: holds no measurements yet; wait for the run's first log_interval")
    return {split: [points[step] for step in sorted(points)] for split, points in found.items()}


def _point(record: Mapping[str, Any], where: str) -> Point:
    values: dict[str, Any] = {}
    for field in fields(Point):
        value = record.get(field.name)
        if value is None and field.default is not MISSING:
            continue
        if not isinstance(value, (int, float)):
            raise MegacoreError(f"{where}: {field.name} is {value!r}, not a number")
        values[field.name] = int(value) if field.name == "step" else float(value)
    return Point(**values)


def flops_to_reach(points: Iterable[Point], loss: float) -> float | None:
    """Return the FLOPs at which the points first come down to ``loss``, linearly between two; None if they never do.

    Where the very first point is there already, its FLOPs are an upper bound.
    """
    before = None
    for point in points:
        if point.loss <= loss:
            if before is None:
                return point.flops
            share = (before.loss - loss) / (before.loss - point.loss)
            return before.flops + share * (point.flops - before.flops)
        if math.isfinite(point.loss):
            before = point
    return None


def growth_savings(run: Run, reference: Run) -> float | None:
    """Return the share of ``reference``'s FLOPs that ``run`` saves on the way to its final held-out loss.

    Negative if ``run`` needs more; None if it never gets there, or if ``reference`` has no held-out loss.
    """
    if not math.isfinite(reference.final_loss) or not reference.validation[-1].flops:
        return None
    reached = flops_to_reach(run.validation, reference.final_loss)
    return None if reached is None else 1 - reached / reference.validation[-1].flops
