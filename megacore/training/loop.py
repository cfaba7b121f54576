"""The training loop: from a run's configuration to its checkpoints and curves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import yaml
from deepspeed.accelerator import get_accelerator

from data_pipeline.loader import Batch, PretrainingBatches
from megacore.checkpoint.attached import Attached
from megacore.checkpoint.manifest import (
    Layout,
    Manifest,
    parameter_records,
)
from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Communicator, TorchRanks, together
from megacore.config import RunConfig
from megacore.errors import CheckpointError, ConfigError, MegacoreError
from megacore.models.batch import ModelBatch
from megacore.models.flops import Work, training_flops
from megacore.models.transformer import declarations
from megacore.parallel.collectives import replica_sum
from megacore.parallel.grid import ParallelGrid
from megacore.publish import os_errors, replace_file
from megacore.training.batches import model_batch, open_data
from megacore.training.deepspeed_config import resolve_deepspeed_config
from megacore.training.distributed import join_world, leave_world
from megacore.training.engine import Multipliers, TrainingEngine
from megacore.training.loss_scaling import check_loss_scale, read_loss_scaling, set_loss_scaling
from megacore.training.metrics import MetricsLog, memory_gb
from megacore.training.partition import load_state, pieces_to_write
from megacore.training.progress import StepProgress
from megacore.training.runs import checkpoint_path, checkpoints, lock_run, point_latest, remove_old
from megacore.training.saver import Saver
from megacore.training.schedule import learning_rate
from megacore.training.start import Start, agree

_UNLOGGED = "figures could not be logged"
_LAST_SAVE_SECONDS = 120.0
"""What a failed run leaves its last checkpoint, which is good, to be written."""


def train(config: RunConfig) -> None:
    """Train a stage, from its last checkpoint if there is one; every process of the job calls this.

    Raises:
        MegacoreError: on every rank alike, if any rank finds something wrong before the first step.
    """
    device = join_world()
    if config.training.dtype == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError("dtype=fp16 does not work on this device; use bf16 or fp32")
    TrainingStage(config, ParallelGrid.create(config.parallel), TorchRanks(), device).run()
    leave_world()  # only after success: a rank that failed must end, not wait for the others


class TrainingStage:
    """A stage of training in an initialised world.

    Args:
        config: of the run.
        grid: of the processes.
        group: all processes.
        device: of this process.

    Raises:
        MegacoreError: on every rank alike, if any rank cannot start.
    """

    def __init__(self, config: RunConfig, grid: ParallelGrid, group: Communicator, device: torch.device) -> None:
        self._config, self._grid, self._group, self._device = config, grid, group, device
        self._training = config.training
        with together(group):
            self._data = open_data(config.data.train_data, config.model, group)
            held_out = config.data.validation_data
            self._validation = None if held_out is None else open_data(held_out, config.model, group)
            self._batches = PretrainingBatches(
                self._data,
                seed=self._training.seed,
                global_batch_size=self._training.global_batch_size,
                micro_batch_size=self._training.micro_batch_size,
                data_parallel_rank=grid.data_parallel_rank,
                data_parallel_size=grid.data_parallel_size,
                objective=config.model.objective,
            )
            settings = resolve_deepspeed_config(config, grid.data_parallel_size)
        agree(
            group,
            {
                "configuration": config.model_dump_json(),
                "train_data": self._data.digest,
                "validation_data": self._validation.digest if self._validation else None,
            },
        )
        with together(group), os_errors(self._training.output_dir, ConfigError):
            self._lock = lock_run(self._training.output_dir) if group.rank == 0 else None
        self._start = Start(config, self._training_data(), group)
        config = self._config = self._start.config
        self._engine = TrainingEngine(config, grid, device, settings, self._start.multipliers)
        self._start.load(self._load)
        self._warnings = self._start.settle()
        self._progress = self._start.progress
        self._log: MetricsLog | None = None
        saving = TorchRanks(apart=True) if self._training.async_save else group
        self._attached = Attached.of(self._start.reader.path if self._start.reader else None, group)
        self._saver = Saver(saving, self._training.async_save)
        self._engine.before_update = self._saver.wait_for_copy

    def _load(self, reader: CheckpointReader) -> None:
        load_state(self._engine, reader)
        set_loss_scaling(self._engine.optimizer, reader.manifest.progress.loss_scaling)

    def _training_data(self) -> dict[str, Any]:
        return {
            "digest": self._data.digest,
            "seed": self._training.seed,
            "global_batch_size": self._training.global_batch_size,
        }

    def run(self) -> None:
        """Train to the end of the stage."""
        last = self._progress.stage_first_step + self._training.train_steps
        with together(self._group):
            if self._group.rank == 0:
                self._log = self._open_log()
        display = StepProgress(self._progress.step, last, enabled=self._group.rank == 0)
        for text in (*self._warnings, self._where_from()):
            display.say(text)
        if self._progress.step >= last:
            display.say(
                f"this stage's {self._training.train_steps} steps are done; "
                "go on with a new output_dir and initial_checkpoint"
            )
        try:
            if self._progress.step == self._progress.stage_first_step:
                self._evaluate(display)
            while self._progress.step < last:
                self._step(display)
                step = self._progress.step
                if self._training.eval_interval and (step % self._training.eval_interval == 0 or step == last):
                    self._evaluate(display)
                if step % self._training.save_interval == 0 or step == last:
                    self._save(display)
            with self._naming_last_good():
                self._saver.wait()
        finally:
            failure = self._saver.finish(_LAST_SAVE_SECONDS)
            if failure is not None:
                display.say(f"the last checkpoint was not saved: {failure}")
            display.close()
            if self._log is not None:
                with display.surviving(_UNLOGGED):
                    self._log.close()

    def _open_log(self) -> MetricsLog:
        directory = self._training.output_dir
        with os_errors(directory, ConfigError):
            resolved = yaml.safe_dump(self._config.model_dump(mode="json"), sort_keys=False)
            replace_file(directory / "config.yaml", resolved.encode())
            return MetricsLog(directory, self._progress.step + 1)

    def _where_from(self) -> str:
        if self._start.reader is None:
            return "starting from random weights"
        layout = self._start.reader.manifest.layout
        return (
            f"{'resuming' if self._start.resumed else 'starting'} from {self._start.reader.path} "
            f"(step {self._progress.step}, saved at tp={layout.tensor_parallel_size} dp={layout.data_parallel_size}, "
            f"loading at tp={self._grid.tensor_parallel_size} dp={self._grid.data_parallel_size})"
        )

    def _step(self, display: StepProgress) -> None:
        began = time.perf_counter()
        progress, training = self._progress, self._training
        batches = self._on_device(self._batches.step_batches(progress.consumed_samples))
        rate = learning_rate(training, progress.step - progress.stage_first_step)
        sums, gradient_norm = self._engine.step(batches, progress.step, rate)
        means = sums.means(self._config.model.objective)
        skipped = self._engine.skipped
        if skipped:
            check_loss_scale(self._engine.optimizer, progress.step + 1)
        else:
            _check_finite(means["loss"], gradient_norm, progress.step + 1)
        seconds = time.perf_counter() - began
        self._progress = progress.model_copy(
            update={
                "step": progress.step + 1,
                "optimizer_step": progress.optimizer_step + (not skipped),
                "consumed_samples": progress.consumed_samples + training.global_batch_size,
                "tokens": progress.tokens + int(sums["tokens"]),
                "flops": progress.flops + self._flops(batches),
                "loss_scaling": read_loss_scaling(self._engine.optimizer),
            }
        )
        step = self._progress.step
        display.advance(means["loss"], sums["tokens"] / seconds)
        if self._log is not None and (step % training.log_interval == 0 or step == progress.stage_first_step + 1):
            figures = {
                **means,
                "learning_rate": rate,
                "tokens_per_second": sums["tokens"] / seconds,
                "tokens": self._progress.tokens,
                "flops": self._progress.flops,
                "seconds": seconds,
                "memory_gb": memory_gb(self._device),
            }
            if not skipped:  # else it is infinite
                figures["gradient_norm"] = gradient_norm
            if self._progress.loss_scaling is not None:
                figures["loss_scale"] = self._progress.loss_scaling.scale
            with display.surviving(_UNLOGGED):
                self._log.write("train", step, figures)

    def _on_device(self, batches: list[Batch]) -> list[ModelBatch]:
        return [model_batch(batch, self._device, self._grid.stream_part[1]) for batch in batches]

    def _flops(self, batches: list[ModelBatch]) -> float:
        """Count what all replicas computed in a step."""
        own = 0.0
        for batch in batches:
            lengths, samples = batch.sequences[0].tolist(), batch.num_samples
            target = () if batch.target_sequences is None else batch.target_sequences[0, :samples].tolist()
            own += training_flops(self._config.model, Work(lengths[:samples], len(batch.labels), target))
        total = torch.tensor([own], dtype=torch.float64, device=self._device)
        return float(replica_sum(total, self._grid)) / self._grid.ulysses_parallel_size

    def _evaluate(self, display: StepProgress) -> None:
        if self._validation is None or not self._training.eval_interval:
            return
        batches = PretrainingBatches(
            self._validation,
            seed=self._training.seed,
            global_batch_size=self._training.micro_batch_size * self._grid.data_parallel_size,
            micro_batch_size=self._training.micro_batch_size,
            data_parallel_rank=self._grid.data_parallel_rank,
            data_parallel_size=self._grid.data_parallel_size,
            objective=self._config.model.objective,
        ).evaluation_batches(self._training.eval_samples)
        means = self._engine.evaluate(self._on_device(batches)).means(self._config.model.objective)
        display.say(f"step {self._progress.step}: held-out loss {means['loss']:.4f}")
        if self._log is not None:
            figures = {**means, "tokens": self._progress.tokens, "flops": self._progress.flops}
            with display.surviving(_UNLOGGED):
                self._log.write("validation", self._progress.step, figures)

    def _save(self, display: StepProgress) -> None:
        run, training = self._training.output_dir, self._training
        path = checkpoint_path(run, self._progress.step)

        def done() -> None:
            if self._group.rank == 0:
                with display.surviving("latest could not be switched"):
                    point_latest(path)
                with display.surviving("old checkpoints could not be removed"):
                    remove_old(run, training.keep_last, training.keep_every)
            display.say(f"saved {path}")

        with self._naming_last_good():
            self._saver.save(
                path, pieces_to_write(self._engine, self._grid), self._manifest(), done, self._attached.write
            )

    @contextmanager
    def _naming_last_good(self) -> Iterator[None]:
        """Add to the error of a save what the run will go on from."""
        try:
            yield
        except CheckpointError as error:
            good = checkpoints(self._training.output_dir)
            left = f"the last good checkpoint is {good[-1]}" if good else "the run has no checkpoint yet"
            failure = CheckpointError(f"{error}; {left}")
            failure.agreed = error.agreed
            raise failure from error

    def _manifest(self) -> Manifest:
        """Describe the present state."""
        specs = declarations(self._config.model)
        kept = self._start.multipliers or Multipliers(dict.fromkeys(specs, 1.0), dict.fromkeys(specs, 1.0))
        return Manifest(
            model=self._config.model,
            layout=Layout(
                tensor_parallel_size=self._grid.tensor_parallel_size,
                pipeline_parallel_size=self._grid.pipeline_parallel_size,
                data_parallel_size=self._grid.data_parallel_size,
            ),
            progress=self._progress,
            annealing=kept.annealing,
            parameters=parameter_records(
                specs, {name: (kept.learning_rate[name], kept.adam_eps[name]) for name in specs}
            ),
            files={},
            lineage=self._start.reader.manifest.lineage if self._start.reader else (),
            training_data=self._training_data(),
        )


def _check_finite(loss: float, gradient_norm: float, step: int) -> None:
    if not (abs(loss) < float("inf") and abs(gradient_norm) < float("inf")):
        raise MegacoreError(
            f"step {step}: loss {loss}, gradient norm {gradient_norm}: training diverged; lower learning_rate or "
            "raise warmup_steps, and run again to go on from the last checkpoint"
        )
