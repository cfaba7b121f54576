"""DeepSpeed's own engine saves what megacore reads, and loads what megacore writes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.start import megacore_command, mpi_command
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import write_checkpoint
from megacore.communicator import Alone, TorchRanks
from megacore.config import ParallelConfig, RunConfig
from megacore.convert.deepspeed import DeepSpeedSource
from megacore.convert.imports import import_checkpoint
from megacore.convert.universal import export_universal
from megacore.errors import CheckpointError, ConfigError
from megacore.parallel.grid import ParallelGrid
from megacore.training.distributed import join_world, leave_world
from megacore.training.loop import TrainingStage
from megacore.training.partition import pieces_to_write
from megacore.training.runs import checkpoint_path
from tests.convert.test_convert_command import run
from tests.models import run_config
from tests.ranks import run_ranks
from tests.training.test_layout_matrix import LLAMA, deepspeed, write_sequences

STEPS = 3
VOCAB = 104
"""DeepSpeed cuts tables into equal parts only."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4 zero1": {},
    "dp4 zero2": {"deepspeed_config": deepspeed("zero2")},
    "dp4 zero3": {"deepspeed_config": deepspeed("zero3")},
    "tp2 dp2 zero1": {"tensor_parallel_size": 2},
    "tp2 dp2 zero3": {"tensor_parallel_size": 2, "deepspeed_config": deepspeed("zero3")},
    "tp2 pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}
LOADS = ("dp4 zero1", "dp4 zero2", "dp4 zero3", "tp2 dp2 zero1", "tp2 pp2")
"""DeepSpeed itself cannot load a universal checkpoint under ZeRO 3 with another library's tensor parallelism."""


def save_both(configs: list[RunConfig]) -> None:
    """Train; then save by megacore (at the end) and by DeepSpeed."""
    device = join_world()
    group = TorchRanks()
    for config in configs:
        stage = TrainingStage(config, ParallelGrid.create(config.parallel), group, device)
        stage.run()
        stage._engine._runner.engine.save_checkpoint(str(config.training.output_dir / "native"))
    leave_world()


def load_universal(configs: list[RunConfig], universal: Path) -> None:
    """Let DeepSpeed load a universal checkpoint, and write what it holds then."""
    device = join_world()
    group = TorchRanks()
    for config in configs:
        grid = ParallelGrid.create(config.parallel)
        stage = TrainingStage(config, grid, group, device)
        engine = stage._engine._runner.engine
        engine._config.load_universal_checkpoint = True  # {"checkpoint": {"load_universal": true}}
        pipeline = config.parallel.pipeline_parallel_size > 1
        path, _ = engine.load_checkpoint(str(universal / ("pipeline" if pipeline else "whole")))
        assert path is not None
        assert {int(state["step"]) for state in engine.optimizer.optimizer.state.values()} == {STEPS}
        loaded = DeepSpeedSource(universal / "whole").manifest
        files = [(f"rank{group.rank}.safetensors", pieces_to_write(stage._engine, grid))]
        target = config.training.output_dir / "loaded"
        write_checkpoint(target, group, files, loaded)
    leave_world()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunConfig]:
    folder = tmp_path_factory.mktemp("deepspeed")
    data = write_sequences(folder / "lm", "lm", vocab_size=VOCAB)
    made = {
        name: run_config(
            folder / name, data, train_steps=STEPS, eval_interval=0, **{**LLAMA, **changes, "vocab_size": VOCAB}
        )
        for name, changes in LAYOUTS.items()
    }
    run_ranks(save_both, 4, list(made.values()), timeout=240)
    return made


def saved(config: RunConfig) -> CheckpointReader:
    return CheckpointReader(checkpoint_path(config.training.output_dir, STEPS))


def assert_same(first: CheckpointReader, second: CheckpointReader) -> None:
    assert first.manifest.states == second.manifest.states == ("weight", "exp_avg", "exp_avg_sq")
    for name in first.manifest.parameters:
        for state in first.manifest.states:
            assert np.array_equal(first.read(name, state), second.read(name, state)), (name, state)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_native_checkpoints_are_read_bit_for_bit(runs: dict[str, RunConfig], layout: str, tmp_path: Path) -> None:
    config = runs[layout]
    parallel = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
    source = config.training.output_dir / "native"
    import_checkpoint(lambda: DeepSpeedSource(source, config.model), tmp_path / "imported", parallel, Alone())
    imported = CheckpointReader(tmp_path / "imported")
    imported.check_coverage()
    assert_same(imported, saved(config))
    assert imported.manifest.progress.step == imported.manifest.progress.optimizer_step == STEPS


@pytest.mark.parametrize("layout", ["tp2 dp2 zero1", "dp4 zero3", "tp2 dp2 zero3", "tp2 pp2"])
def test_what_deepspeeds_own_tool_makes_of_them_is_read_bit_for_bit(
    runs: dict[str, RunConfig], layout: str, tmp_path: Path
) -> None:
    config = runs[layout]
    source, universal = config.training.output_dir / "native" / f"global_step{STEPS}", tmp_path / "universal"
    tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    run([*tool, "--input_folder", str(source), "--output_folder", str(universal), *workers])
    import_checkpoint(
        lambda: DeepSpeedSource(universal, config.model), tmp_path / "imported", ParallelConfig(), Alone()
    )
    imported = CheckpointReader(tmp_path / "imported")
    assert_same(imported, saved(config))
    assert imported.manifest.progress.step == imported.manifest.progress.optimizer_step == STEPS


