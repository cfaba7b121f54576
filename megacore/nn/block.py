"""One Transformer layer."""

from __future__ import annotations

from torch import Tensor, nn

from megacore.config import ModelConfig
from megacore.nn.attention import SelfAttention
from megacore.nn.mlp import MLP
from megacore.nn.norm import LayerNorm
from megacore.nn.residual import HiddenDropout
from megacore.parallel.dropout import DropoutKeys
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare


class Block(nn.Module):
    """Attention and feed-forward, each followed by dropout, the residual sum and a norm (post-LN, as in BERT)."""

    def __init__(self, config: ModelConfig, declare: Declare, grid: ParallelGrid, site: str) -> None:
        super().__init__()
        self.attention = SelfAttention(config, declare, grid, f"{site}.attention")
        self.attention_norm = LayerNorm(declare, "hidden", config.layer_norm_eps)
        self.mlp = MLP(declare, grid)
        self.mlp_norm = LayerNorm(declare, "hidden", config.layer_norm_eps)
        self._attention_dropout = HiddenDropout(config.hidden_dropout, f"{site}.attention")
        self._mlp_dropout = HiddenDropout(config.hidden_dropout, f"{site}.mlp")

    def forward(self, x: Tensor, mask: Tensor | None, dropout: DropoutKeys | None) -> Tensor:
        """x: [batch, seq, hidden]; mask: [batch, 1, 1, seq] -> [batch, seq, hidden]."""
        x = self.attention_norm(x + self._attention_dropout(self.attention(x, mask, dropout), dropout))
        output: Tensor = self.mlp_norm(x + self._mlp_dropout(self.mlp(x), dropout))
        return output
