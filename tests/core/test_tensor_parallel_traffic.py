"""A layer's collectives under tensor parallelism are Megatron-LM's, in number and in bytes.

Shoeybi et al. 2019, section 3: two all-reduces of [tokens, hidden] forward and two backward. Korthikanti et al. 2022,
section 4.2.2: with sequence parallelism each becomes an all-gather and a reduce-scatter, which move the same bytes.
"""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megacore.config import ParallelConfig
from megacore.growth.verify import random_batch
from megacore.models.transformer import Transformer
from megacore.nn.kit import Kit
from megacore.parallel import collectives
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, initialise
from tests.models import model_config
from tests.ranks import run_ranks
from tests.training.test_layout_matrix import LLAMA, SIZES

SIZE, LAYERS = 2, 4
FAMILIES: dict[str, dict[str, Any]] = {"bert": SIZES, "llama": LLAMA}
Traffic = Counter[tuple[str, str, int]]
"""How often: (pass, collective, entries of the whole tensor)."""


def traffic(family: str, sequence_parallel: bool, layers: int) -> tuple[Traffic, int]:
    """Count one training pass's collectives of the stream's size or less; return them and that size."""
    from megacore.training.distributed import join_world, leave_world

    join_world()
    grid = ParallelGrid.create(ParallelConfig(tensor_parallel_size=SIZE, sequence_parallel=sequence_parallel))
    config = model_config(**{**FAMILIES[family], "num_hidden_layers": layers})
    model = Transformer(Kit(config, Declare(config, grid.shard), grid, 1)).train()
    initialise(model, config, 1)
    batch = random_batch(config, samples=3).filled(SIZE)
    counts: Traffic = Counter()
    now, nested = "forward", False
    whole = {"_all_reduce": 1, "_all_gather": SIZE, "_reduce_scatter": 1}

    def counted(name: str) -> Any:
        original = getattr(collectives, name)

        def call(x: torch.Tensor, group: Any) -> torch.Tensor:
            nonlocal nested
            if nested:  # gloo's reduce-scatter is made of an all-reduce
                return original(x, group)  # type: ignore[no-any-return]
            counts[now, name, x.numel() * whole[name]] += 1
            nested = True
            result: torch.Tensor = original(x, group)
            nested = False
            return result

        return patch.object(collectives, name, call)

    with counted("_all_reduce"), counted("_all_gather"), counted("_reduce_scatter"):
        outputs = model(batch)
        now = "backward"
        sum(output.square().sum() for output in outputs).backward()  # type: ignore[union-attr]
    leave_world()
    return counts, batch.tokens.shape[1] * config.hidden_size


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_has_two_collectives_of_the_stream_each_way(family: str, sequence_parallel: bool) -> None:
    def of_layers(layers: int) -> tuple[Traffic, int]:
        (result, *others) = run_ranks(traffic, SIZE, family, sequence_parallel, layers)
        assert all(other == result for other in others)
        counts: tuple[Traffic, int] = result
        return counts

    (more, stream), (fewer, _) = of_layers(LAYERS), of_layers(LAYERS - 1)
    layer = Counter({key: count for key, count in (more - fewer).items() if key[2] >= stream})
    if sequence_parallel:
        kinds = [("forward", "_all_gather"), ("forward", "_reduce_scatter")]
        kinds += [("backward", "_all_gather"), ("backward", "_reduce_scatter")]
    else:
        kinds = [("forward", "_all_reduce"), ("backward", "_all_reduce")]
    assert layer == {(when, name, stream): 2 for when, name in kinds}
