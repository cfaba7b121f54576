"""How a layer's output joins the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megacore.parallel.dropout import DropoutKeys


class HiddenDropout(nn.Module):
    """Dropout on the residual stream; the same on all tensor-parallel ranks, which all hold the whole stream."""

    def __init__(self, rate: float, site: str) -> None:
        super().__init__()
        self._rate, self._site = rate, site

    def forward(self, x: Tensor, dropout: DropoutKeys | None) -> Tensor:
        """x: [batch, seq, hidden] -> [batch, seq, hidden]; ``None`` keeps everything (evaluation)."""
        if dropout is None or self._rate == 0:
            return x
        _, seq, hidden = x.shape
        position = torch.arange(seq, dtype=torch.int32, device=x.device) * hidden
        channel = torch.arange(hidden, dtype=torch.int32, device=x.device)
        return dropout.drop(x, self._rate, self._site, (position, channel))
