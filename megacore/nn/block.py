"""One Transformer layer."""

from __future__ import annotations

from torch import Tensor, nn

from megacore.model_config import Stack
from megacore.nn.attend import Pattern
from megacore.nn.attention import Attention
from megacore.nn.kit import Kit
from megacore.nn.moe import feed_forward, with_balance
from megacore.nn.packed import Packed, packed
from megacore.nn.residual import Residual


def pattern_of(kit: Kit, stack: Stack) -> Pattern:
    """Return which keys a token's query may see in self-attention."""
    if stack == "encoder":
        return "bidirectional"
    return "prefix" if kit.config.objective == "prefix_lm" else "causal"


class Block(nn.Module):
    """Self-attention and feed-forward network, each a branch of the residual stream.

    Args:
        kit: what parts are made with.
        site: name of the place, for dropout.
        stack: which stack of the model this is a layer of.
    """

    def __init__(self, kit: Kit, site: str, stack: Stack) -> None:
        super().__init__()
        self.attention = Attention(kit, f"{site}.attention", stack, pattern_of(kit, stack))
        self.attention_residual = Residual(kit, f"{site}.attention", stack)
        self.mlp = feed_forward(kit, stack)
        self.mlp_residual = Residual(kit, f"{site}.mlp", stack)
        self._grid = kit.grid

    def forward(
        self, x: Tensor, tokens: Tensor, sequences: Tensor, bias: Tensor | None = None, balance: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x: [tokens, hidden] -> [tokens, hidden], and the balancing loss so far where there are experts.

        tokens and sequences describe the micro-batch (`packed`).
        """
        where = packed(tokens, sequences, self._grid)
        x = self.attention_residual(x, lambda h: self.attention(h, where, bias=bias), where)
        return with_balance(self.mlp_residual(x, self.mlp, where), self.mlp, balance)


class CrossBlock(nn.Module):
    """A decoder's layer that also attends to the encoder's output."""

    def __init__(self, kit: Kit, site: str) -> None:
        super().__init__()
        self.attention = Attention(kit, f"{site}.attention", "decoder", "causal")
        self.attention_residual = Residual(kit, f"{site}.attention", "decoder")
        self.cross_attention = Attention(kit, f"{site}.cross_attention", "decoder", "bidirectional", cross=True)
        self.cross_attention_residual = Residual(kit, f"{site}.cross_attention", "decoder")
        self.mlp = feed_forward(kit, "decoder")
        self.mlp_residual = Residual(kit, f"{site}.mlp", "decoder")
        self._grid = kit.grid

    def forward(
        self,
        y: Tensor,
        memory: Tensor,
        target_tokens: Tensor,
        target_sequences: Tensor,
        tokens: Tensor,
        sequences: Tensor,
        bias: Tensor | None = None,
        balance: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """y: [target tokens, hidden], memory: [tokens, hidden] -> as `Block`, for the target."""
        where = packed(target_tokens, target_sequences, self._grid)
        read: Packed = packed(tokens, sequences, self._grid)
        y = self.attention_residual(y, lambda h: self.attention(h, where, bias=bias), where)
        y = self.cross_attention_residual(y, lambda h: self.cross_attention(h, where, memory, read), where)
        return with_balance(self.mlp_residual(y, self.mlp, where), self.mlp, balance)
