"""The collectives of tensor parallelism with their gradients (Megatron-LM, Shoeybi et al. 2019, §3)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.parallel.grid import ParallelGrid


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def copy_to_tensor_parallel(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Enter a column-parallel region: identity forward, one all-reduce of x's size backward."""
    if grid.tensor_parallel_size == 1:
        return x
    result: Tensor = _Copy.apply(x, grid.tensor_parallel_group)  # type: ignore[no-untyped-call]
    return result


def reduce_from_tensor_parallel(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Leave a row-parallel region: one all-reduce (sum) of x's size forward, identity backward."""
    if grid.tensor_parallel_size == 1:
        return x
    result: Tensor = _Reduce.apply(x, grid.tensor_parallel_group)  # type: ignore[no-untyped-call]
    return result


def tensor_parallel_max(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Return the elementwise maximum over the tensor-parallel ranks (no gradient): one all-reduce of x's size."""
    x = x.detach().clone()
    if grid.tensor_parallel_size > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=grid.tensor_parallel_group)
    return x


def data_parallel_sum(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Return the sum over the replicas (no gradient): one all-reduce of x's size."""
    x = x.detach().clone()
    if grid.data_parallel_size > 1:
        dist.all_reduce(x, group=grid.data_parallel_group)
    return x