def test_the_command_reads_them_under_mpirun_with_the_runs_configuration(
    runs: dict[str, RunConfig], tmp_path: Path
) -> None:
    config = runs["tp2 dp2 zero1"]
    (tmp_path / "run.yaml").write_text(json.dumps({"model": config.model.model_dump(mode="json")}))
    native, target = config.training.output_dir / "native", tmp_path / "imported"
    said = run(mpi_command(2, "convert", native, target, "--config", tmp_path / "run.yaml"))
    assert "deepspeed → megacore" in said
    assert_same(CheckpointReader(target), saved(config))


def test_universal_checkpoints_go_round_and_into_deepspeeds_engine(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    source = saved(runs["tp2 pp2"])
    run(megacore_command("convert", source.path, tmp_path / "whole", "--to", "deepspeed-universal"))
    export_universal(source, tmp_path / "pipeline", ParallelConfig(pipeline_parallel_size=2), Alone())
    for name in ("whole", "pipeline"):
        back = tmp_path / f"{name} back"
        run(megacore_command("convert", tmp_path / name, back, "tensor_parallel_size=2", "pipeline_parallel_size=2"))
        assert_same(CheckpointReader(back), source)
        assert CheckpointReader(back).manifest.progress == source.manifest.progress
    folder = tmp_path / "runs"
    configs = [
        runs[name].model_copy(update={"training": runs[name].training.model_copy(update={"output_dir": folder / name})})
        for name in LOADS
    ]
    run_ranks(load_universal, 4, configs, tmp_path, timeout=240)
    for config in configs:
        assert_same(CheckpointReader(config.training.output_dir / "loaded"), source)


def test_what_is_missing_or_damaged_is_named(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    config = runs["tp2 dp2 zero1"]
    native = tmp_path / "native"
    shutil.copytree(config.training.output_dir / "native", native)
    with pytest.raises(ConfigError, match="--config"):
        DeepSpeedSource(native)
    other = config.model.model_copy(update={"num_hidden_layers": config.model.num_hidden_layers + 1})
    with pytest.raises(CheckpointError, match="is missing; is --config"):
        DeepSpeedSource(native, other)
    heads = config.model.num_attention_heads * 2  # the same names and numbers of entries
    other = config.model.model_copy(update={"num_attention_heads": heads, "head_dim": config.model.head_dim // 2})
    with pytest.raises(CheckpointError, match="query_weight has the shape"):
        DeepSpeedSource(native, other)
    smaller = config.model.model_copy(update={"max_position_embeddings": 16, "intermediate_size": 32})
    with pytest.raises(CheckpointError, match="has the shape"):
        DeepSpeedSource(native, smaller)
    victim = next(native.glob("*/*zero_pp_rank_1_mp_rank_01_optim_states.pt"))
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=victim.name):
        DeepSpeedSource(native, config.model)
    victim.unlink()
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_1_mp_rank_01_optim_states\.pt is missing"):
        DeepSpeedSource(native, config.model)


@pytest.mark.parametrize("damage", ["missing", "truncated", "shape", "moment's shape", "no parameter", "no tensor"])
def test_a_parameters_file_that_cannot_be_is_named(runs: dict[str, RunConfig], damage: str, tmp_path: Path) -> None:
    source = saved(runs["dp4 zero1"])
    export_universal(source, tmp_path / "universal", ParallelConfig(), Alone())
    folder = next(tmp_path.glob("universal/*/zero/steps.2.*mlp.up_weight"))
    file, states = folder / "exp_avg_sq.pt", ("exp_avg", "exp_avg_sq", "fp32")
    named = rf"mlp\.up_weight/{file.name}"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif damage == "no tensor":
        torch.save({"param": 1}, file)
    elif damage == "no parameter":
        shutil.rmtree(folder)
        named = r"steps\.2\..*up_weight is missing"
    else:
        for state in states if damage == "shape" else ("exp_avg_sq",):
            torch.save({"param": torch.zeros(7)}, folder / f"{state}.pt")
        named = r"mlp\.up_weight/fp32\.pt: .* has the shape" if damage == "shape" else named
    with pytest.raises(CheckpointError, match=named):
        DeepSpeedSource(tmp_path / "universal")


@pytest.mark.parametrize("damage", ["missing", "shorter", "no shapes"])
def test_a_ranks_file_that_cannot_be_is_named(runs: dict[str, RunConfig], damage: str, tmp_path: Path) -> None:
    config = runs["tp2 dp2 zero1"]
    shutil.copytree(config.training.output_dir / "native", tmp_path / "native")
    file = next(tmp_path.glob("native/*/mp_rank_01_model_states.pt"))
    if damage == "shorter":
        file = next(tmp_path.glob("native/*/zero_pp_rank_0_mp_rank_01_optim_states.pt"))
        content = torch.load(file, weights_only=False)
        flat = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
        flat[0] = flat[0][:-100].clone()
        torch.save(content, file)
    elif damage == "missing":
        file.unlink()
    else:
        torch.save({"module": {}}, file)
        file = next(tmp_path.glob("native/*/zero_pp_rank_0_mp_rank_01_optim_states.pt"))
    with pytest.raises(CheckpointError, match=re.escape(file.name)):
        DeepSpeedSource(tmp_path / "native", config.model)
