"""The manifest of a checkpoint: what it holds, how it is cut into files, where it came from.

``manifest.json`` is the only entry to a checkpoint. It names every piece of every tensor with its place in the
global tensor and its checksum, so that a reader needs no knowledge of the layout that wrote it.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from megacore.errors import CheckpointError, ConfigError
from megacore.model_config import ModelConfig
from megacore.models.transformer import declarations
from megacore.sealed import digest, seal, unseal
from megacore.settings import validated
from megacore.specs import ParamSpec, Region

MANIFEST = "manifest.json"
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = (WEIGHT, *MOMENTS)
FORMAT_VERSION = 1


class Record(BaseModel):
    """Base of the manifest's records: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Piece(Record):
    """One stored tensor: a box of a global tensor, or a flat run of the box's entries (a ZeRO partition's share)."""

    state: Literal["weight", "exp_avg", "exp_avg_sq"]
    parameter: str
    region: tuple[tuple[NonNegativeInt, NonNegativeInt], ...]
    """The box [start, stop) in the global tensor, one pair for each dim."""
    run: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """[start, stop) in the box's entries in row-major order; none if the whole box is stored, in its shape."""
    dtype: Literal["float32", "float64", "bfloat16"]
    sha256: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor."""
        if self.run is not None:
            return (self.run[1] - self.run[0],)
        return tuple(stop - start for start, stop in self.region)


class FileRecord(Record):
    """One safetensors file: its size and its pieces by tensor name."""

    size: NonNegativeInt
    pieces: dict[str, Piece]


class AxisRecord(Record):
    """One dim of a parameter: the axis's name, what the parameter does along it, and its size."""

    name: str
    role: Literal["write", "read", "index"]
    size: PositiveInt


class ParameterRecord(Record):
    """A parameter's declaration, and the multipliers that growth gave it (`megacore.growth`)."""

    axes: tuple[AxisRecord, ...]
    learning_rate_multiplier: float = Field(1.0, gt=0)
    adam_eps_multiplier: float = Field(1.0, gt=0)


class Layout(Record):
    """The layout that wrote the checkpoint."""

    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    data_parallel_size: PositiveInt = 1


class LossScaling(Record):
    """Where fp16's dynamic loss scale stands."""

    scale: PositiveFloat
    step: NonNegativeInt
    """Steps that the scale has seen, skipped ones too."""
    last_overflow: int
    """The step at which gradients last overflowed; -1 for never."""
    hysteresis: NonNegativeInt
    """Overflows that are still borne before the scale is halved."""


class Progress(Record):
    """How far training has come, over the whole lineage."""

    step: NonNegativeInt = 0
    """Optimizer steps."""
    optimizer_step: NonNegativeInt = 0
    """Steps that Adam's moments have seen (for its bias correction): zero after growing with a fresh optimizer."""
    stage_first_step: NonNegativeInt = 0
    """The step at which the present stage began: schedules count from here."""
    consumed_samples: NonNegativeInt = 0
    tokens: NonNegativeInt = 0
    flops: NonNegativeFloat = 0.0
    loss_scaling: LossScaling | None = None


class Annealing(Record):
    """How the learning-rate multipliers that a growth set go to one: they hold, then change geometrically."""

    since_step: NonNegativeInt = 0
    hold_steps: NonNegativeInt = 0
    anneal_steps: NonNegativeInt = 0

    def exponent(self, step: int) -> float:
        """Return the power of each multiplier that is in force at ``step``: one at first, zero in the end."""
        elapsed = step - self.since_step - self.hold_steps
        if elapsed <= 0:
            return 1.0
        return max(0.0, 1.0 - elapsed / self.anneal_steps) if self.anneal_steps else 0.0


