"""One Transformer layer."""

from __future__ import annotations

from torch import Tensor, nn

from megacore.model_config import Stack
from megacore.nn.attend import Pattern
from megacore.nn.attention import Attention
from megacore.nn.kit import Kit
from megacore.nn.mlp import MLP
from megacore.nn.moe import MixtureOfExperts
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
        self.mlp = MLP(kit, stack)
        self.mlp_residual = Residual(kit, f"{site}.mlp", stack)
        self._grid = kit.grid

    def forward(self, x: Tensor, tokens: Tensor, sequences: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: [tokens, hidden] -> [tokens, hidden]; tokens and sequences describe the micro-batch (`packed`)."""
        where = packed(tokens, sequences, self._grid)
        x = self.attention_residual(x, lambda h: self.attention(h, where, bias=bias), where)
        output: Tensor = self.mlp_residual(x, self.mlp, where)
        return output


class CrossBlock(nn.Module):
    """A decoder's layer that also attends to the encoder's output."""

    def __init__(self, kit: Kit, site: str) -> None:
        super().__init__()
        self.attention = Attention(kit, f"{site}.attention", "decoder", "causal")
        self.attention_residual = Residual(kit, f"{site}.attention", "decoder")
        self.cross_attention = Attention(kit, f"{site}.cross_attention", "decoder", "bidirectional", cross=True)
        self.cross_attention_residual = Residual(kit, f"{site}.cross_attention", "decoder")
        self.mlp = MLP(kit, "decoder")
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
    ) -> Tensor:
        """y: [target tokens, hidden], memory: [tokens, hidden] -> [target tokens, hidden]."""
        where = packed(target_tokens, target_sequences, self._grid)
        read: Packed = packed(tokens, sequences, self._grid)
        y = self.attention_residual(y, lambda h: self.attention(h, where, bias=bias), where)
        y = self.cross_attention_residual(y, lambda h: self.cross_attention(h, where, memory, read), where)
        output: Tensor = self.mlp_residual(y, self.mlp, where)
        return output


class ExpertBlock(nn.Module):
    """A layer whose feed-forward network is a mixture of experts; its load-balancing loss travels with the stream."""

    def __init__(self, kit: Kit, site: str, stack: Stack) -> None:
        super().__init__()
        self.attention = Attention(kit, f"{site}.attention", stack, pattern_of(kit, stack))
        self.attention_residual = Residual(kit, f"{site}.attention", stack)
        self.experts = MixtureOfExperts(kit, stack)
        self.mlp_residual = Residual(kit, f"{site}.mlp", stack)
        self._grid = kit.grid

    def forward(
        self, x: Tensor, tokens: Tensor, sequences: Tensor, balance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: [tokens, hidden], balance: the sum of the balancing losses of the layers before -> both."""
        where = packed(tokens, sequences, self._grid)
        x = self.attention_residual(x, lambda h: self.attention(h, where), where)
        losses: list[Tensor] = []

        def branch(h: Tensor) -> Tensor:
            output: Tensor
            output, loss = self.experts(h)
            losses.append(loss)
            return output

        x = self.mlp_residual(x, branch, where)
        return x, losses[0] if balance is None else balance + losses[0]
