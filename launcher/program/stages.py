"""The stages of a programme, worked out and checked as a whole before any of them starts."""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.program.config import ProgramConfig, StageConfig, naming
from launcher.program.growth import growth_sizes, growth_words
from launcher.start import deepspeed_command, megacore_command, mpi_command
from megacore.checkpoint.reader import CheckpointReader
from megacore.config import DataConfig, ParallelConfig, RunConfig
from megacore.errors import ConfigError
from megacore.growth.plan import Symmetry, make_plan
from megacore.model_config import ModelConfig
from megacore.settings import merge, validated
from megacore.training.batches import fitting_data
from megacore.training.deepspeed_config import resolve_deepspeed_config
from megacore.training.runs import checkpoint_path


@dataclass(frozen=True)
class State:
    """What one stage leaves and the next begins with."""

    model: ModelConfig
    step: int = 0
    """Optimizer steps over the whole lineage."""
    tensor_parallel_size: int = 1
    """Of the checkpoint's files."""
    checkpoint: Path | None = None
    """``None`` before anything is trained."""


@dataclass(frozen=True)
class Stage(ABC):
    """A stage as it will be run.

    Args:
        number: counted from one.
        directory: its own, in the programme's.
        processes: that work on it.
        sbatch: options of its Slurm job.
        settings: all that decides its result and is not the result of an earlier stage; what its record keeps.
        begin: what it starts from.
        end: what it leaves.
    """

    number: int
    directory: Path
    processes: int
    sbatch: tuple[str, ...]
    settings: dict[str, Any]
    begin: State
    end: State

    @property
    def name(self) -> str:
        """Name of the stage and its directory, e.g. ``02-grow``."""
        return self.directory.name

    @property
    def result(self) -> Path:
        """The checkpoint that the stage leaves."""
        assert self.end.checkpoint is not None
        return self.end.checkpoint

    def file(self, suffix: str) -> Path:
        """Return the path of a file beside the stage's directory."""
        return self.directory.with_name(self.name + suffix)

    @abstractmethod
    def command(self) -> list[str]:
        """Return the command line that does the stage, or goes on with it."""


@dataclass(frozen=True)
class TrainStage(Stage):
    """A run: ``megacore train``."""

    config: RunConfig
    tokens: float
    """About how many it trains on."""

    def command(self) -> list[str]:
        """Train on this machine, under the ``deepspeed`` launcher where there are several processes."""
        words = ("train", self.file(".yaml"))
        return megacore_command(*words) if self.processes == 1 else deepspeed_command(self.processes, *words)


@dataclass(frozen=True)
class GrowStage(Stage):
    """A growth: ``megacore grow``."""

    words: tuple[str, ...]

    def command(self) -> list[str]:
        """Grow on this machine, under ``mpirun`` where there are several processes."""
        assert self.begin.checkpoint is not None
        words: tuple[str | Path, ...] = ("grow", self.begin.checkpoint, self.directory, *self.words)
        return megacore_command(*words) if self.processes == 1 else mpi_command(self.processes, *words)


def plan_stages(program: ProgramConfig, where: str) -> list[Stage]:
    """Work out every stage; nothing is written.

    Args:
        program: the programme.
        where: its file, for errors.

    Raises:
        MegacoreError: a stage cannot be, whether for its configuration, the sizes before it, the number of processes
            or the data; the message names the file, the stage and the key.
    """
    parsed = program.parsed_stages(where)
    with naming(f"{where}: run"):
        state = _beginning(program.run)
    stages: list[Stage] = []
    for number, config in enumerate(parsed, 1):
        with naming(f"{where}: stage {number} ({config.kind})"):
            plan = _train_stage if config.kind == "train" else _grow_stage
            stages.append(plan(program, config, number, state))
            state = stages[-1].end
    return stages


def _beginning(run: Mapping[str, Any]) -> State:
    """Return what the first stage begins with: random weights, or the checkpoint that the run names."""
    for section in ("model", "training"):
        if not isinstance(run.get(section), dict):
            raise ConfigError(f"the section '{section}' is missing, or is no mapping of keys to values")
    model = validated(ModelConfig, run["model"])
    if "output_dir" in run["training"]:
        raise ConfigError("output_dir: each stage has its own in the programme's output_dir; remove it here")
    initial = run["training"].get("initial_checkpoint")
    if initial is None:
        return State(model)
    reader = CheckpointReader(Path(str(initial)))
    reader.check_model(model)
    manifest = reader.manifest
    return State(model, manifest.progress.step, manifest.layout.tensor_parallel_size, reader.path)


def _directory(program: ProgramConfig, config: StageConfig, number: int) -> Path:
    return program.output_dir / f"{number:02d}-{config.kind}"


