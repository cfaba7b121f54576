"""Measuring training: sums over a global batch, and where the figures go (JSON lines and TensorBoard)."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from megacore.model_config import Objective, token_head
from megacore.models.batch import ModelBatch
from megacore.models.loss import LossSums
from megacore.parallel.collectives import pipeline_sum, replica_sum
from megacore.parallel.grid import ParallelGrid


@dataclass(frozen=True)
class Sums:
    """Sums of a global batch; a float64 vector in the order of `_ORDER`."""

    values: torch.Tensor

    @classmethod
    def zero(cls, device: torch.device) -> Sums:
        """Return the empty sum."""
        return cls(torch.zeros(len(_ORDER), dtype=torch.float64, device=device))

    @classmethod
    def counted(cls, batches: Sequence[ModelBatch]) -> Sums:
        """Return the counts of a replica's micro-batches, with losses and hits at zero."""
        sums = cls.zero(batches[0].labels.device)
        for batch in batches:
            counts = (len(batch.labels), batch.num_samples, batch.num_tokens, 1)
            sums.values[len(LossSums._fields) :] += torch.tensor(counts, device=sums.values.device)
        return sums

    @classmethod
    def measured(cls, result: LossSums) -> Sums:
        """Return the losses and hits of a micro-batch, with counts at zero."""
        sums = cls.zero(result.token_loss.device)
        sums.values[: len(result)] = torch.stack([part.detach().double() for part in result])
        return sums

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.values + other.values)

    def over_replicas(self, grid: ParallelGrid) -> Sums:
        """Sum over the replicas, and over the parts of the tokens that Ulysses ranks measured."""
        return Sums(replica_sum(self.values, grid))

    def over_stages(self, grid: ParallelGrid) -> Sums:
        """Sum over the pipeline's stages, of which the last one alone measures."""
        return Sums(pipeline_sum(self.values, grid))

    def __getitem__(self, name: str) -> float:
        return float(self.values[_ORDER.index(name)])

    def means(self, objective: Objective) -> dict[str, float]:
        """Return losses and accuracies, under the names they are logged by."""
        labels, samples = max(self["labels"], 1.0), max(self["samples"], 1.0)
        kind = token_head(objective)
        figures = {
            "loss": self["token_loss"] / labels,
            f"{kind}_loss": self["token_loss"] / labels,
            f"{kind}_accuracy": self["token_correct"] / labels,
        }
        if objective == "mlm_nsp":
            figures["nsp_loss"] = self["pair_loss"] / samples
            figures["nsp_accuracy"] = self["pair_correct"] / samples
            figures["loss"] += figures["nsp_loss"]
        if self["balance_loss"]:
            figures["balance_loss"] = self["balance_loss"] / self["micro_batches"]
        return figures


_ORDER = (*LossSums._fields, "labels", "samples", "tokens", "micro_batches")


def memory_gb(device: torch.device) -> float:
    """Return this process's peak memory in GB: of the device where it has its own, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class MetricsLog:
    """Writes figures to ``metrics.jsonl`` and TensorBoard event files of a run directory (on rank 0 only).

    Args:
        directory: of the run.
        first_step: figures of later steps, left by a run that was killed after its last checkpoint, are replaced:
            TensorBoard hides them, and readers of the JSON lines take a step's last line.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        path = directory / "metrics.jsonl"
        _end_last_line(path)
        self._lines = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def write(self, split: str, step: int, figures: dict[str, Any]) -> None:
        """Record the figures of a step.

        Raises:
            OSError: they could not be written to one of the two; lines that failed are tried again with the next.
        """
        try:
            self._lines.write(json.dumps({"split": split, "step": step, **figures}) + "\n")
            self._lines.flush()
        finally:
            for name, value in figures.items():
                self._board.add_scalar(f"{split}/{name}", value, step)
            self._board.flush()

    def close(self) -> None:
        """Flush and close all files.

        Raises:
            OSError: what was still to be written could not be.
        """
        try:
            self._lines.close()
        finally:
            self._board.close()


def _end_last_line(path: Path) -> None:
    """Cut off a line that a killed process left half-written."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)
        os.fsync(stream.fileno())
