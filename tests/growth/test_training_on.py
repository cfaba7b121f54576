"""A grown model trains on: the run's configuration gives its sizes, the checkpoint what growing has set."""

from __future__ import annotations

from pathlib import Path

import pytest

from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Alone
from megacore.config import ParallelConfig
from megacore.growth.execute import GrowthOutput, grow_checkpoint
from megacore.growth.plan import Symmetry, make_plan
from megacore.training.runs import checkpoint_path
from tests.models import run_config, write_instances
from tests.ranks import run_ranks
from tests.training.test_training_layouts import figures, train_all

SIZES = {"hidden_size": 36, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 6}


def test_a_grown_run_begins_where_the_small_one_ended(tmp_path: Path) -> None:
    data = write_instances(tmp_path / "data")
    small = run_config(tmp_path / "small", data, train_steps=6, save_interval=6, eval_interval=6)
    run_ranks(train_all, 1, [small], [None])
    reader = CheckpointReader(checkpoint_path(tmp_path / "small", 6))
    plan = make_plan(reader.manifest.model, SIZES, Symmetry())
    assert plan.target.norm_copies == (24,) and plan.target.norm_eps_of  # what no configuration file would say
    grow_checkpoint(reader, plan, tmp_path / "start", GrowthOutput(ParallelConfig()), Alone())
    options = {"initial_checkpoint": str(tmp_path / "start"), "train_steps": 4, "eval_interval": 2, "save_interval": 4}
    one = run_config(tmp_path / "one", data, **options, **SIZES)
    two = run_config(tmp_path / "two", data, tensor_parallel_size=2, **options, **SIZES)
    run_ranks(train_all, 1, [one], [None])
    run_ranks(train_all, 2, [two], [None])
    first = figures(one, "loss", "validation")[0]
    assert first == pytest.approx(figures(small, "loss", "validation")[-1], abs=1e-5)
    assert figures(two, "loss", "validation") == pytest.approx(figures(one, "loss", "validation"), abs=1e-5)
    assert CheckpointReader(checkpoint_path(tmp_path / "two", 10)).manifest.model == plan.target
    assert "norm_copies" in (tmp_path / "two" / "config.yaml").read_text()
