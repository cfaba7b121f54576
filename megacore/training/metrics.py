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

from megacore.errors import MegacoreError
from megacore.models.bert import BertSums
from megacore.parallel.collectives import data_parallel_sum
from megacore.parallel.grid import ParallelGrid
from megacore.publish import os_errors
from megacore.training.batches import DeviceBatch


@dataclass(frozen=True)
class Sums:
    """Sums of a global batch; a vector [7] float64: two losses, two hit counts, masked, samples, tokens."""

    values: torch.Tensor

    @classmethod
    def zero(cls, device: torch.device) -> Sums:
        """Return the empty sum."""
        return cls(torch.zeros(7, dtype=torch.float64, device=device))

    @classmethod
    def counted(cls, batches: Sequence[DeviceBatch]) -> Sums:
        """Return the counts of a replica's micro-batches, with losses and hits at zero."""
        sums = cls.zero(batches[0].masked_labels.device)
        for batch in batches:
            sums.values[4:] += _counts(batch)
        return sums

    def plus(self, result: BertSums, batch: DeviceBatch) -> Sums:
        """Add a micro-batch."""
        parts = (result.mlm_loss, result.nsp_loss, result.mlm_correct, result.nsp_correct)
        measured = torch.stack([part.detach().double() for part in parts])
        return Sums(self.values + torch.cat([measured, _counts(batch)]))

    def reduced(self, grid: ParallelGrid) -> Sums:
        """Sum over the replicas."""
        return Sums(data_parallel_sum(self.values, grid))

    @property
    def masked(self) -> float:
        """Number of masked positions."""
        return float(self.values[4])

    @property
    def samples(self) -> float:
        """Number of samples."""
        return float(self.values[5])

    @property
    def tokens(self) -> int:
        """Number of tokens, without padding."""
        return int(self.values[6])

    def means(self) -> dict[str, float]:
        """Return losses and accuracies, under the names they are logged by."""
        mlm_loss, nsp_loss, mlm_correct, nsp_correct, masked, samples, _ = self.values.tolist()
        masked, samples = max(masked, 1.0), max(samples, 1.0)
        return {
            "loss": mlm_loss / masked + nsp_loss / samples,
            "mlm_loss": mlm_loss / masked,
            "nsp_loss": nsp_loss / samples,
            "mlm_accuracy": mlm_correct / masked,
            "nsp_accuracy": nsp_correct / samples,
        }


def _counts(batch: DeviceBatch) -> torch.Tensor:
    labels = batch.masked_labels
    counts = (len(labels), len(batch.next_sentence_labels), batch.tokens)
    return torch.tensor(counts, dtype=torch.float64, device=labels.device)


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
        self._directory = directory
        path = directory / "metrics.jsonl"
        _end_last_line(path)
        self._lines = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=first_step)

    def write(self, split: str, step: int, figures: dict[str, Any]) -> None:
        """Record the figures of a step."""
        with os_errors(self._directory, MegacoreError):
            self._lines.write(json.dumps({"split": split, "step": step, **figures}) + "\n")
            self._lines.flush()
            for name, value in figures.items():
                self._board.add_scalar(f"{split}/{name}", value, step)
            self._board.flush()

    def close(self) -> None:
        """Flush and close all files."""
        self._lines.close()
        self._board.close()


def _end_last_line(path: Path) -> None:
    """Cut off a line that a killed process left half-written."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        content = stream.read()
        stream.truncate(content.rfind(b"\n") + 1)
        os.fsync(stream.fileno())
