"""Long sequences over ranks that exchange tokens for heads in attention (DeepSpeed-Ulysses, Jacobs et al. 2023).

Outside attention each rank holds its part of a micro-batch's tokens and all of its heads; inside, all tokens and its
part of the heads. Per layer: one all-to-all each of queries, keys, values and output, and as many backward.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megacore.parallel.grid import ParallelGrid

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention over whole sequences. query: [tokens, heads, head_dim], key, value: [tokens, kv_heads, head_dim]."""


class _Local(nn.Module):
    """An attention function with the batch dim that DeepSpeed wants."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend = attend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self._attend(query[0], key[0], value[0]).unsqueeze(0)


def attend_over_ranks(attend: Attend, query: Tensor, key: Tensor, value: Tensor, grid: ParallelGrid) -> Tensor:
    """Call ``attend`` with all tokens and this rank's part of the heads; return this rank's tokens with all heads.

    query: [tokens/ranks, heads, head_dim] -> [tokens/ranks, heads, head_dim]; key and value may have fewer heads.
    """
    if grid.ulysses_parallel_size == 1:
        return attend(query, key, value)
    from deepspeed.sequence.layer import DistributedAttention  # here: commands that only read should start quickly

    if key.shape[1] % grid.ulysses_parallel_size:  # too few key heads to share: every query head gets its own
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    exchange = DistributedAttention(_Local(attend), grid.ulysses_parallel_group, scatter_idx=2, gather_idx=1)
    output: Tensor = exchange(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), 0)
    return output[0]
