"""What can be grown: a checkpoint, or another program's read as one, which needs no conversion before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megacore.checkpoint.attached import Attached
from megacore.checkpoint.load import Readable
from megacore.communicator import Communicator
from megacore.convert.imports import Source, import_event
from megacore.specs import ParamSpec, Region

_DTYPE = "float32"
"""As what another program's tensors are read, as `megacore.convert.imports` stores them."""


class GrowthSource(Readable, Protocol):
    """A checkpoint to grow."""

    @property
    def states(self) -> tuple[str, ...]:
        """What is stored of every parameter."""

    def dtype(self, parameter: str, state: str) -> str:
        """Return the type in which a state of a parameter is stored."""


class ForeignSource:
    """Another program's checkpoint, read as the one that importing it would make."""

    def __init__(self, foreign: Source) -> None:
        self._foreign = foreign
        self.path = foreign.path
        self.states = foreign.states
        lineage = (*foreign.manifest.lineage, import_event(foreign))
        self.manifest = foreign.manifest.model_copy(update={"lineage": lineage})
        self._shapes = self.manifest.shapes()

    def specs(self) -> dict[str, ParamSpec]:
        """Return the declarations of the model."""
        return self.manifest.specs()

    def dtype(self, parameter: str, state: str) -> str:
        """Return the type to which the tensors are rounded."""
        return _DTYPE

    def read(self, parameter: str, state: str, region: Region | None = None) -> NDArray[Any]:
        """Return a box of a parameter's state as a new array; all of it by default."""
        region = region or tuple((0, size) for size in self._shapes[parameter])
        return self._foreign.box(parameter, state, region).astype(np.dtype(_DTYPE))

    def attach(self, directory: Path) -> None:
        """Add the source's other files (a tokenizer) to a checkpoint that is being written."""
        self._foreign.attach(directory)


def companions(source: GrowthSource, group: Communicator) -> Callable[[Path], None]:
    """Return what adds the source's other files to a checkpoint; every rank of ``group`` calls this."""
    return source.attach if isinstance(source, ForeignSource) else Attached.of(source.path, group).write


def origin(source: GrowthSource) -> dict[str, str]:
    """Return what a lineage says of a source; another program's files have no checksum."""
    name = {"name": source.path.name}
    return name | {"sha256": source.manifest.digest} if source.manifest.files else name