class Manifest(Record):
    """The whole manifest."""

    format: Literal["megacore-checkpoint"] = "megacore-checkpoint"
    version: Literal[1] = 1
    model: ModelConfig
    layout: Layout
    progress: Progress
    annealing: Annealing = Annealing()
    parameters: dict[str, ParameterRecord]
    files: dict[str, FileRecord]
    lineage: tuple[dict[str, Any], ...] = ()
    training_data: dict[str, Any] = {}
    """What fixes the data order (seed, data set digest): a resumed run compares it."""

    @property
    def states(self) -> tuple[str, ...]:
        """The states stored for every parameter: the weight, and Adam's moments if the optimizer was saved."""
        stored = {piece.state for file in self.files.values() for piece in file.pieces.values()}
        return tuple(state for state in STATES if state in stored)

    def specs(self) -> dict[str, ParamSpec]:
        """Return the declarations of the model that this version of megacore makes of ``model``."""
        return declarations(self.model)

    def to_json(self) -> str:
        """Serialise with a checksum over everything else."""
        return seal(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """A checksum of everything the checkpoint is (its pieces' checksums included)."""
        return digest(self.model_dump(mode="json"))


def parameter_records(
    specs: dict[str, ParamSpec], multipliers: dict[str, tuple[float, float]]
) -> dict[str, ParameterRecord]:
    """Describe parameters for the manifest, with their (learning rate, Adam eps) multipliers."""
    return {
        name: ParameterRecord(
            axes=tuple(AxisRecord(name=d.axis, role=d.role.value, size=d.size) for d in spec.dims),
            learning_rate_multiplier=multipliers[name][0],
            adam_eps_multiplier=multipliers[name][1],
        )
        for name, spec in specs.items()
    }


def read_manifest(path: Path) -> Manifest:
    """Read and check a checkpoint's manifest.

    Raises:
        CheckpointError: there is no checkpoint at ``path``, or the manifest is damaged, altered, inconsistent, or
            of another version; the message names the file and what is wrong.
    """
    file = path / MANIFEST
    try:
        body = unseal(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "there is no such directory" if not path.is_dir() else f"it has no {MANIFEST}"
        raise CheckpointError(f"{path} is not a checkpoint: {what}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a usable manifest: {error}") from None
    if body.get("format") != "megacore-checkpoint":
        raise CheckpointError(f"{file}: not the manifest of a megacore checkpoint")
    if body.get("version") != FORMAT_VERSION:
        raise CheckpointError(f"{file}: format version {body.get('version')}; this megacore reads {FORMAT_VERSION}")
    try:
        validated(ModelConfig, body.get("model", {}))
        manifest = Manifest.model_validate(body)
    except (ValidationError, ConfigError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    _check_consistency(file, manifest)
    return manifest


def carried_manifest(text: Any, where: str) -> Manifest:
    """Read the manifest, without files, that a checkpoint in another format carries.

    Raises:
        CheckpointError: it is damaged or does not describe its model.
    """
    try:
        manifest = Manifest.model_validate_json(text)
        validated(ModelConfig, manifest.model.model_dump())
    except (ValueError, ConfigError) as error:
        raise CheckpointError(f"{where}: the manifest it carries is damaged: {error}") from None
    _check_consistency(Path(where), manifest)
    return manifest


def _check_consistency(file: Path, manifest: Manifest) -> None:
    """Check that the manifest describes the model it names, and that every piece lies inside its tensor."""
    expected = parameter_records(manifest.specs(), {name: (1.0, 1.0) for name in manifest.specs()})
    for name in expected.keys() ^ manifest.parameters.keys():
        what = "is missing" if name in expected else "does not belong to the model"
        raise CheckpointError(f"{file}: the parameter {name} {what}")
    for name, record in manifest.parameters.items():
        if record.axes != expected[name].axes:
            raise CheckpointError(f"{file}: the axes of {name} are {record.axes}; the model has {expected[name].axes}")
    for file_name, stored in manifest.files.items():
        if not re.fullmatch(r"[A-Za-z0-9._-]+\.safetensors", file_name):
            raise CheckpointError(f"{file}: '{file_name}' is not a file name of a checkpoint")
        for key, piece in stored.pieces.items():
            axes = expected[piece.parameter].axes if piece.parameter in expected else None
            if axes is None or not _inside(piece, tuple(axis.size for axis in axes)):
                raise CheckpointError(f"{file}: {file_name}: the piece {key} does not fit into {piece.parameter}")


def _inside(piece: Piece, shape: tuple[int, ...]) -> bool:
    region: Region = piece.region
    if len(region) != len(shape):
        return False
    if not all(start < stop <= size for (start, stop), size in zip(region, shape, strict=True)):
        return False
    entries = math.prod(stop - start for start, stop in region)
    return piece.run is None or piece.run[0] < piece.run[1] <= entries
