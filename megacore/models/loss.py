"""Losses and hits of a micro-batch, summed."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megacore.axes import shard_bounds
from megacore.model_config import ModelConfig
from megacore.models.batch import ModelBatch
from megacore.models.layers import output_names
from megacore.nn.heads import own_rows
from megacore.nn.packed import Part
from megacore.parallel.grid import ParallelGrid
from megacore.parallel.vocabulary import token_cross_entropy


class LossSums(NamedTuple):
    """Sums over a micro-batch: losses (with gradient), and numbers of right predictions."""

    token_loss: Tensor
    pair_loss: Tensor
    balance_loss: Tensor
    token_correct: Tensor
    pair_correct: Tensor


class Loss:
    """Makes sums out of a model's outputs.

    Args:
        config: of the model.
        grid: under Ulysses, each rank sums over its own tokens.
    """

    def __init__(self, config: ModelConfig, grid: ParallelGrid) -> None:
        self._names, self._grid = output_names(config), grid
        self._first_id = shard_bounds(config.vocab_size, grid.tensor_parallel_rank, grid.tensor_parallel_size)[0]

    def label_values(self, batch: ModelBatch) -> tuple[Tensor, ...]:
        """Return what `sums` needs of a `ModelBatch`: labels, their positions and the stream's length, then pairs'."""
        read = batch.tokens if batch.target_tokens is None else batch.target_tokens
        values: tuple[Tensor, ...] = (batch.labels, batch.label_positions, torch.tensor([read.shape[1]]))
        if "pair_logits" in self._names and batch.pair_labels is not None:
            values += (batch.pair_labels, batch.pair_positions)
        return values

    def sums(self, outputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> LossSums:
        """Sum losses and hits over this rank's labels."""
        named = dict(zip(self._names, outputs, strict=True))
        token_labels, positions, total, *pairs = labels
        logits = named["logits"]
        tokens = token_cross_entropy(logits, self._own(token_labels, positions, total), self._first_id, self._grid)
        zero = tokens.loss.new_zeros(())
        pair_loss, pair_correct = zero, zero
        if pairs:
            pair_labels = self._own(pairs[0], pairs[1], total)
            pair_logits = named["pair_logits"]
            pair_logits = pair_logits if pair_logits.dtype == torch.float64 else pair_logits.float()
            pair_loss = F.cross_entropy(pair_logits, pair_labels, reduction="sum")
            pair_correct = (pair_logits.argmax(dim=-1) == pair_labels).sum()
        balance = named.get("balance", zero)
        return LossSums(tokens.loss.sum(), pair_loss, balance, tokens.correct.sum(), pair_correct)

    def _own(self, labels: Tensor, positions: Tensor, total: Tensor) -> Tensor:
        """Pick the labels whose logits this rank has."""
        if self._grid.ulysses_parallel_size == 1:
            return labels
        start, stop = shard_bounds(int(total), *self._grid.inner_part)
        return labels[own_rows(positions, Part(start, stop, positions, positions))]
