"""What of a programme is done: a sealed record of each stage's settings beside what the stage has written.

A stage is finished when its last checkpoint is there, which is complete or not there at all; the record says what it
was made with. So a programme may be stopped anywhere, changed where it has not been yet, and run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from launcher.program.stages import Stage, TrainStage
from megacore.errors import ConfigError
from megacore.publish import os_errors, replace_file
from megacore.sealed import seal, unseal
from megacore.training.runs import checkpoint_path, checkpoints

_RECORD = ".json"


def count_finished(stages: Sequence[Stage]) -> int:
    """Return how many stages, from the first, are finished.

    Raises:
        ConfigError: a finished stage was made with other settings, or a directory is not what the programme has made;
            the message names the file, and the key.
    """
    done = [_is_finished(stage) for stage in stages]
    finished = done.index(False) if False in done else len(done)
    for stage in stages[finished + 1 :]:
        if stage.directory.exists():
            raise ConfigError(
                f"{stage.directory} is there, but {stages[finished].name}, which comes before it, is not finished; "
                f"restore {stages[finished].directory}, or remove {stage.directory} to make it again"
            )
    return finished


def write_record(stage: Stage) -> None:
    """Keep what a stage is about to be made with, and write the configuration of its run.

    Raises:
        ConfigError: it cannot be written.
    """
    with os_errors(stage.directory.parent, ConfigError):
        replace_file(stage.file(_RECORD), seal({"stage": stage.name, "settings": stage.settings}).encode())
        if isinstance(stage, TrainStage):
            resolved = yaml.safe_dump(stage.config.model_dump(mode="json"), sort_keys=False)
            replace_file(stage.file(".yaml"), resolved.encode())


def _is_finished(stage: Stage) -> bool:
    for other in stage.directory.parent.glob(f"{stage.number:02d}-*{_RECORD}"):
        if other != stage.file(_RECORD):
            raise ConfigError(
                f"{other} is of another stage {stage.number} than this programme's, {stage.name}; restore the order of "
                "the stages, or give another output_dir"
            )
    settings = _read_record(stage)
    if settings is None:
        if stage.directory.exists():
            raise ConfigError(
                f"{stage.directory} exists, but its record {stage.file(_RECORD)} does not; restore it, or move the "
                "directory away"
            )
        return False
    if isinstance(stage, TrainStage):
        newest = checkpoints(stage.directory)
        steps = settings["training"]["train_steps"]  # what it was to be, whatever it is to be now
        finished = checkpoint_path(stage.directory, stage.begin.step + steps).exists()
        if not finished and newest and newest[-1].name > stage.result.name:
            raise ConfigError(
                f"{newest[-1]} is beyond this stage's train_steps={stage.config.training.train_steps}; raise it, or "
                "remove the checkpoint"
            )
    else:
        finished = stage.directory.exists()
    if finished:
        _check_unchanged(stage, settings)
    return finished


def _read_record(stage: Stage) -> dict[str, Any] | None:
    path = stage.file(_RECORD)
    try:
        settings: dict[str, Any] = unseal(path.read_text(encoding="utf-8"))["settings"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: {error}; restore it, or remove it together with {stage.directory}") from None
    return settings


def _check_unchanged(stage: Stage, settings: dict[str, Any]) -> None:
    before, now = dict(_leaves(settings)), dict(_leaves(stage.settings))
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            was, wanted = (_said(values, key) for values in (before, now))
            raise ConfigError(
                f"{stage.name} is finished and was made with {was}, but the programme now says {wanted}; restore it "
                f"(a later stage may have its own value), or give another output_dir to begin anew"
            )


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _said(values: dict[str, Any], key: str) -> str:
    name = key.rpartition(".")[2]
    return f"{name}={values[key]}" if key in values else f"no {name}"
