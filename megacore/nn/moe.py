"""placeholder replaced below"""
from __future__ import annotations

from torch import Tensor, nn

from megacore.model_config import Stack
from megacore.nn.kit import Kit


class MixtureOfExperts(nn.Module):
    def __init__(self, kit: Kit, stack: Stack) -> None:
        super().__init__()
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError
