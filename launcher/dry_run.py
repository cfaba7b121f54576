"""``megacore train --dry-run``: the resolved configuration, and what each rank would need."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from megacore.config import RunConfig


def show_dry_run(config: RunConfig, processes: int) -> None:
    """Print the resolved configuration, parameters and memory per rank, and FLOPs per step.

    Raises:
        ConfigError: the run is impossible.
    """
    from megacore.training.dry_run import estimate

    found = estimate(config, processes)
    console = Console(highlight=False, soft_wrap=True)
    console.print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), markup=False)
    table = Table("stage", "parameters", "weights", "gradients", "optimizer", "activations", "GB per rank", box=None)
    for number, stage in enumerate(found.stages):
        parts = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.total)
        table.add_row(str(number), f"{stage.parameters:,}", *(f"{part / 1e9:.3f}" for part in parts))
    console.print(table)
    console.print(
        f"{processes} processes: {found.data_parallel_size} data-parallel replicas, "
        f"{found.gradient_accumulation_steps} micro-batches a step; "
        f"{found.flops_per_step:.3e} FLOPs a step at full length"
    )
