"""Multi-head attention whose heads tensor-parallel ranks share."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from megacore.model_config import Stack
from megacore.nn.attend import Pattern, Scores, attend
from megacore.nn.kit import Kit
from megacore.nn.norm import HeadNorm, InnerNorm
from megacore.nn.packed import Packed
from megacore.nn.positions import Rotary, relative_buckets
from megacore.nn.residual import branch_gain, output_gain
from megacore.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel, on_stream
from megacore.parallel.ulysses import attend_over_ranks
from megacore.params import read, write


class Attention(nn.Module):
    """Self-attention, or cross-attention to a memory: heads are split over the ranks, the output is summed over them.

    Two all-reduces of [tokens, hidden]: one forward (output), one backward (input), as in Megatron-LM; cross-attention
    has another one backward (memory).

    Args:
        kit: what parts are made with.
        site: name of the place, for dropout.
        stack: that the queries belong to.
        pattern: which keys a query may see.
        cross: keys come from a memory, without positions.
    """

    def __init__(self, kit: Kit, site: str, stack: Stack, pattern: Pattern, cross: bool = False) -> None:
        super().__init__()
        config, declare = kit.config, kit.declare
        self.query_weight = declare(write("heads"), write("head_dim"), read("hidden"), initial="normal")
        kv = write("key_value"), write("kv_heads"), write("head_dim")
        self.key_value_weight = declare(*kv, read("hidden"), initial="normal", gain=(1.0, branch_gain(config, stack)))
        self.output_weight = declare(
            write("hidden"), read("heads"), read("head_dim"), initial="normal", gain=output_gain(config, stack)
        )
        self.query_bias = declare(write("heads"), write("head_dim"), initial="zeros") if config.attention_bias else None
        self.key_value_bias = declare(*kv, initial="zeros") if config.attention_bias else None
        self.output_bias = declare(write("hidden"), initial="zeros") if config.linear_bias else None
        self.query_norm = HeadNorm(kit) if config.qk_norm else None
        self.key_norm = HeadNorm(kit) if config.qk_norm else None
        self.inner_norm = InnerNorm(kit, "heads", "head_dim") if config.residual == "sub_norm" else None
        rotary = config.position_embedding.startswith("rotary") and not cross
        self._rotary = Rotary(config, kit.compile) if rotary else None
        self._config, self._grid, self._stack, self._pattern = config, kit.grid, stack, pattern
        self._dropout = kit.attention_dropout(site)

    def forward(
        self,
        x: Tensor,
        queries: Packed,
        memory: Tensor | None = None,
        keys: Packed | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """x: [tokens, hidden] -> [tokens, hidden].

        Args:
            x: this rank's part of the stream.
            queries: the sequences of the stream.
            memory: what cross-attention reads, [memory tokens, hidden].
            keys: the sequences of the memory.
            bias: table of relative biases, [buckets, heads/tp].
        """
        grid, head_dim = self._grid, self._config.head_dim
        x = enter_tensor_parallel(x, grid)
        memory = x if memory is None else enter_tensor_parallel(memory, grid)
        query = F.linear(x, self.query_weight.flatten(0, 1), _flat(self.query_bias)).view(len(x), -1, head_dim)
        key_value = F.linear(memory, self.key_value_weight.flatten(0, 2), _flat(self.key_value_bias))
        key, value = key_value.view(len(memory), 2, -1, head_dim).unbind(1)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self._rotary is not None:
            angles = self._rotary.angles(queries.inner.positions, x.dtype)
            query, key = self._rotary.turn(query, angles), self._rotary.turn(key, angles)
        core = partial(attend, queries=queries, keys=keys or queries, scores=self._scores(query.shape[1], bias))
        context = attend_over_ranks(core, query, key, value, grid).flatten(1)
        if self.inner_norm is not None:
            context = self.inner_norm(context)
        output = leave_tensor_parallel(F.linear(context, self.output_weight.flatten(1)), grid)
        return output if self.output_bias is None else output + on_stream(self.output_bias, grid)

    def _scores(self, heads: int, table: Tensor | None) -> Scores:
        """Describe the scores; after the exchange of tokens for heads, this rank has a part of its ``heads``."""
        grid = self._grid
        mine = heads // grid.ulysses_parallel_size
        first = grid.ulysses_parallel_rank * mine
        bias = None
        if table is not None:
            own, config, stack = table[:, first : first + mine], self._config, self._stack

            def bias(length: int) -> Tensor:
                return own[relative_buckets(length, config, stack, own.device)].permute(2, 0, 1)

        return Scores(
            pattern=self._pattern,
            scale=self._config.score_scale,
            bias=bias,
            dropout=self._dropout if self.training and self._dropout.rate else None,
            first_head=grid.tensor_parallel_rank * heads + first,
        )


def _flat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.flatten()
