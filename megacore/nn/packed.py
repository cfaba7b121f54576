"""A micro-batch without padding: sequences laid end to end, and where each token of the stream belongs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megacore.axes import shard_bounds
from megacore.parallel.grid import ParallelGrid


@dataclass(frozen=True)
class Part:
    """The tokens that this process holds at some place of the model.

    Args:
        start: index of the first one in the micro-batch.
        stop: index after the last one.
        positions: [stop - start] int64, place in the sequence.
        samples: [stop - start] int64, global number of the sample.
    """

    start: int
    stop: int
    positions: Tensor
    samples: Tensor


@dataclass(frozen=True)
class Packed:
    """The sequences of a micro-batch.

    Args:
        lengths: of each sequence, on the host.
        prefixes: of each sequence, the tokens that all its tokens may see in a prefix LM, on the host.
        samples: [sequences] int64.
        stream: the part that the residual stream holds.
        inner: the part inside attention and feed-forward networks.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    samples: Tensor
    stream: Part
    inner: Part

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each sequence begins, and where the last one ends."""
        starts = [0]
        for length in self.lengths:
            starts.append(starts[-1] + length)
        return tuple(starts)

    @cached_property
    def cumulative(self) -> Tensor:
        """`starts` on the device, int32, as variable-length kernels want it."""
        return torch.tensor(self.starts, dtype=torch.int32, device=self.samples.device)


def packed(tokens: Tensor, sequences: Tensor, grid: ParallelGrid) -> Packed:
    """Describe a micro-batch; the description is kept on ``tokens``, so that layers share it.

    Args:
        tokens: [3, total] int64: ids, segments, positions.
        sequences: [3, n] int64: lengths, prefix lengths, sample numbers.
        grid: which part of the tokens this process holds.
    """
    known: Any = getattr(tokens, "_packed", None)
    if isinstance(known, Packed):
        return known
    lengths, prefixes = sequences[:2].tolist()
    samples = sequences[2].clone()  # nothing here may refer to ``tokens``: it would never be freed
    of_tokens = samples.repeat_interleave(sequences[0], output_size=tokens.shape[1])

    def part(rank: int, parts: int) -> Part:
        start, stop = shard_bounds(tokens.shape[1], rank, parts)
        return Part(start, stop, tokens[2, start:stop].clone(), of_tokens[start:stop])

    result = Packed(tuple(lengths), tuple(prefixes), samples, part(*grid.stream_part), part(*grid.inner_part))
    tokens._packed = result  # type: ignore[attr-defined]
    return result
