"""What a programme's YAML says, before the stages are worked out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator
from typing_extensions import Self

from megacore.errors import MegacoreError
from megacore.settings import Settings, read_yaml, validated

Kind = Literal["train", "grow"]


class StageConfig(Settings):
    """One stage: ``train`` or ``grow``, and what it needs."""

    train: dict[str, Any] | None = None
    """Keys of the run's configuration that differ in this stage, and ``train_tokens`` instead of ``train_steps``."""
    grow: dict[str, Any] | None = None
    """New sizes and options, as ``megacore grow`` takes them."""
    processes: PositiveInt | None = None
    sbatch: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _empty_is_given(cls, values: Any) -> Any:
        """``- train:`` alone is a stage that changes nothing."""
        if not isinstance(values, dict):
            return values
        return {key: {} if value is None and key in ("train", "grow") else value for key, value in values.items()}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.train is None) == (self.grow is None):
            raise ValueError("a stage is either 'train: {...}' or 'grow: {...}'; give one of the two")
        return self

    @property
    def kind(self) -> Kind:
        """Which of the two it is."""
        return "grow" if self.train is None else "train"


class ProgramConfig(Settings):
    """A programme: how its runs are configured, and in which stages they follow each other."""

    output_dir: Path
    processes: PositiveInt = 1
    """Of each stage that does not say otherwise."""
    sbatch: tuple[str, ...] = ()
    """Options of each stage's Slurm job, e.g. ``--gpus-per-node=8``; those of a stage come after, and win."""
    run: dict[str, Any]
    """The sections of a run's configuration: the first model, and what the stages have in common."""
    stages: tuple[dict[str, Any], ...] = Field(min_length=1)

    def parsed_stages(self, where: str) -> list[StageConfig]:
        """Return the stages; an error names the stage.

        Raises:
            ConfigError: a stage has an unknown key, or is not of one kind.
        """
        return [
            validated(StageConfig, stage, f"{where}: stage {number}: ") for number, stage in enumerate(self.stages, 1)
        ]


def read_program(path: Path, processes: int | None = None) -> ProgramConfig:
    """Read a programme's YAML.

    Args:
        path: the file.
        processes: instead of the file's value.

    Raises:
        ConfigError: naming the key.
    """
    values = read_yaml(path)
    if processes is not None:
        values["processes"] = processes
    return validated(ProgramConfig, values, f"{path}: ")


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Begin every error of the block with the place that it is about."""
    try:
        yield
    except MegacoreError as error:
        raise type(error)(f"{where}: {error}") from error
