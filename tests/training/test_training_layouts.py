"""Training computes the same at every layout, and a resumed run what an uninterrupted one does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Alone, TorchRanks
from megacore.config import ParallelConfig, RunConfig
from megacore.growth.execute import GrowthOutput, grow_checkpoint
from megacore.growth.plan import Symmetry, make_plan
from megacore.parallel.grid import ParallelGrid
from megacore.training.distributed import join_world, leave_world
from megacore.training.loop import TrainingStage
from megacore.training.runs import checkpoint_path, checkpoints
from tests.models import reference_losses, run_config, write_instances
from tests.ranks import run_ranks

STEPS = 10


def train_all(configs: list[RunConfig], copies: list[tuple[str, str] | None]) -> None:
    """Train several runs in one world, one after the other; before each, rank 0 copies a checkpoint into its place."""
    device = join_world()
    group = TorchRanks()
    for config, copy in zip(configs, copies, strict=True):
        if copy is not None and group.rank == 0:
            shutil.copytree(*copy)
        group.all_gather(None)
        TrainingStage(config, ParallelGrid.create(config.parallel), group, device).run()
    leave_world()


def figures(config: RunConfig, name: str, split: str = "train") -> list[float]:
    lines = (config.training.output_dir / "metrics.jsonl").read_text().splitlines()
    values = {line["step"]: line[name] for line in map(json.loads, lines) if line["split"] == split}
    return [values[step] for step in sorted(values)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_instances(tmp_path_factory.mktemp("data") / "instances")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, RunConfig]:
    """Train every layout for ten steps, with dropout on; resume some from their fifth step, at other layouts too."""
    folder = tmp_path_factory.mktemp("runs")

    def config(name: str, **changes: Any) -> RunConfig:
        return run_config(folder / name, data, **changes)

    zero2, zero3 = (str(Path(__file__).parents[2] / "ds_configs" / f"{name}.json") for name in ("zero2", "zero3"))
    resumable: dict[str, dict[str, Any]] = {
        "tp2": {"tensor_parallel_size": 2},
        "dp2": {},
        "pp2": {"pipeline_parallel_size": 2},
        "zero3": {"deepspeed_config": zero3},
        "experts": {"num_experts": 4, "expert_parallel_size": 2},
    }
    made = {
        "single": config("single"),
        **{name: config(name, **changes) for name, changes in resumable.items()},
        **{f"{name} resumed": config(f"{name}-resumed", **changes) for name, changes in resumable.items()},
        "dp2 zero2": config("dp2-zero2", deepspeed_config=zero2),
        "bf16 tp2": config("bf16-tp2", tensor_parallel_size=2, dtype="bf16"),
        "tp2 dp2": config("tp2-dp2", tensor_parallel_size=2),
        "tp4": config("tp4", tensor_parallel_size=4),
        "single resumed": config("single-resumed"),
        "tp2 from dp2": config("tp2-from-dp2", tensor_parallel_size=2),
        "dp2 from tp2": config("dp2-from-tp2"),
        "tp2 dp2 from single": config("tp2-dp2-from-single", tensor_parallel_size=2),
        "fresh adam": config("fresh-adam", initial_checkpoint=str(folder / "weights-only")),
        "fresh adam resumed": config("fresh-adam-resumed", initial_checkpoint=str(folder / "weights-only")),
    }

    def start(name: str, source: str) -> tuple[str, str]:
        paths = (checkpoint_path(made[run].training.output_dir, STEPS // 2) for run in (source, name))
        first, second = map(str, paths)
        return first, second

    launches: dict[int, dict[str, str | None]] = {
        1: {"single": None, "single resumed": "single"},
        2: {
            **dict.fromkeys([*resumable, "dp2 zero2", "bf16 tp2"]),
            **{f"{name} resumed": name for name in resumable},
            "tp2 from dp2": "dp2",
            "dp2 from tp2": "tp2",
        },
        4: {"tp2 dp2": None, "tp4": None, "tp2 dp2 from single": "single"},
    }
    launches_after_growth = ("fresh adam", "fresh adam resumed")
    for world, cases in launches.items():
        copies = [None if source is None else start(name, source) for name, source in cases.items()]
        run_ranks(train_all, world, [made[name] for name in cases], copies)
    grow_with_fresh_adam(checkpoint_path(made["single"].training.output_dir, STEPS), folder / "weights-only")
    source, target = (
        str(checkpoint_path(made[name].training.output_dir, STEPS + STEPS // 2)) for name in launches_after_growth
    )
    run_ranks(train_all, 1, [made[name] for name in launches_after_growth], [None, (source, target)])
    return made


def grow_with_fresh_adam(source: Path, target: Path) -> None:
    reader = CheckpointReader(source)
    plan = make_plan(reader.manifest.model, {}, Symmetry())
    grow_checkpoint(reader, plan, target, GrowthOutput(ParallelConfig(), keep_optimizer=False), Alone())


@pytest.fixture(scope="module")
def reference(runs: dict[str, RunConfig]) -> tuple[list[float], list[float]]:
    return reference_losses(runs["single"], STEPS)


LAYOUTS = ["single", "tp2", "dp2", "dp2 zero2", "tp2 dp2", "tp4"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_equal_plain_torch(
    runs: dict[str, RunConfig], reference: tuple[list[float], list[float]], layout: str
) -> None:
    losses, norms = reference
    assert min(norms) > 0.1  # clipping is active throughout
    assert max(losses) - min(losses) > 0.1  # and the weights move
    assert figures(runs[layout], "loss") == pytest.approx(losses, abs=1e-5)
    assert figures(runs[layout], "gradient_norm") == pytest.approx(norms, abs=1e-5)


def test_bf16_follows_the_fp32_run(runs: dict[str, RunConfig], reference: tuple[list[float], list[float]]) -> None:
    # bf16 has 8 bits of precision: losses agree to some 1e-2 of their size, and clearly do not stay where they were.
    assert figures(runs["bf16 tp2"], "loss") == pytest.approx(reference[0], rel=3e-2)


@pytest.mark.parametrize("resumed", ["single", "tp2", "dp2", "pp2", "zero3", "experts"])
def test_a_resumed_run_ends_with_the_same_bits(runs: dict[str, RunConfig], resumed: str) -> None:
    readers = [
        CheckpointReader(checkpoint_path(runs[name].training.output_dir, STEPS))
        for name in (resumed, f"{resumed} resumed")
    ]
    first, second = (reader.manifest for reader in readers)
    assert first.states == ("weight", "exp_avg", "exp_avg_sq")
    assert first.files == second.files  # all checksums
    assert first.progress == second.progress
    assert figures(runs[resumed], "loss")[STEPS // 2 :] == figures(runs[f"{resumed} resumed"], "loss")


def test_a_fresh_adam_is_resumed_at_its_own_step(runs: dict[str, RunConfig]) -> None:
    """Its bias correction counts from the growth, not from the lineage's first step."""
    first, second = (
        CheckpointReader(checkpoint_path(runs[name].training.output_dir, 2 * STEPS)).manifest
        for name in ("fresh adam", "fresh adam resumed")
    )
    assert first.files == second.files
    assert (first.progress.step, first.progress.optimizer_step) == (2 * STEPS, STEPS)


