"""The feed-forward network whose inner neurons tensor-parallel ranks share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megacore.parallel.collectives import copy_to_tensor_parallel, reduce_from_tensor_parallel
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, read, write


class MLP(nn.Module):
    """Linear, GELU (exact, as in BERT), linear; two all-reduces of [batch, seq, hidden], as in Megatron-LM."""

    def __init__(self, declare: Declare, grid: ParallelGrid) -> None:
        super().__init__()
        self.up_weight = declare(write("ffn"), read("hidden"), initial="normal")
        self.up_bias = declare(write("ffn"), initial="zeros")
        self.down_weight = declare(write("hidden"), read("ffn"), initial="normal")
        self.down_bias = declare(write("hidden"), initial="zeros")
        self._grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, seq, hidden] -> [batch, seq, hidden]."""
        x = copy_to_tensor_parallel(x, self._grid)
        inner = F.gelu(F.linear(x, self.up_weight, self.up_bias))
        return reduce_from_tensor_parallel(F.linear(inner, self.down_weight), self._grid) + self.down_bias
