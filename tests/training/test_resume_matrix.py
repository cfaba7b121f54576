"""A run saved at any layout goes on at any other: the same bits are loaded, and the losses are those of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import write_checkpoint
from megacore.communicator import TorchRanks
from megacore.config import RunConfig
from megacore.parallel.grid import ParallelGrid
from megacore.training.distributed import join_world, leave_world
from megacore.training.loop import TrainingStage
from megacore.training.partition import pieces_to_write
from megacore.training.runs import checkpoint_path
from tests.models import reference_losses, run_config
from tests.ranks import run_ranks
from tests.training.test_layout_matrix import LLAMA, deepspeed, write_sequences
from tests.training.test_training_layouts import figures

pytestmark = pytest.mark.timeout(600)  # of 42 runs of four ranks, which share what processors there are
SAVED, LAST = 5, 15
SOURCES: dict[str, dict[str, Any]] = {
    "dp4 zero1": {},
    "dp4 zero2": {"deepspeed_config": deepspeed("zero2")},
    "dp4 zero3": {"deepspeed_config": deepspeed("zero3")},
    "tp2 pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "tp2 zero3": {"tensor_parallel_size": 2, "deepspeed_config": deepspeed("zero3")},
    "pp4": {"pipeline_parallel_size": 4, "pipeline_partition": "uniform"},
}
TARGETS: dict[str, dict[str, Any]] = {
    "tp4": {"tensor_parallel_size": 4},
    "tp2 zero1": {"tensor_parallel_size": 2},
    "tp2 zero2 offload": {"tensor_parallel_size": 2, "deepspeed_config": deepspeed("zero2_offload")},
    "pp2 dp2": {"pipeline_parallel_size": 2},
    "tp2 sp pp2": {"tensor_parallel_size": 2, "sequence_parallel": True, "pipeline_parallel_size": 2},
    "ulysses2 zero3": {"ulysses_parallel_size": 2, "deepspeed_config": deepspeed("zero3")},
}


def train(configs: list[RunConfig], sources: list[str | None]) -> None:
    """Train several runs; where there is a source, from a copy of it, which is written again right after loading."""
    device = join_world()
    group = TorchRanks()
    for config, source in zip(configs, sources, strict=True):
        path = checkpoint_path(config.training.output_dir, SAVED)
        if source is not None and group.rank == 0:
            shutil.copytree(source, path)
        group.all_gather(None)
        grid = ParallelGrid.create(config.parallel)
        stage = TrainingStage(config, grid, group, device)
        if source is not None:
            loaded = CheckpointReader(path).manifest
            files = [(f"rank{group.rank}.safetensors", pieces_to_write(stage._engine, grid))]
            again = config.training.output_dir / "again"
            write_checkpoint(again, group, files, loaded)
        stage.run()
    leave_world()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], RunConfig]:
    folder = tmp_path_factory.mktemp("resume")
    data = write_sequences(folder / "lm", "lm")

    def config(name: str, changes: dict[str, Any]) -> RunConfig:
        return run_config(folder / name, data, train_steps=LAST, eval_interval=0, keep_last=3, **{**LLAMA, **changes})

    made: dict[tuple[str, ...], RunConfig] = {(name,): config(name, changes) for name, changes in SOURCES.items()}
    sources: list[str | None] = [None] * len(made)
    for source in SOURCES:
        for target, changes in TARGETS.items():
            made[source, target] = config(f"{source} to {target}", changes)
            sources.append(str(checkpoint_path(made[source,].training.output_dir, SAVED)))
    run_ranks(train, 4, list(made.values()), sources, timeout=560)
    return made


@pytest.fixture(scope="module")
def reference(runs: dict[tuple[str, ...], RunConfig]) -> list[float]:
    return reference_losses(runs["dp4 zero1",], LAST)[0]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_run_saved_at_one_layout_goes_on_at_another(
    runs: dict[tuple[str, ...], RunConfig], reference: list[float], source: str, target: str
) -> None:
    config = runs[source, target]
    saved = CheckpointReader(checkpoint_path(config.training.output_dir, SAVED))
    again = CheckpointReader(Path(config.training.output_dir) / "again")
    again.check_coverage()
    for name in saved.manifest.parameters:
        for state in saved.manifest.states:
            assert np.array_equal(saved.read(name, state), again.read(name, state)), (name, state)
    uninterrupted = figures(runs[source,], "loss")[SAVED:]
    assert figures(config, "loss") == pytest.approx(uninterrupted, rel=1e-6)
    assert figures(config, "loss") == pytest.approx(reference[SAVED:], abs=1e-5)
