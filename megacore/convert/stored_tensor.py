"""A tensor in another program's file: its place is known, its values are read when they are asked for.

A mapped file's pages count as resident memory, and a conversion touches all of them: with reads, a process holds what
it asked for and no more.
"""

from __future__ import annotations

import math
import os
import reprlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megacore.errors import CheckpointError

_SPAN_BYTES = 1 << 23
"""Read at once, at most, but for a single row that is longer."""
_GAP_BYTES = 1 << 12
"""Unwanted bytes between rows from which on each row is read on its own."""
_COMPARED = 1 << 21
"""Entries compared at once."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor's values are.

    Args:
        path: the file.
        dtype: of the values.
        shape: of the tensor.
        strides: entries from one index of a dim to the next.
        offset: of the first entry in the file, in bytes.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def narrow(self, start: int, length: int) -> StoredTensor:
        """Return the rows [start, start + length) of the first dim.

        Raises:
            CheckpointError: there are not so many.
        """
        if not 0 <= start <= start + length <= self.shape[0]:
            raise CheckpointError(f"{self.path}: a tensor has {self.shape[0]} rows where {start + length} are expected")
        offset = self.offset + start * self.strides[0] * self.dtype.itemsize
        return replace(self, shape=(length, *self.shape[1:]), offset=offset)

    def flattened(self) -> StoredTensor:
        """Return the same entries, in row-major order, as a tensor of one dim.

        Raises:
            CheckpointError: they are not stored in this order.
        """
        contiguous = tuple(math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))
        if any(size > 1 and a != b for size, a, b in zip(self.shape, self.strides, contiguous, strict=True)):
            raise CheckpointError(f"{self.path}: its entries are not stored in row-major order")
        return replace(self, shape=(math.prod(self.shape),), strides=(1,))

    def read(self, box: tuple[slice, ...] = ()) -> torch.Tensor:
        """Return a box of the tensor (all of it by default) as a new tensor in memory.

        Raises:
            CheckpointError: the file cannot be read, or is cut short.
        """
        bounds = [part.indices(size)[:2] for part, size in zip(box, self.shape, strict=False)]
        bounds += [(0, size) for size in self.shape[len(bounds) :]]
        result = torch.empty([stop - start for start, stop in bounds], dtype=self.dtype)
        if not result.numel():
            return result
        first = sum(start * stride for (start, _), stride in zip(bounds, self.strides, strict=True))
        try:
            with self.path.open("rb", buffering=0) as file:
                self._fill(result, file.fileno(), self.offset + first * self.dtype.itemsize)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        return result

    def item(self) -> float:
        """Return the only value.

        Raises:
            CheckpointError: there are several, it is complex, or the file cannot be read.
        """
        values = self.read()
        if values.numel() != 1 or values.is_complex():
            raise CheckpointError(
                f"{self.path}: a tensor of the shape {self.shape} and {self.dtype} where a number is expected"
            )
        return float(values)

    def _fill(self, result: torch.Tensor, descriptor: int, offset: int) -> None:
        """Read a box that begins at ``offset``, along the dim whose entries lie farthest apart."""
        if not self.shape:
            result.copy_(self._span(descriptor, offset, 1)[0])
            return
        outer = max(range(len(self.shape)), key=lambda dim: (self.strides[dim], self.shape[dim]))
        stride, rows = self.strides[outer], result.movedim(outer, 0)
        inner = [size for dim, size in enumerate(self.strides) if dim != outer]
        width = 1 + sum((size - 1) * step for size, step in zip(rows.shape[1:], inner, strict=True))
        at_once = 1
        if (stride - width) * self.dtype.itemsize < _GAP_BYTES:
            at_once = max(1, _SPAN_BYTES // (max(1, stride) * self.dtype.itemsize))
        for start in range(0, len(rows), at_once):
            count = min(at_once, len(rows) - start)
            place = offset + start * stride * self.dtype.itemsize
            span = self._span(descriptor, place, (count - 1) * stride + width)
            rows[start : start + count] = span.as_strided((count, *rows.shape[1:]), (stride, *inner))

    def _span(self, descriptor: int, offset: int, entries: int) -> torch.Tensor:
        content = torch.empty(entries * self.dtype.itemsize, dtype=torch.uint8)
        bytes_ = content.numpy()
        done = 0
        while done < len(bytes_):  # one call reads 2 GiB at most
            count = os.preadv(descriptor, [bytes_[done:].data], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path} is cut short")
            done += count
        return content.view(self.dtype)


def number_in(value: Any, what: str) -> int:
    """Return a counter that a file holds as a number or as a tensor.

    Raises:
        CheckpointError: it is something else, negative, or beyond 64 bits.
    """
    plain = value.item() if isinstance(value, StoredTensor) else value
    try:
        number = int(plain)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if isinstance(plain, bool) or not 0 <= number < 1 << 63 or number != plain:
        raise CheckpointError(f"{what} is {reprlib.repr(plain)} instead of a count")
    return number


def check_floating(tensor: StoredTensor, name: str) -> None:
    """Refuse a tensor that cannot be a weight: quantized ones need more than their entries to be understood.

    Raises:
        CheckpointError: its entries are not floating-point numbers.
    """
    if not tensor.dtype.is_floating_point:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(f"{tensor.path}: {name} is of {kind}; weights must be floating-point numbers")


def same_values(first: StoredTensor, second: StoredTensor) -> bool:
    """Tell whether two tensors, such as tied ones, are equal; reads them block by block."""
    if first.shape != second.shape:
        return False
    rows = max(1, _COMPARED // max(1, math.prod(first.shape[1:])))
    boxes = [(slice(start, start + rows),) for start in range(0, first.shape[0], rows)] if first.shape else [()]
    return all(torch.equal(first.read(box).double(), second.read(box).double()) for box in boxes)
