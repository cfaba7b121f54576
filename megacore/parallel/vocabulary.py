"""Embedding and cross-entropy over a vocabulary that tensor-parallel ranks share."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megacore.axes import shard_bounds
from megacore.parallel.collectives import (
    leave_tensor_parallel,
    reduce_from_tensor_parallel,
    tensor_parallel_max,
)
from megacore.parallel.grid import ParallelGrid


def embed_tokens(ids: Tensor, table: Tensor, first: int, grid: ParallelGrid) -> Tensor:
    """Look up rows of a table whose rows are shared. ids: [tokens], table: [vocab/tp, hidden] -> [.., hidden].

    Args:
        ids: token ids.
        table: this rank's rows.
        first: the id of the table's first row.
        grid: one all-reduce of the output forward, none backward; with sequence parallelism a reduce-scatter forward,
            an all-gather backward, and the result is this rank's part of the tokens.
    """
    if grid.tensor_parallel_size == 1:
        return F.embedding(ids, table)
    local = ids - first
    foreign = (local < 0) | (local >= table.shape[0])
    rows = F.embedding(local.masked_fill(foreign, 0), table)
    return leave_tensor_parallel(rows.masked_fill(foreign.unsqueeze(-1), 0), grid)


def whole_logits(logits: Tensor, vocab_size: int, grid: ParallelGrid) -> Tensor:
    """Put shared logits together. logits: [n, vocab/tp] -> [n, vocab]; one all-reduce of the result."""
    if grid.tensor_parallel_size == 1:
        return logits
    whole = logits.new_zeros(len(logits), vocab_size)
    whole[:, slice(*shard_bounds(vocab_size, grid.tensor_parallel_rank, grid.tensor_parallel_size))] = logits
    return reduce_from_tensor_parallel(whole, grid)


class TokenLoss(NamedTuple):
    """Loss of each token [n], and whether its target has the highest logit [n]."""

    loss: Tensor
    correct: Tensor


def token_cross_entropy(logits: Tensor, targets: Tensor, first: int, grid: ParallelGrid) -> TokenLoss:
    """Cross-entropy over shared logits. logits: [n, vocab/tp], targets: [n] global ids.

    Three all-reduces of n numbers forward (maximum, sum of exponentials, target's logit), none backward: the
    gradient softmax - onehot needs this rank's logits only.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if grid.tensor_parallel_size == 1:
        with torch.no_grad():
            target = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            correct = target >= logits.max(dim=-1).values
        return TokenLoss(F.cross_entropy(logits, targets, reduction="none"), correct)
    highest = tensor_parallel_max(logits.max(dim=-1).values, grid)
    shifted = logits - highest.unsqueeze(-1)
    log_sum = reduce_from_tensor_parallel(shifted.exp().sum(dim=-1), grid).log()
    local = targets - first
    foreign = (local < 0) | (local >= logits.shape[-1])
    own = shifted.gather(-1, local.masked_fill(foreign, 0).unsqueeze(-1)).squeeze(-1)
    target = reduce_from_tensor_parallel(own.masked_fill(foreign, 0), grid)
    return TokenLoss(log_sum - target, (target >= 0).detach())
