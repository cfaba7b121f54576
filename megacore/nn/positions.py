"""Where a token is: rotations of queries and keys, and relative biases."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megacore.model_config import ModelConfig, Stack
from megacore.nn.compiled import maybe_compiled
from megacore.nn.kit import Kit
from megacore.params import index, write


class Rotary:
    """Rotary positions (Su et al. 2021): pair j of a head is turned by position × its frequency.

    The frequencies are theta^(-2j/head_dim), unless the configuration lists them.

    Args:
        config: gives theta, the head size and which numbers are pairs.
        compile: fuse the turning.
    """

    def __init__(self, config: ModelConfig, compile: bool = False) -> None:
        rotate = rotate_interleaved if config.position_embedding == "rotary_interleaved" else rotate_halves
        self._rotate = maybe_compiled(rotate, compile)
        self._dim, self._theta, self._frequencies = config.head_dim, config.rope_theta, config.rope_frequencies

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [tokens, 1, head_dim/2] of positions [tokens]; computed in fp32 at least."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if self._frequencies:
            angle = positions.to(wide).unsqueeze(-1) * positions.new_tensor(self._frequencies, dtype=wide)
        else:
            pair = torch.arange(0, self._dim, 2, device=positions.device).to(wide)
            angle = positions.to(wide).unsqueeze(-1) / self._theta ** (pair / self._dim)
        return angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)

    def turn(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Turn queries or keys. x: [tokens, heads, head_dim]."""
        return self._rotate(x, *angles)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, j + head_dim/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (2j, 2j + 1)."""
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2).to(x.dtype)


class RelativeBias(nn.Module):
    """T5's table of score biases by head and distance bucket, shared by the layers of a stack (Raffel et al. 2020)."""

    def __init__(self, kit: Kit) -> None:
        super().__init__()
        self.weight = kit.declare(index("relative_buckets"), write("heads"), initial="normal")

    def forward(self) -> Tensor:
        """Return the table [buckets, heads/tp] as a value that travels with the stream."""
        return self.weight.clone()


def relative_buckets(length: int, config: ModelConfig, stack: Stack, device: torch.device) -> Tensor:
    """Return the bucket of every (query, key) of a sequence: [length, length] int64.

    Half the buckets (of a direction, in an encoder) are for single distances, the rest grow geometrically up to the
    maximal distance; a decoder only looks back.
    """
    position = torch.arange(length, device=device)
    distance = position[None, :] - position[:, None]  # key - query
    buckets, offset = config.relative_attention_num_buckets, torch.zeros_like(distance)
    if stack == "encoder":
        buckets //= 2
        offset = (distance > 0) * buckets
        distance = distance.abs()
    else:
        distance = -distance.clamp(max=0)
    exact = buckets // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(config.relative_attention_max_distance / exact)
    far = (exact + (growth * (buckets - exact)).long()).clamp(max=buckets - 1)
    return offset + torch.where(distance < exact, distance, far)
