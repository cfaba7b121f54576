"""The collectives of tensor and sequence parallelism with their gradients.

Tensor parallelism: Shoeybi et al. 2019 (Megatron-LM), §3. Sequence parallelism: Korthikanti et al. 2022, §4.2.2. A
layer uses four collectives of its stream's size either way: two all-reduces forward and two backward, or as many
pairs of all-gather and reduce-scatter, which move the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megacore.parallel.grid import ParallelGrid

Group = dist.ProcessGroup | None


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def _all_gather(x: Tensor, group: Group) -> Tensor:
    """Concatenate equal parts along the first dim."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    """Sum, and keep this rank's equal part of the first dim."""
    if dist.get_backend(group) == "gloo":  # has no reduce-scatter of its own
        return _own_part(_all_reduce(x, group), group)
    part = torch.empty_like(x[: x.shape[0] // dist.get_world_size(group)])
    dist.reduce_scatter_tensor(part, x.contiguous(), group=group)
    return part


def _own_part(x: Tensor, group: Group) -> Tensor:
    return x.chunk(dist.get_world_size(group))[dist.get_rank(group)].contiguous()


def _same(x: Tensor, group: Group) -> Tensor:
    return x.view_as(x)


class _Collective(torch.autograd.Function):
    """A linear collective and its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, there: Callable[..., Tensor], back: Callable[..., Tensor]) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(gradient, ctx.group), None, None, None


def _apply(x: Tensor, grid: ParallelGrid, there: Callable[..., Tensor], back: Callable[..., Tensor]) -> Tensor:
    if grid.tensor_parallel_size == 1:
        return x
    result: Tensor = _Collective.apply(x, grid.tensor_parallel_group, there, back)  # type: ignore[no-untyped-call]
    return result


def enter_tensor_parallel(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Enter a column-parallel region with the stream x: [tokens of this rank, hidden] -> [tokens, hidden].

    One all-reduce backward; with sequence parallelism an all-gather forward, a reduce-scatter backward.
    """
    if grid.sequence_parallel:
        return _apply(x, grid, _all_gather, _reduce_scatter)
    return _apply(x, grid, _same, _all_reduce)


def leave_tensor_parallel(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Leave a row-parallel region with partial sums x: [tokens, hidden] -> [tokens of this rank, hidden].

    One all-reduce forward; with sequence parallelism a reduce-scatter forward, an all-gather backward.
    """
    if grid.sequence_parallel:
        return _apply(x, grid, _reduce_scatter, _all_gather)
    return _apply(x, grid, _all_reduce, _same)


def gather_stream(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Make the stream whole for a head that every rank computes alike: an all-gather forward, no traffic backward."""
    return _apply(x, grid, _all_gather, _own_part) if grid.sequence_parallel else x


def copy_to_tensor_parallel(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Give what all ranks hold alike to a sharded computation: one all-reduce of x's size backward."""
    return _apply(x, grid, _same, _all_reduce)


def reduce_from_tensor_parallel(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Sum partial results to what all ranks hold alike: one all-reduce of x's size forward."""
    return _apply(x, grid, _all_reduce, _same)


def sum_over_tensor_parallel(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Sum over shards what each shard then goes on to use: one all-reduce of x's size forward, one backward."""
    return _apply(x, grid, _all_reduce, _all_reduce)


def on_stream(parameter: Tensor, grid: ParallelGrid) -> Tensor:
    """Use a replicated parameter on the stream: where each rank sees its own tokens only, gradients are summed.

    One all-reduce of the parameter's size backward under sequence parallelism, nothing otherwise.
    """
    return _apply(parameter, grid, _same, _all_reduce) if grid.sequence_parallel else parameter


def tensor_parallel_max(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Return the elementwise maximum over the tensor-parallel ranks (no gradient): one all-reduce of x's size."""
    x = x.detach().clone()
    if grid.tensor_parallel_size > 1:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=grid.tensor_parallel_group)
    return x


def replica_sum(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Return the sum over the replicas and their Ulysses ranks (no gradient): one all-reduce of x's size."""
    x = x.detach().clone()
    if grid.gradient_size > 1:
        dist.all_reduce(x, group=grid.gradient_group)
    return x


def pipeline_sum(x: Tensor, grid: ParallelGrid) -> Tensor:
    """Return the sum over the pipeline's stages (no gradient): one all-reduce of x's size."""
    x = x.detach().clone()
    if grid.pipeline_parallel_size > 1:
        dist.all_reduce(x, group=grid.pipeline_parallel_group)
    return x