def _train_stage(program: ProgramConfig, config: StageConfig, number: int, begin: State) -> TrainStage:
    assert config.train is not None
    directory, processes = _directory(program, config, number), config.processes or program.processes
    run = _run_config(program.run, config.train, begin, directory)
    replicas = run.parallel.data_parallel_size(processes)
    run.training.gradient_accumulation_steps(replicas)
    resolve_deepspeed_config(run, replicas)
    if run.data.validation_data is not None:
        fitting_data(run.data.validation_data, run.model)
    settings = run.model_dump(mode="json")
    del settings["training"]["output_dir"]  # it follows from the programme's
    if number > 1:
        del settings["training"]["initial_checkpoint"]  # so does an earlier stage's
    last = begin.step + run.training.train_steps
    tensor_parallel_size = run.parallel.tensor_parallel_size
    end = State(begin.model, last, tensor_parallel_size, checkpoint_path(directory, last))
    tokens = run.training.train_steps * _tokens_per_step(run.data, run.model, run.training.global_batch_size)
    return TrainStage(
        number, directory, processes, (*program.sbatch, *config.sbatch), settings, begin, end, run, tokens
    )


def _run_config(run: Mapping[str, Any], changes: Mapping[str, Any], begin: State, directory: Path) -> RunConfig:
    """Return the configuration of a stage's run, with the model as it has grown so far."""
    for key in changes:
        _check_change(key.rpartition(".")[2])
    training, changes = dict(run["training"]), dict(changes)
    for given in (training, changes):
        if "train_tokens" in given and "train_steps" in given:
            raise ConfigError("train_tokens and train_steps both say how long to train; give one of them")
    if "train_tokens" in changes or "train_steps" in changes:
        training.pop("train_tokens", None)
    tokens = changes.pop("train_tokens", training.pop("train_tokens", None))
    training["output_dir"] = str(directory)
    if begin.checkpoint is not None:
        training["initial_checkpoint"] = str(begin.checkpoint)
    values = {**run, "model": begin.model.model_dump(mode="json"), "training": training}
    if tokens is not None:
        # The schedule is checked once the number of steps is known.
        unscheduled = {"train_steps": 1, "warmup_steps": 0, "decay_steps": 0}
        config = validated(RunConfig, merge(RunConfig, values, {**changes, **unscheduled}))
        changes["train_steps"] = _steps(tokens, config)
    config = validated(RunConfig, merge(RunConfig, values, changes))
    fitting_data(config.data.train_data, config.model)
    return config


def _check_change(key: str) -> None:
    if key == "output_dir":
        raise ConfigError("output_dir: a stage's directory lies in the programme's output_dir; remove it")
    if key == "initial_checkpoint":
        raise ConfigError(
            "initial_checkpoint: a stage begins where the one before it ends; the first one's belongs into run.training"
        )
    if key in ModelConfig.model_fields and "dropout" not in key:
        raise ConfigError(f"{key}: training does not change the model; put it into run.model, or into a 'grow' stage")


def _steps(tokens: Any, config: RunConfig) -> int:
    """Return the steps that train on at least so many tokens, at the data's mean length."""
    if isinstance(tokens, bool) or not isinstance(tokens, (int, float)) or not 0 < tokens < math.inf:
        raise ConfigError(f"train_tokens={tokens!r}: expected a positive number")
    return math.ceil(tokens / _tokens_per_step(config.data, config.model, config.training.global_batch_size))


def _tokens_per_step(data: DataConfig, model: ModelConfig, global_batch_size: int) -> float:
    instances = fitting_data(data.train_data, model)
    return global_batch_size * instances.num_tokens / len(instances)


def _grow_stage(program: ProgramConfig, config: StageConfig, number: int, begin: State) -> GrowStage:
    assert config.grow is not None
    if begin.checkpoint is None:
        raise ConfigError(
            "there is nothing to grow yet; begin with a 'train' stage, or give initial_checkpoint in run.training"
        )
    sizes = growth_sizes(config.grow)
    words = growth_words(config.grow)
    layout = {"tensor_parallel_size": begin.tensor_parallel_size}
    layout |= {key: sizes.pop(key) for key in list(sizes) if key in ParallelConfig.model_fields}
    model = make_plan(begin.model, sizes, Symmetry()).target
    parallel = validated(ParallelConfig, layout)
    parallel.check(model)
    directory = _directory(program, config, number)
    return GrowStage(
        number,
        directory,
        config.processes or program.processes,
        (*program.sbatch, *config.sbatch),
        {"grow": json.loads(json.dumps(config.grow, default=str))},
        begin,
        State(model, begin.step, parallel.tensor_parallel_size, directory),
        words,
    )
