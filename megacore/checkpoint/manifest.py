"""The manifest of a checkpoint: what it holds, which files it has, where it came from.

``manifest.json`` is the only entry to a checkpoint. It says which parameters each file holds pieces of, and has the
checksum of the file's header, where each piece is described (`megacore.checkpoint.pieces`): so a reader needs no
knowledge of the layout that wrote it, and opening a checkpoint reads one small file, however many there are.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
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

from megacore.axes import AXES
from megacore.errors import CheckpointError, ConfigError, DamagedError
from megacore.model_config import ModelConfig
from megacore.sealed import digest, seal, unseal
from megacore.settings import validated
from megacore.specs import Dim, ParamSpec, Role, TensorSpec

MANIFEST = "manifest.json"
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = (WEIGHT, *MOMENTS)
FORMAT_VERSION = 2


class Record(BaseModel):
    """Base of the manifest's records: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileRecord(Record):
    """One safetensors file."""

    size: NonNegativeInt
    """In bytes."""
    header: str
    """XXH3-128 of the file's header, its length included; the header has the checksums of the tensors."""
    states: dict[Literal["weight", "exp_avg", "exp_avg_sq"], Literal["float32", "float64", "bfloat16"]]
    """What it has pieces of, and the type in which they are stored."""
    holds: tuple[tuple[NonNegativeInt, PositiveInt], ...]
    """Runs [start, stop) of the parameters that the file has pieces of; they are numbered by their sorted names."""


class AxisRecord(Record):
    """One dim of a parameter: the axis's name, what the parameter does along it, and its size."""

    name: str
    role: Literal["write", "read", "index", "scale", "shift", "scale_read", "shift_read"]
    size: PositiveInt


class ParameterRecord(Record):
    """A parameter's declaration, and the multipliers that growth gave it (`megacore.growth`)."""

    axes: tuple[AxisRecord, ...]
    learning_rate_multiplier: float = Field(1.0, gt=0)
    adam_eps_multiplier: float = Field(1.0, gt=0)

    def spec(self) -> TensorSpec:
        """Return the axes."""
        return TensorSpec(tuple(Dim(axis.name, Role(axis.role), axis.size) for axis in self.axes))


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
    version: Literal[2] = 2
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
        stored = {state for file in self.files.values() for state in file.states}
        return tuple(state for state in STATES if state in stored)

    def numbers(self) -> dict[str, int]:
        """Return the number by which a file's record means a parameter."""
        return {name: number for number, name in enumerate(sorted(self.parameters))}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the global shape of every parameter."""
        return {name: tuple(axis.size for axis in record.axes) for name, record in self.parameters.items()}

    @property
    def num_parameters(self) -> int:
        """The number of entries of all parameters."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def tensors(self) -> dict[str, TensorSpec]:
        """Return every parameter's axes: enough to cut it for another layout."""
        return {name: record.spec() for name, record in self.parameters.items()}

    def specs(self) -> dict[str, ParamSpec]:
        """Return the declarations of the model that this version of megacore makes of ``model``.

        Raises:
            CheckpointError: they are not the parameters that the manifest describes.
        """
        from megacore.models.transformer import declarations  # needs torch

        declared = declarations(self.model)
        for name in declared.keys() ^ self.parameters.keys():
            what = "is missing" if name in declared else "does not belong to the model"
            raise CheckpointError(f"{MANIFEST}: the parameter {name} {what}")
        for name, record in self.parameters.items():
            if record.spec().dims != declared[name].dims:
                raise CheckpointError(
                    f"{MANIFEST}: the axes of {name} are {record.spec().dims}; the model has {declared[name].dims}"
                )
        return declared

    def to_json(self) -> str:
        """Serialise with a checksum over everything else."""
        return seal(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """A checksum of everything the checkpoint is (its files' headers, with the tensors' checksums, included)."""
        return digest(self.model_dump(mode="json"))


def parameter_records(
    specs: Mapping[str, TensorSpec], multipliers: Mapping[str, tuple[float, float]]
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
        raise DamagedError(f"{path} is not a checkpoint: {what}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{file}: not a usable manifest: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from None
    if body.get("format") != "megacore-checkpoint":
        raise CheckpointError(f"{file}: not the manifest of a megacore checkpoint")
    if body.get("version") != FORMAT_VERSION:
        raise CheckpointError(f"{file}: format version {body.get('version')}; this megacore reads {FORMAT_VERSION}")
    manifest = validated_manifest(body, str(file))
    if not manifest.parameters or WEIGHT not in manifest.states:
        raise CheckpointError(f"{file}: it has no weights")
    return manifest


def validated_manifest(body: Any, where: str) -> Manifest:
    """Check a manifest's values, and that they go together.

    Raises:
        CheckpointError: naming the key.
    """
    try:
        validated(ModelConfig, body.get("model", {}))
        manifest = Manifest.model_validate(body)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    _check_consistency(where, manifest)
    return manifest


def carried_manifest(text: Any, where: str) -> Manifest:
    """Read the manifest, without files, that a checkpoint in another format carries.

    Raises:
        CheckpointError: it is damaged or does not describe its model.
    """
    try:
        body = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: the manifest it carries is damaged: {error}") from None
    if not isinstance(body, dict):
        raise CheckpointError(f"{where}: the manifest it carries is damaged: it is no JSON object")
    return validated_manifest(body, f"{where}: the manifest it carries")


def _check_consistency(where: str, manifest: Manifest) -> None:
    """Check that sizes are those of the model that the manifest names, and that every file can be one."""
    for name, record in manifest.parameters.items():
        for axis in record.axes:
            if axis.name not in AXES or manifest.model.axis_size(axis.name) != axis.size:
                raise CheckpointError(
                    f"{where}: {name} has axes, {axis.name}={axis.size}, that the model does not have"
                )
    for file_name, stored in manifest.files.items():
        if not re.fullmatch(r"[A-Za-z0-9._-]+\.safetensors", file_name):
            raise CheckpointError(f"{where}: '{file_name}' is not a file name of a checkpoint")
        if not all(start < stop <= len(manifest.parameters) for start, stop in stored.holds):
            raise CheckpointError(f"{where}: {file_name} holds parameters that the manifest does not have")