@pytest.mark.parametrize("name", ["tp2 from dp2", "dp2 from tp2", "tp2 dp2 from single"])
def test_a_run_resumed_at_another_layout_goes_on_alike(
    runs: dict[str, RunConfig], reference: tuple[list[float], list[float]], name: str
) -> None:
    assert figures(runs[name], "loss") == pytest.approx(reference[0][STEPS // 2 :], abs=1e-5)


@pytest.mark.parametrize("layout", ["tp2", "dp2", "pp2", "zero3", "tp2 dp2", "tp4"])
def test_checkpoints_of_all_layouts_hold_the_same_model_and_optimizer(runs: dict[str, RunConfig], layout: str) -> None:
    single, other = (
        CheckpointReader(checkpoint_path(runs[name].training.output_dir, STEPS)) for name in ("single", layout)
    )
    other.check_coverage()
    for name in single.manifest.parameters:
        for state in single.manifest.states:
            a, b = (torch.from_numpy(reader.read(name, state)) for reader in (single, other))
            assert torch.allclose(a, b, rtol=1e-3, atol=2e-5), (name, state)


def test_held_out_figures_do_not_depend_on_the_layout(runs: dict[str, RunConfig]) -> None:
    expected = figures(runs["single"], "loss", "validation")
    assert len(expected) == 3
    for layout in LAYOUTS:
        assert figures(runs[layout], "loss", "validation") == pytest.approx(expected, abs=1e-5)


def test_metrics_carry_all_figures_and_tensorboard_has_them(runs: dict[str, RunConfig]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = runs["tp2"].training.output_dir
    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    wanted = {"loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "learning_rate", "gradient_norm"}
    wanted |= {"tokens_per_second", "flops", "memory_gb", "tokens"}
    assert {f"train/{name}" for name in wanted} <= set(board.Tags()["scalars"])
    logged = [event.value for event in board.Scalars("train/loss")]
    assert logged == pytest.approx(figures(runs["tp2"], "loss"), rel=1e-6)


def test_old_checkpoints_are_removed(runs: dict[str, RunConfig]) -> None:
    for config in runs.values():
        assert len(checkpoints(config.training.output_dir)) == config.training.keep_last
        names = {path.suffix for path in (config.training.output_dir / "checkpoints").iterdir()}
        assert names == {""}
