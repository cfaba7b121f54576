"""Norms with declared gain and bias, or without any."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from megacore.model_config import ModelConfig
from megacore.nn.compiled import maybe_compiled
from megacore.nn.kit import Kit
from megacore.parallel.collectives import copy_to_tensor_parallel, on_stream, sum_over_tensor_parallel
from megacore.specs import Role


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x/sqrt(mean(x²) + eps), times the gain; computed in fp32 at least (Zhang and Sennrich 2019)."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    normal = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normal if weight is None else normal * weight


def stream_copies(config: ModelConfig) -> NDArray[np.int64]:
    """Return, for each coordinate of a stream that was widened unevenly, one over its weight in the norms.

    Its weight is one over the first size, shared equally among the copies at every widening: so mean and variance are
    those of the stream before (MSG, Yao et al. 2023, masks coordinates for the same end).
    """
    first, *later = (*config.norm_copies, config.hidden_size)
    copies, old = np.full(first, first, np.int64), first
    for new in later:
        source = np.arange(new) * old // new
        copies, old = copies[source] * np.bincount(source)[source], new
    return copies


def weighted_norm(
    x: Tensor, copies: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, centred: bool
) -> Tensor:
    """Normalise with the mean and variance in which coordinate i counts 1/copies[i]; in fp32 at least."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    share = copies.to(wide.dtype).reciprocal()
    if centred:
        wide = wide - (wide * share).sum(-1, keepdim=True)
    normal = (wide * torch.rsqrt((wide.pow(2) * share).sum(-1, keepdim=True) + eps)).to(x.dtype)
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


class Norm(nn.Module):
    """Layer normalisation (Ba et al. 2016) or RMS normalisation over the stream's last dim.

    Args:
        kit: gives kind, eps and whether there are gains.
        axis: name of the normalised axis.
        tied: the output is contracted with the word table that is also the embedding's.
        whole: every rank normalises all tokens (heads), instead of its part of the stream's.
        eps: ``None`` for the model's.
    """

    def __init__(
        self, kit: Kit, axis: str = "hidden", tied: bool = False, whole: bool = False, eps: float | None = None
    ) -> None:
        super().__init__()
        config = kit.config
        self._centred = config.norm == "layer_norm"
        gain, bias = (Role.SCALE_READ, Role.SHIFT_READ) if tied else (Role.SCALE, Role.SHIFT)
        self.weight = kit.declare((axis, gain), initial="ones") if config.norm_affine else None
        self.bias = kit.declare((axis, bias), initial="zeros") if config.norm_affine and self._centred else None
        self._eps, self._grid, self._whole = config.norm_eps if eps is None else eps, kit.grid, whole
        self._rms_norm = maybe_compiled(rms_norm, kit.compile)
        copies = kit.declare.constant(stream_copies(config)) if config.norm_copies else None
        self.register_buffer("_copies", copies, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] -> [..., size]."""
        weight, bias = (self._used(parameter) for parameter in (self.weight, self.bias))
        if isinstance(self._copies, Tensor):
            return weighted_norm(x, self._copies, weight, bias, self._eps, self._centred)
        if self._centred:
            return F.layer_norm(x, x.shape[-1:], weight, bias, self._eps)
        return self._rms_norm(x, weight, self._eps)

    def _used(self, parameter: Tensor | None) -> Tensor | None:
        return parameter if parameter is None or self._whole else on_stream(parameter, self._grid)


class InnerNorm(nn.Module):
    """The norm before an output projection (Sub-LN, Wang et al. 2022), over axes that tensor-parallel ranks share.

    One all-reduce of two numbers per token forward, one backward.
    """

    def __init__(self, kit: Kit, *axes: str) -> None:
        super().__init__()
        config = kit.config
        self._centred = config.norm == "layer_norm"
        gain, bias = (tuple((axis, role) for axis in axes) for role in (Role.SCALE, Role.SHIFT))
        self.weight = kit.declare(*gain, initial="ones") if config.norm_affine else None
        self.bias = kit.declare(*bias, initial="zeros") if config.norm_affine and self._centred else None
        self._size = 1
        for axis in axes:
            self._size *= config.axis_size(axis)
        self._eps, self._grid = config.norm_eps, kit.grid

    def forward(self, x: Tensor) -> Tensor:
        """x: [tokens, size/tp] -> [tokens, size/tp]."""
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        if self._centred:
            mean = sum_over_tensor_parallel(wide.sum(-1, keepdim=True), self._grid) / self._size
            wide = wide - mean
        square = sum_over_tensor_parallel(wide.pow(2).sum(-1, keepdim=True), self._grid) / self._size
        normal = (wide * torch.rsqrt(square + self._eps)).to(x.dtype)
        if self.weight is not None:
            normal = normal * self.weight.reshape(-1)
        return normal if self.bias is None else normal + self.bias.reshape(-1)


class HeadNorm(nn.Module):
    """RMS norm of each head of queries or keys, with one gain for all heads (Qwen3)."""

    def __init__(self, kit: Kit) -> None:
        super().__init__()
        self.weight = kit.declare(("head_dim", Role.SCALE), initial="ones")
        self._eps, self._grid = kit.config.norm_eps, kit.grid

    def forward(self, x: Tensor) -> Tensor:
        """x: [tokens, heads/tp, head_dim] -> the same. One all-reduce of the gain's size backward."""
        return rms_norm(x, copy_to_tensor_parallel(self.weight, self._grid), self._eps)
