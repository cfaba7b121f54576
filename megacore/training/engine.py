"""The DeepSpeed engine with megacore's parameter groups: one optimizer step at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from megacore.checkpoint.manifest import Annealing
from megacore.config import RunConfig
from megacore.errors import ConfigError
from megacore.models.bert import Bert
from megacore.parallel.dropout import DropoutKeys
from megacore.parallel.grid import DeepSpeedGrid, ParallelGrid
from megacore.params import Declare, Parameter, declared, initialise
from megacore.training.batches import DeviceBatch
from megacore.training.metrics import Sums

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Multipliers:
    """What growth left for each parameter (by name): factors of the learning rate and of Adam's eps."""

    learning_rate: dict[str, float]
    adam_eps: dict[str, float]
    annealing: Annealing = field(default_factory=Annealing)


class TrainingEngine:
    """A model under DeepSpeed ZeRO.

    Args:
        config: of the run.
        grid: of the processes.
        device: of this process.
        settings: DeepSpeed's configuration, resolved.
        multipliers: of a grown model; ``None`` for one that was not grown.
    """

    def __init__(
        self,
        config: RunConfig,
        grid: ParallelGrid,
        device: torch.device,
        settings: dict[str, Any],
        multipliers: Multipliers | None = None,
    ) -> None:
        self._training, self._grid = config.training, grid
        declare = Declare(
            config.model,
            grid.tensor_parallel_rank,
            grid.tensor_parallel_size,
            device,
            DTYPES[config.training.dtype],
        )
        self.model = Bert(config.model, declare, grid)
        initialise(self.model, config.model, config.training.seed)
        self._annealing = multipliers.annealing if multipliers else Annealing()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DeepSpeed's notes on torch's deprecations
            self._engine, self.optimizer, _, _ = deepspeed.initialize(
                model=self.model,
                optimizer=torch.optim.AdamW(
                    _parameter_groups(self.model, config, multipliers),
                    lr=config.training.learning_rate,
                    betas=(config.training.adam_beta1, config.training.adam_beta2),
                ),
                config=settings,
                mpu=DeepSpeedGrid(grid),
                dist_init_required=False,
            )
        if not isinstance(self.optimizer, DeepSpeedZeroOptimizer):  # checkpoints read ZeRO's own partitions
            raise ConfigError(
                f"{config.training.deepspeed_config} makes DeepSpeed use {type(self.optimizer).__name__}; "
                "megacore works with ZeRO 1 and 2 (start from ds_configs/zero1.json)"
            )

    def step(self, batches: Sequence[DeviceBatch], step: int, learning_rate: float) -> tuple[Sums, float]:
        """Train on a replica's micro-batches of one global batch; return global sums and the gradient's norm.

        Args:
            batches: this replica's micro-batches.
            step: over the whole lineage, for the annealing of growth's multipliers.
            learning_rate: before multipliers.
        """
        self._set_learning_rates(step, learning_rate)
        # Each loss is a mean over the global batch: masked positions are counted before the first backward pass.
        counts = Sums.counted(batches).reduced(self._grid)
        # DeepSpeed divides by the number of micro-batches and of replicas; these losses are already shares of a mean.
        scale = len(batches) * self._grid.data_parallel_size
        sums = Sums.zero(batches[0].masked_labels.device)
        self._engine.train()
        for batch in batches:
            dropout = DropoutKeys(self._training.seed, batch.sample_index)
            logits = self._engine(batch.inputs, dropout)
            result = self.model.sums(logits, batch.masked_labels, batch.next_sentence_labels)
            loss = result.mlm_loss / counts.masked + result.nsp_loss / counts.samples
            self._engine.backward(loss * scale)
            self._engine.step()
            sums = sums.plus(result, batch)
        return sums.reduced(self._grid), float(self._engine.get_global_grad_norm())

    @torch.inference_mode()
    def evaluate(self, batches: Sequence[DeviceBatch]) -> Sums:
        """Return the sums over all replicas' batches, without dropout."""
        self._engine.eval()
        sums = Sums.zero(self.device)
        for batch in batches:
            result = self.model.sums(self.model(batch.inputs), batch.masked_labels, batch.next_sentence_labels)
            sums = sums.plus(result, batch)
        return sums.reduced(self._grid)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.nsp_head.bias.device

    def _set_learning_rates(self, step: int, learning_rate: float) -> None:
        exponent = self._annealing.exponent(step)
        for group in self.optimizer.param_groups:
            multiplier = group["multiplier"] ** exponent
            group["lr"] = learning_rate * multiplier
            # Decoupled decay is lr × weight_decay: growth leaves it as it was.
            group["weight_decay"] = self._training.weight_decay / multiplier if group["decays"] else 0.0


def _parameter_groups(model: Bert, config: RunConfig, multipliers: Multipliers | None) -> list[dict[str, Any]]:
    """Group the parameters that share learning-rate multiplier, eps and decay."""
    groups: dict[tuple[float, float, bool], list[Parameter]] = {}
    for name, parameter in declared(model):
        rate = multipliers.learning_rate[name] if multipliers else 1.0
        eps = multipliers.adam_eps[name] if multipliers else 1.0
        groups.setdefault((rate, eps, parameter.spec.is_matrix), []).append(parameter)
    return [
        {"params": members, "multiplier": rate, "eps": config.training.adam_eps * eps, "decays": decays}
        for (rate, eps, decays), members in groups.items()
    ]
