"""Where a stage of training starts: a run's newest usable checkpoint, the one it is given, or random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megacore.checkpoint.manifest import STATES, Progress
from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Communicator, together
from megacore.config import RunConfig
from megacore.errors import CheckpointError, ConfigError, DamagedError
from megacore.model_config import NOT_GROWN, ModelConfig
from megacore.publish import os_errors
from megacore.training.engine import Multipliers
from megacore.training.runs import LATEST, checkpoints, followed, point_latest, remove_leftovers, set_aside


class Start:
    """What a stage goes on from; every rank of the job makes one, and calls its methods, together.

    A run's own checkpoint that is damaged is passed over for the one before it, by all ranks if any rank finds it
    damaged, whether when it is opened or when its values are read. One that does not fit the configuration, or cannot
    be read for another reason (no permission, another version of megacore), is not damaged: the run stops. Nor does a
    run that has checkpoints ever start from anything else.

    Args:
        config: of the run; ``self.config`` has what the checkpoint's model has from growing, too.
        training_data: what fixes the data order, as in the manifest.
        group: all processes.

    Raises:
        CheckpointError: no checkpoint of the run is usable, or ``initial_checkpoint`` is not.
        ConfigError: the checkpoint does not belong to this configuration, or ranks see different files.
    """

    def __init__(self, config: RunConfig, training_data: dict[str, Any], group: Communicator) -> None:
        self.config, self._training_data, self._group = config, training_data, group
        self._run = config.training.output_dir
        found = checkpoints(self._run)
        agree(group, {"newest checkpoint": found[-1].name if found else None})
        self._left: list[Path] = group.all_gather(found)[0]  # what was removed may still be listed on another node
        self._damaged: dict[Path, str] = {}
        self.resumed = bool(self._left)
        self.reader: CheckpointReader | None = None
        given = config.training.initial_checkpoint
        if self.resumed:
            self.reader = self._newest_usable()
        elif given is not None:
            path = followed(given, group)
            with together(group):
                self.reader = CheckpointReader(path)
        self._check()

    @property
    def progress(self) -> Progress:
        """How far training has come; a new stage begins where its first checkpoint ends."""
        if self.reader is None:
            return Progress()
        progress = self.reader.manifest.progress
        return progress if self.resumed else progress.model_copy(update={"stage_first_step": progress.step})

    @property
    def multipliers(self) -> Multipliers | None:
        """What a growth gave the parameters; the same in all checkpoints of a run."""
        if self.reader is None:
            return None
        parameters = self.reader.manifest.parameters
        return Multipliers(
            {name: record.learning_rate_multiplier for name, record in parameters.items()},
            {name: record.adam_eps_multiplier for name, record in parameters.items()},
            self.reader.manifest.annealing,
        )

    def load(self, load: Callable[[CheckpointReader], None]) -> None:
        """Load the checkpoint, if there is one, or the newest before it whose values are undamaged.

        Args:
            load: sets this rank's whole state; called again after it has failed half-way.
        """
        while self.reader is not None:
            try:
                with together(self._group):
                    load(self.reader)
                    self.reader.close()
                return
            except DamagedError as error:
                if not self.resumed:
                    raise
                self._damaged[self.reader.path] = str(error)
            self.reader = self._newest_usable()
            self._check()

    def settle(self) -> list[str]:
        """Put the run's directory in order; return what there is to say about damaged checkpoints.

        Only now that a usable checkpoint is loaded: a run that has none must find the same at its next start.
        """
        with together(self._group), os_errors(self._run, CheckpointError):
            if self._group.rank == 0:
                remove_leftovers(self._run)
                if self.reader is not None and self.resumed:
                    point_latest(self.reader.path)
                else:
                    (self._run / "checkpoints" / LATEST).unlink(missing_ok=True)
                for path in self._damaged:
                    set_aside(path)
        return [
            f"{message}: passing over {path.name}, which is kept as {path.name}.damaged"
            for path, message in self._damaged.items()
        ]

    def _newest_usable(self) -> CheckpointReader:
        """Open the newest of the checkpoints that were not tried yet."""
        while self._left:
            path = self._left.pop()
            try:
                with together(self._group):
                    return _opened(path)
            except DamagedError as error:
                self._damaged[path] = str(error)
        failure = CheckpointError(
            f"no checkpoint of {self._run} is usable: {'; '.join(self._damaged.values())}; restore one, or start a new "
            "run in another output_dir"
        )
        failure.agreed = True
        raise failure

    def _check(self) -> None:
        """Refuse a checkpoint that does not belong to this configuration, or of which ranks see different ones."""
        reader = self.reader
        agree(self._group, {"checkpoint": reader.manifest.digest if reader else None})
        if reader is None:
            return
        with together(self._group):
            reader.specs()
            self.config = _with_grown_keys(self.config, reader.manifest.model)
            reader.check_model(self.config.model)
            for key, wanted in self._training_data.items() if self.resumed else ():
                saved = reader.manifest.training_data.get(key)
                if saved != wanted:
                    raise ConfigError(
                        f"{reader.path} was trained with the data order of {key}={saved}, the configuration now gives "
                        f"{wanted}; restore it, or start a new run with initial_checkpoint and another output_dir"
                    )


def _with_grown_keys(config: RunConfig, model: ModelConfig) -> RunConfig:
    """Take from a checkpoint what growing has set, where a run's configuration does not say it."""
    left = [key for key in (*NOT_GROWN, "logit_multiplier") if key not in config.model.model_fields_set]
    grown = config.model.model_copy(update={key: getattr(model, key) for key in left})
    return config.model_copy(update={"model": grown})


def agree(group: Communicator, seen: Mapping[str, str | None]) -> None:
    """Refuse ranks that see different files: on a directory of each node's own, or a stale one.

    Args:
        group: all processes.
        seen: what this rank sees, by what it is.

    Raises:
        ConfigError: on every rank, naming what differs.
    """
    for rank, other in enumerate(group.all_gather(seen)):
        for what in seen:
            if other[what] != seen[what]:
                error = ConfigError(
                    f"ranks {rank} and {group.rank} see different {what}: output_dir, initial_checkpoint and "
                    "the data must be on a file system that all nodes share"
                )
                error.agreed = True
                raise error


def _opened(path: Path) -> CheckpointReader:
    """Open a run's own checkpoint, which always holds the optimizer's state."""
    reader = CheckpointReader(path)
    for state in STATES:
        if state not in reader.manifest.states:
            raise DamagedError(f"{path} lacks the optimizer's state {state}")
    return reader
