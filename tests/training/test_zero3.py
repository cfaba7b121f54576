"""Under ZeRO 3 no process ever holds more of a model whole than one layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megacore.config import RunConfig
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared
from megacore.training.deepspeed_config import resolve_deepspeed_config
from megacore.training.distributed import join_world, leave_world
from megacore.training.runners import WholeRunner
from tests.models import run_config
from tests.ranks import run_ranks
from tests.training.test_layout_matrix import deepspeed


def build(config: RunConfig) -> Any:
    join_world()
    grid = ParallelGrid.create(config.parallel)
    whole: list[int] = []

    def finish_and_measure(self: WholeRunner, layer: Any) -> None:
        original(self, layer)
        whole.append(max((parameter.numel() for parameter in layer.parameters()), default=0))

    original = WholeRunner._take_apart
    with patch.object(WholeRunner, "_take_apart", finish_and_measure):
        kit = Kit(config.model, Declare(config.model, grid.shard), grid)
        model = WholeRunner(config, kit, resolve_deepspeed_config(config, 2)).model
    parts = {name: parameter.ds_tensor.numel() for name, parameter in declared(model)}  # type: ignore[attr-defined]
    sizes = {name: math.prod(parameter.spec.shape) for name, parameter in declared(model)}
    leave_world()
    return whole, parts, sizes


def test_a_model_is_taken_apart_layer_by_layer(tmp_path: Path) -> None:
    config = run_config(tmp_path, tmp_path, deepspeed_config=deepspeed("zero3"))
    for whole, parts, sizes in run_ranks(build, 2, config):
        assert len(whole) > config.model.num_hidden_layers and max(whole) == 0
        assert parts == {name: math.ceil(size / 2) for name, size in sizes.items()}
