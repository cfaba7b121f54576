"""Dropout whose masks depend on (seed, site, sample, position) alone.

So every layout drops the same entries: a tensor-parallel rank computes just its part of the mask, and a sample is
treated alike whichever replica or micro-batch it falls into. The masks come from 32-bit mixing functions applied to
counters, in plain tensor operations that run on any device.
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


@dataclass(frozen=True)
class DropoutKeys:
    """The samples a micro-batch holds, as keys of their masks.

    Args:
        seed: of the run.
        samples: [batch] int64, the global number of each sample: no two steps share one.
    """

    seed: int
    samples: Tensor

    def drop(self, x: Tensor, rate: float, site: str, offsets: tuple[Tensor, ...]) -> Tensor:
        """Zero entries with probability ``rate`` and scale the rest by 1/(1 - rate).

        Args:
            x: [batch, *positions].
            rate: probability of zero.
            site: name of the place in the model.
            offsets: for each dim of ``x`` after the first, the number that its index adds to the entry's global
                number; 1-d, int32.
        """
        if rate == 0.0:
            return x
        counter = torch.zeros((1,), dtype=torch.int32, device=x.device)
        for offset in offsets:
            counter = counter.unsqueeze(-1) + offset
        key = stream_key(self.seed, "dropout", site)
        low = (self.samples & 0xFFFFFFFF).to(torch.int32)  # wraps: a bijection of the low 32 bits
        high = (self.samples >> 32).to(torch.int32)
        per_sample = _mix(_mix(low ^ _signed(key)) ^ high ^ _signed(key >> 32))
        per_sample = per_sample.view(-1, *(1,) * (x.dim() - 1))
        bits = _mix(_mix(counter) ^ per_sample)
        keep = bits >= round(rate * 2**32) - 2**31
        return x * keep.to(x.dtype) * (1.0 / (1.0 - rate))
