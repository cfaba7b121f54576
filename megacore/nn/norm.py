"""Layer normalisation with declared gain and bias."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megacore.params import Declare, Role


class LayerNorm(nn.Module):
    """Layer normalisation over the last dim (Ba et al. 2016).

    Args:
        declare: makes the parameters.
        axis: name of the normalised axis.
        eps: added to the variance.
        role: ``READ`` where the output is contracted with another parameter that stays as it is when the axis
            grows (the MLM head's norm, before the tied word table): the copies then share gain and bias.
    """

    def __init__(self, declare: Declare, axis: str, eps: float, role: Role = Role.WRITE) -> None:
        super().__init__()
        self.weight = declare((axis, role), initial="ones")
        self.bias = declare((axis, role), initial="zeros")
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] -> [..., size]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self._eps)
