"""The DeepSpeed engine with megacore's parameter groups: one optimizer step at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from megacore.checkpoint.manifest import Annealing
from megacore.config import RunConfig
from megacore.models.batch import ModelBatch
from megacore.models.loss import LossSums
from megacore.nn.kit import Kit
from megacore.parallel.grid import DeepSpeedGrid, ParallelGrid
from megacore.params import PLACEHOLDER, Declare, declared
from megacore.training.metrics import Sums
from megacore.training.runners import make_runner, owned_names, stage_gather
from megacore.training.universal_info import add_universal_info

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Multipliers:
    """What growth left for each parameter (by name): factors of the learning rate and of Adam's eps."""

    learning_rate: dict[str, float]
    adam_eps: dict[str, float]
    annealing: Annealing = field(default_factory=Annealing)


class TrainingEngine:
    """A model under DeepSpeed.

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
        self._config, self._grid, self.device = config, grid, device
        self.before_update: Callable[[], None] = lambda: None
        """Called in every step when gradients are complete and nothing is changed yet."""
        declare = Declare(config.model, grid.shard, device, DTYPES[config.training.dtype])
        kit = Kit(config.model, declare, grid, config.training.seed, config.training.compile)
        self.zero_stage: int = settings["zero_optimization"]["stage"]
        self._runner = make_runner(config, kit, settings)
        self.model: nn.Module = self._runner.model
        self.owned = owned_names(self.model, grid)
        self._annealing = multipliers.annealing if multipliers else Annealing()
        optimizer = torch.optim.AdamW(
            _parameter_groups(self.model, config, multipliers, grid),
            lr=config.training.learning_rate,
            betas=(config.training.adam_beta1, config.training.adam_beta2),
        )
        if not config.model.num_experts:
            add_universal_info(self.model, config.model, config.parallel.pipeline_parallel_size > 1)
        optimizer.register_step_pre_hook(lambda *arguments: self.before_update())
        self._runner.start(optimizer)

    @property
    def gradient_rank(self) -> int:
        """Rank among the processes that share this one's optimizer state."""
        return DeepSpeedGrid(self._grid).get_data_parallel_rank()

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer, which wraps AdamW."""
        return self._runner.engine.optimizer

    @property
    def skipped(self) -> bool:
        """Whether the last step changed nothing, because fp16's gradients overflowed at the present loss scale."""
        return not self._runner.engine.was_step_applied()

    def step(self, batches: Sequence[ModelBatch], step: int, learning_rate: float) -> tuple[Sums, float]:
        """Train on a replica's micro-batches of one global batch; return global sums and the gradient's norm.

        Where fp16's gradients overflow, the step is skipped and the norm infinite.

        Args:
            batches: this replica's micro-batches.
            step: over the whole lineage, for the annealing of growth's multipliers.
            learning_rate: before multipliers.
        """
        self._set_learning_rates(step, learning_rate)
        # Each loss is a mean over the global batch: labels are counted before the first backward pass.
        counts = self._counted(batches)
        labels, samples, micro_batches = counts["labels"], counts["samples"], counts["micro_batches"]
        # DeepSpeed divides by the number of micro-batches and of replicas; these losses are already shares of a mean.
        scale = len(batches) * self._grid.gradient_size
        balance = self._config.model.router_aux_loss_coefficient / micro_batches

        def loss_of(result: LossSums) -> torch.Tensor:
            loss = result.token_loss / labels + result.pair_loss / samples + balance * result.balance_loss
            return scale * loss

        sums = self._runner.train(batches, loss_of)
        sums = sums.over_replicas(self._grid).over_stages(self._grid) + counts
        return sums, float(self._runner.engine.get_global_grad_norm())

    @torch.no_grad()
    def evaluate(self, batches: Sequence[ModelBatch]) -> Sums:
        """Return the sums over all replicas' batches, without dropout."""
        sums = self._runner.evaluate(batches)
        return sums.over_replicas(self._grid).over_stages(self._grid) + self._counted(batches)

    def _counted(self, batches: Sequence[ModelBatch]) -> Sums:
        """Count what all replicas have; Ulysses ranks share their batches, so one of them counts."""
        own = Sums.counted(batches) if batches else Sums.zero(self.device)
        if self._grid.ulysses_parallel_rank > 0:
            own = Sums.zero(self.device)
        return own.over_replicas(self._grid)

    def _set_learning_rates(self, step: int, learning_rate: float) -> None:
        exponent = self._annealing.exponent(step)
        for group in self.optimizer.param_groups:
            multiplier = group["multiplier"] ** exponent
            group["lr"] = learning_rate * multiplier
            # Decoupled decay is lr × weight_decay: growth leaves it as it was.
            group["weight_decay"] = self._config.training.weight_decay / multiplier if group["decays"] else 0.0


class _Kind(NamedTuple):
    """What the parameters of a group have in common."""

    learning_rate: float
    adam_eps: float
    decays: bool
    is_expert: bool


def _parameter_groups(
    model: nn.Module, config: RunConfig, multipliers: Multipliers | None, grid: ParallelGrid
) -> list[dict[str, Any]]:
    """Group the parameters that share learning-rate multiplier, eps, decay and ranks.

    Every pipeline stage has the same groups in the same order: DeepSpeed reduces the gradient's norm group by group,
    over all stages. A stage without parameters of a kind has one number of its own there, which nothing reads.
    """
    groups: dict[_Kind, list[nn.Parameter]] = {}
    for name, parameter in declared(model):
        rate = multipliers.learning_rate[name] if multipliers else 1.0
        eps = multipliers.adam_eps[name] if multipliers else 1.0
        kind = _Kind(rate, eps, parameter.spec.is_matrix, parameter.spec.expert_dim is not None)
        groups.setdefault(kind, []).append(parameter)
    kinds = sorted({kind for kinds in stage_gather(list(groups), grid) for kind in kinds})
    like = next(model.parameters()).detach().flatten()[:1]
    for number, kind in enumerate(kinds):
        if kind not in groups:
            groups[kind] = [nn.Parameter(torch.zeros_like(like))]
            model.register_parameter(f"{PLACEHOLDER}{number}", groups[kind][0])
    return [
        {
            "params": groups[kind],
            "multiplier": kind.learning_rate,
            "eps": config.training.adam_eps * kind.adam_eps,
            "decays": kind.decays,
            # DeepSpeed's words: whether, and over which ranks, a group's experts are averaged.
            **({"moe": True, "name": grid.expert_group_name} if kind.is_expert else {}),
        }
        for kind in kinds
    ]
