"""Multi-head attention whose heads tensor-parallel ranks share."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megacore.config import ModelConfig
from megacore.parallel.collectives import copy_to_tensor_parallel, reduce_from_tensor_parallel
from megacore.parallel.dropout import DropoutKeys
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, read, write


class SelfAttention(nn.Module):
    """Self-attention: heads are split over the ranks, the output is summed over them.

    Two all-reduces of [batch, seq, hidden]: one forward (output), one backward (input), as in Megatron-LM.
    """

    def __init__(self, config: ModelConfig, declare: Declare, grid: ParallelGrid, site: str) -> None:
        super().__init__()
        self.query_weight = declare(write("heads"), write("head_dim"), read("hidden"), initial="normal")
        self.query_bias = declare(write("heads"), write("head_dim"), initial="zeros")
        self.key_value_weight = declare(
            write("key_value"), write("heads"), write("head_dim"), read("hidden"), initial="normal"
        )
        self.key_value_bias = declare(write("key_value"), write("heads"), write("head_dim"), initial="zeros")
        self.output_weight = declare(write("hidden"), read("heads"), read("head_dim"), initial="normal")
        self.output_bias = declare(write("hidden"), initial="zeros")
        self._grid, self._site = grid, site
        self._dropout = config.attention_dropout
        self._positions = config.max_position_embeddings

    def forward(self, x: Tensor, mask: Tensor | None, dropout: DropoutKeys | None) -> Tensor:
        """x: [batch, seq, hidden]; mask: [batch, 1, 1, seq], true where a key may be seen -> [batch, seq, hidden]."""
        batch, seq, hidden = x.shape
        heads, head_dim = self.query_bias.shape
        x = copy_to_tensor_parallel(x, self._grid)
        query = F.linear(x, self.query_weight.view(-1, hidden), self.query_bias.view(-1))
        query = query.view(batch, seq, heads, head_dim).transpose(1, 2)
        key_value = F.linear(x, self.key_value_weight.view(-1, hidden), self.key_value_bias.view(-1))
        key, value = key_value.view(batch, seq, 2, heads, head_dim).permute(2, 0, 3, 1, 4)
        if dropout is None or self._dropout == 0:
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            context = self._attend_with_dropout(query, key, value, mask, dropout)
        context = context.transpose(1, 2).reshape(batch, seq, heads * head_dim)
        output = F.linear(context, self.output_weight.view(hidden, -1))
        return reduce_from_tensor_parallel(output, self._grid) + self.output_bias

    def _attend_with_dropout(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: DropoutKeys
    ) -> Tensor:
        """Attend explicitly: fused kernels draw their masks from the device's state, which depends on the layout."""
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        seq, stride = scores.shape[-1], self._positions
        first, stop = self.query_weight.region[0]
        heads = torch.arange(first, stop, dtype=torch.int32, device=query.device) * (stride * stride)
        position = torch.arange(seq, dtype=torch.int32, device=query.device)
        offsets = (heads, position * stride, position)
        return dropout.drop(scores.softmax(dim=-1), self._dropout, f"{self._site}.probabilities", offsets) @ value
