"""The proof of a growth, made before its checkpoint is published, and of checkpoints that are there already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import psutil

from megacore.checkpoint.manifest import MANIFEST, WEIGHT
from megacore.checkpoint.reader import CheckpointReader
from megacore.errors import CheckpointError
from megacore.growth.describe import Dtypes, rounded_to
from megacore.growth.plan import GrowthPlan
from megacore.growth.source import GrowthSource
from megacore.growth.tolerance import tolerance
from megacore.growth.verify import Comparison, compare, random_batch
from megacore.publish import os_errors, replace_file
from megacore.specs import ParamSpec

_MAX_PARAMETERS = 250_000_000
"""Of both models together: the comparison takes less than ten seconds on one core."""
_MEMORY_SHARE = 0.5
"""Of what is available: others may need some, too."""


class GrowthProof:
    """Compares a grown model with its source, on random tokens, and refuses one that computes something else.

    Args:
        source: the small model's checkpoint.
        plan: of the growth.
        dtypes: of what is read and written.
    """

    def __init__(self, source: GrowthSource, plan: GrowthPlan, dtypes: Dtypes) -> None:
        self._source, self._plan = source, plan
        self.dtype = "float64" if all(dtypes.written(name, WEIGHT) == "float64" for name in plan.specs) else "float32"
        self.limit = tolerance(self.dtype, plan.target, rounded_to(plan, dtypes))
        self.result: Comparison | None = None

    @property
    def parameters(self) -> int:
        """Of both models together."""
        return sum(_count(specs) for specs in (self._plan.source_specs, self._plan.specs))

    @property
    def memory(self) -> int:
        """Bytes that both models take."""
        return self.parameters * {"float32": 4, "float64": 8}[self.dtype]

    def obstacle(self) -> str | None:
        """Say why the comparison would take too long or too much memory; ``None`` if it would not."""
        if self.parameters > _MAX_PARAMETERS:
            return f"both models have {self.parameters:,} parameters, more than {_MAX_PARAMETERS:,}"
        free = available_memory()
        if self.memory > _MEMORY_SHARE * free:
            return f"both models take {self.memory / 1e9:.1f} GB of memory, of {free / 1e9:.1f} GB available"
        return None

    def __call__(self, grown: CheckpointReader) -> tuple[dict[str, Any], ...]:
        """Compare; return what the lineage says of it.

        Raises:
            CheckpointError: the difference is above the tolerance.
        """
        self.result = compare(self._source, grown, [random_batch(self._plan.source)], self.dtype)
        if not self.result.worst <= self.limit:
            raise CheckpointError(
                f"the grown model is not the same function as {self._source.path}: relative |Δlogit| "
                f"{self.result.worst:.2e} in {self.dtype}, above {self.limit:.0e}; nothing was written. Is the source "
                "sound (megacore verify)? If so, please report this; --verify never writes the checkpoint all the same"
            )
        return (self.result.event(self._source, self.limit),)


def _count(specs: Mapping[str, ParamSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in specs.values())


def stored_tolerance(dtype: str, before: GrowthSource, after: GrowthSource) -> float:
    """Return the tolerance of a comparison of two checkpoints of which no plan says what was rounded."""
    stored = {reader.dtype(name, WEIGHT) for reader in (before, after) for name in reader.manifest.parameters}
    coarsest = next(kind for kind in ("bfloat16", "float32", "float64") if kind in stored)
    return tolerance(dtype, after.manifest.model, coarsest)


def record(reader: CheckpointReader, event: dict[str, Any]) -> None:
    """Add an event to a checkpoint's lineage, at once.

    Raises:
        CheckpointError: the manifest cannot be written.
    """
    manifest = reader.manifest.model_copy(update={"lineage": (*reader.manifest.lineage, event)})
    file = reader.path / MANIFEST
    with os_errors(file, CheckpointError):
        replace_file(file, manifest.to_json().encode())


def available_memory() -> int:
    """Return the bytes that this process could still take."""
    return int(psutil.virtual_memory().available)
