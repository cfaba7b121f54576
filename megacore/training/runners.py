"""Forward and backward over a replica's micro-batches: by one process for all layers, or stage by stage."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import deepspeed
import torch
from torch import Tensor, nn

from megacore.config import RunConfig
from megacore.models.batch import ModelBatch
from megacore.models.loss import Loss, LossSums
from megacore.models.stages import first_inputs, pipeline_module
from megacore.models.transformer import Transformer
from megacore.nn.kit import Kit
from megacore.parallel.grid import DeepSpeedGrid, ParallelGrid
from megacore.params import declared, initialise
from megacore.training.metrics import Sums

LossOf = Callable[[LossSums], Tensor]
"""What is differentiated, of a micro-batch's sums."""


class Runner(Protocol):
    """Runs this process's part of the model."""

    model: nn.Module
    engine: Any

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the model under DeepSpeed."""

    def train(self, batches: Sequence[ModelBatch], loss_of: LossOf) -> Sums:
        """Make one optimizer step out of all micro-batches; return what this process measured."""

    def evaluate(self, batches: Sequence[ModelBatch]) -> Sums:
        """Return what this process measures without training."""


def make_runner(config: RunConfig, kit: Kit, settings: dict[str, Any]) -> Runner:
    """Return the runner for a layout, its model set to the initial weights.

    Args:
        config: of the run.
        kit: what the model's parts are made with.
        settings: DeepSpeed's configuration, resolved.
    """
    if config.parallel.pipeline_parallel_size > 1:
        return PipelineRunner(config, kit, settings)
    return WholeRunner(config, kit, settings)


class WholeRunner:
    """All layers in this process; any ZeRO stage."""

    def __init__(self, config: RunConfig, kit: Kit, settings: dict[str, Any]) -> None:
        self._grid, self._loss, self._settings = kit.grid, Loss(config.model, kit.grid), settings

        def finish(layer: nn.Module) -> None:
            initialise(layer, config.model, config.training.seed)
            if settings["zero_optimization"]["stage"] == 3:
                self._take_apart(layer)

        self.model: nn.Module = Transformer(kit, config.training.activation_checkpointing, finish)
        self.engine: Any = None

    def _take_apart(self, layer: nn.Module) -> None:
        """Leave each replica its part of a layer's weights, so that a model larger than one device can be made."""
        with _quiet():
            deepspeed.zero.Init(
                layer,
                data_parallel_group=self._grid.gradient_group,
                config_dict_or_path=copy.deepcopy(self._settings),
                mpu=DeepSpeedGrid(self._grid),
            )

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the model under DeepSpeed."""
        self.engine = _deepspeed(self.model, optimizer, self._settings, mpu=DeepSpeedGrid(self._grid))

    def train(self, batches: Sequence[ModelBatch], loss_of: LossOf) -> Sums:
        """Make one optimizer step out of all micro-batches; return what this process measured."""
        self.engine.train()
        sums = Sums.zero(self.engine.device)
        for batch in batches:
            result = self._loss.sums(self.engine(batch), self._loss.label_values(batch))
            self.engine.backward(loss_of(result))
            self.engine.step()
            sums = sums + Sums.measured(result)
        return sums

    def evaluate(self, batches: Sequence[ModelBatch]) -> Sums:
        """Return what this process measures without training."""
        self.engine.eval()
        sums = Sums.zero(self.engine.device)
        for batch in batches:
            sums = sums + Sums.measured(self._loss.sums(self.engine(batch), self._loss.label_values(batch)))
        return sums


class PipelineRunner:
    """A stage of the layers in this process (DeepSpeed's pipeline engine)."""

    def __init__(self, config: RunConfig, kit: Kit, settings: dict[str, Any]) -> None:
        self._loss, self._settings = Loss(config.model, kit.grid), settings
        self._inputs = first_inputs(kit)
        self._is_last = kit.grid.pipeline_parallel_rank == kit.grid.pipeline_parallel_size - 1
        self.model: nn.Module = pipeline_module(
            kit, config.parallel.pipeline_partition, self._measured_loss, config.training.activation_checkpointing
        )
        initialise(self.model, config.model, config.training.seed)
        self.engine: Any = None
        self._loss_of: LossOf | None = None
        self._sums: Sums | None = None

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the stage under DeepSpeed."""
        pipeline = {"pipe_partitioned": False, "grad_partitioned": False}
        self.engine = _deepspeed(self.model, optimizer, self._settings | {"pipeline": pipeline}, mpu=None)
        # DeepSpeed reuses a buffer by its place in the tuple, whatever the dtype: activations and gradients differ.
        self.engine._allocate_or_extend_buffers = lambda place, shape, dtype: torch.empty(
            shape, dtype=dtype, device=self.engine.device
        )

    def train(self, batches: Sequence[ModelBatch], loss_of: LossOf) -> Sums:
        """Make one optimizer step out of all micro-batches; return what this process measured."""
        self._loss_of, self._sums = loss_of, Sums.zero(self.engine.device)
        self.engine.train_batch(self._iterator(batches))
        return self._sums

    def evaluate(self, batches: Sequence[ModelBatch]) -> Sums:
        """Return what this process measures without training."""
        self._loss_of, self._sums = None, Sums.zero(self.engine.device)
        self.engine.eval_batch(self._iterator(batches), num_micro_batches=len(batches))
        return self._sums

    def _iterator(self, batches: Sequence[ModelBatch]) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        for batch in batches:
            yield batch.inputs(self._inputs), self._loss.label_values(batch)

    def _measured_loss(self, outputs: tuple[Tensor, ...], labels: tuple[Tensor, ...]) -> Tensor:
        result = self._loss.sums(outputs, labels)
        assert self._sums is not None
        self._sums = self._sums + Sums.measured(result)
        return result.token_loss if self._loss_of is None else self._loss_of(result)


def _deepspeed(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], mpu: DeepSpeedGrid | None
) -> Any:
    with _quiet():
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=mpu, dist_init_required=False
        )
    return engine


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what DeepSpeed prints, and its notes on torch's deprecations."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def stage_gather(item: Any, grid: ParallelGrid) -> list[Any]:
    """Return what every pipeline stage has, in their order."""
    if grid.pipeline_parallel_size == 1:
        return [item]
    everywhere: list[Any] = [None] * grid.pipeline_parallel_size
    torch.distributed.all_gather_object(everywhere, item, group=grid.pipeline_parallel_group)
    return everywhere


def owned_names(model: nn.Module, grid: ParallelGrid) -> set[str]:
    """Return the parameters that this stage answers for: of a tied one's copies, the first stage's."""
    own = [name for name, _ in declared(model)]
    everywhere = stage_gather(own, grid)
    return set(own) - {name for names in everywhere[: grid.pipeline_parallel_rank] for name in names}
