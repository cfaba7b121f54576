"""The feed-forward network as a mixture of experts; the configuration refuses it until DeepSpeed's layer is in."""

from __future__ import annotations

from torch import Tensor, nn

from megacore.model_config import Stack
from megacore.nn.kit import Kit


class MixtureOfExperts(nn.Module):
    """Not usable yet."""

    def __init__(self, kit: Kit, stack: Stack) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [tokens, hidden] -> the same, and the balancing loss."""
        raise NotImplementedError
