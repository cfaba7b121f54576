"""Dropout whose masks depend on (seed, site, sample, position) alone.

So every layout drops the same entries: a rank computes just its part of the mask, and a sample is treated alike
whichever replica, micro-batch or place in a packed batch it falls into. The masks come from 32-bit mixing functions
applied to counters, in plain tensor operations that run on any device, and that activation checkpointing repeats
without any saved state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacore.random import stream_key


def _mix(x: Tensor) -> Tensor:
    """Mix 32-bit integers bijectively (multiply and xor-shift; the constants have low bias, Wellons 2018)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x21F0AAAD
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x2CA5D269  # 0xd35a2d97 as a signed number
    return x ^ ((x >> 15) & 0x1FFFF)


def _signed(bits: int) -> int:
    """Read the low 32 bits as a signed number, as torch's int32 wants it."""
    return (bits & 0xFFFFFFFF) - (1 << 32 if bits & 0x80000000 else 0)


def _range(start: int, stop: int, device: torch.device) -> Tensor:
    """Return the mixed numbers of [start, stop)."""
    return _mix(torch.arange(start, stop, dtype=torch.int32, device=device))


@dataclass(frozen=True)
class Dropout:
    """Dropout at one place in the model.

    Args:
        rate: probability of zero.
        seed: of the run.
        site: name of the place.
    """

    rate: float
    seed: int
    site: str

    def stream(self, x: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
        """Drop entries of a stream.

        Args:
            x: [tokens, hidden].
            samples: [tokens] int64, the global number of each token's sample: no two steps share one.
            positions: [tokens] int64, the token's place in its sequence.
        """
        row = _mix(self._keys(samples) ^ positions.to(torch.int32)).unsqueeze(-1)
        return self._drop(x, row ^ _range(0, x.shape[-1], x.device))

    def probabilities(self, p: Tensor, samples: Tensor, first_head: int) -> Tensor:
        """Drop attention probabilities. p: [sequences, heads, queries, keys], samples: [sequences] int64."""
        heads, queries, keys = p.shape[1:]
        row = self._keys(samples).view(-1, 1) ^ _range(first_head, first_head + heads, p.device)
        row = _mix(row).unsqueeze(-1) ^ _range(0, queries, p.device)
        return self._drop(p, _mix(row).unsqueeze(-1) ^ _range(0, keys, p.device))

    def _keys(self, samples: Tensor) -> Tensor:
        key = stream_key(self.seed, "dropout", self.site)
        low = (samples & 0xFFFFFFFF).to(torch.int32)  # wraps: a bijection of the low 32 bits
        high = (samples >> 32).to(torch.int32)
        return _mix(_mix(low ^ _signed(key)) ^ high ^ _signed(key >> 32))

    def _drop(self, x: Tensor, counters: Tensor) -> Tensor:
        keep = _mix(counters) >= round(self.rate * 2**32) - 2**31
        return x * keep.to(x.dtype) * (1.0 / (1.0 - self.rate))
