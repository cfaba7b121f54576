"""What differs between two checkpoints, value by value, whatever their layouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megacore.checkpoint.reader import CheckpointReader
from megacore.specs import Region

_BLOCK = 1 << 22
"""Entries compared at once."""


@dataclass(frozen=True)
class TensorDifference:
    """How a state of a parameter differs.

    Args:
        parameter: its name.
        state: ``weight`` or one of Adam's moments.
        what: ``only in the first``, ``only in the second``, ``shape`` or ``values``.
        largest: max|a - b|, where values differ; not a number if only one of them is.
        changed: share of the entries that differ.
    """

    parameter: str
    state: str
    what: str
    largest: float = 0.0
    changed: float = 0.0


def configuration_differences(first: CheckpointReader, second: CheckpointReader) -> dict[str, tuple[object, object]]:
    """Return what differs, with both values: keys of the model, progress, annealing, data order; multipliers."""
    found: dict[str, tuple[object, object]] = {}
    data = [reader.manifest.training_data for reader in (first, second)]
    for key in data[0] | data[1]:
        if data[0].get(key) != data[1].get(key):
            found[key] = data[0].get(key), data[1].get(key)
    for name in first.manifest.parameters.keys() & second.manifest.parameters.keys():
        for key in ("learning_rate_multiplier", "adam_eps_multiplier"):
            a, b = (getattr(reader.manifest.parameters[name], key) for reader in (first, second))
            if a != b:
                found[f"{name}: {key}"] = a, b
    for section in ("model", "progress", "annealing"):
        values = [getattr(reader.manifest, section).model_dump() for reader in (first, second)]
        found |= {key: (value, values[1][key]) for key, value in values[0].items() if value != values[1][key]}
    return found


def tensor_differences(
    first: CheckpointReader, second: CheckpointReader, on_progress: Callable[[int], None] = lambda size: None
) -> Iterator[TensorDifference]:
    """Yield what differs, in the order of the first checkpoint's parameters; every checksum is checked on the way.

    Raises:
        CheckpointError: one of them is damaged.
    """
    names = list(dict.fromkeys((*first.manifest.parameters, *second.manifest.parameters)))
    states = dict.fromkeys((*first.manifest.states, *second.manifest.states))
    for name in names:
        for state in states:
            present = [
                name in reader.manifest.parameters and state in reader.manifest.states for reader in (first, second)
            ]
            if present != [True, True]:
                if any(present):
                    yield TensorDifference(name, state, f"only in the {'first' if present[0] else 'second'}")
            elif first.shape(name) != second.shape(name):
                yield TensorDifference(name, state, "shape")
            else:
                difference = _values(first, second, name, state, on_progress)
                if difference.changed:
                    yield difference


def _values(
    first: CheckpointReader, second: CheckpointReader, name: str, state: str, on_progress: Callable[[int], None]
) -> TensorDifference:
    shape = first.shape(name)
    rows = max(1, _BLOCK // math.prod(shape[1:]))
    largest, changed = 0.0, 0
    for start in range(0, shape[0], rows):
        box: Region = ((start, min(start + rows, shape[0])), *((0, size) for size in shape[1:]))
        a, b = (reader.read(name, state, box).astype(np.float64) for reader in (first, second))
        different = ~((a == b) | (np.isnan(a) & np.isnan(b)))
        changed += int(different.sum())
        if different.any():
            largest = float(np.maximum(largest, np.abs(a - b)[different].max()))  # keeps "not a number"
        on_progress(a.size)
    return TensorDifference(name, state, "values", largest, changed / math.prod(shape))
