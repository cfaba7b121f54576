"""The layer list cut into pipeline stages by DeepSpeed's ``PipelineModule``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor

from megacore.models.layers import Carry, Layer, Step, carried_names, layer_list
from megacore.nn.kit import Kit

_WORDS = "words"


def pipeline_module(
    kit: Kit,
    partition: str,
    loss: Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], Tensor],
    activation_checkpointing: bool,
) -> PipelineModule:
    """Build this process's stage of the model.

    Every use of the word table (embedding of the source, of the target, tied output) is a tied layer: DeepSpeed keeps
    a copy on each stage that has one, and sums their gradients.

    Args:
        kit: what parts are made with.
        partition: ``parameters`` or ``uniform``.
        loss: of a micro-batch's outputs and labels, on the last stage.
        activation_checkpointing: keep only what is carried between layers.
    """
    grid, layers = kit.grid, layer_list(kit.config)
    names = carried_names(kit.config, layers)
    table = next(layer for layer in layers if layer.words == "owns")
    specs = []
    for layer, before, after in zip(layers, names[:-1], names[1:], strict=True):
        if layer.words:
            use = partial(_use_words, Carry(layer, before, after))
            build = (kit, table, names[0], names[1])
            specs.append(TiedLayerSpec(_WORDS, Step, *build, forward_fn=use, tied_weight_attr="layer.word"))
        else:
            specs.append(LayerSpec(Step, kit, layer, before, after, activation_checkpointing))
    topology = PipeModelDataParallelTopology(
        num_pp=grid.pipeline_parallel_size, num_mp=grid.tensor_parallel_size, num_dp=grid.gradient_size
    )
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its arguments
        return PipelineModule(specs, topology=topology, loss_fn=loss, partition_method=partition, dynamic_shape=True)


def _use_words(carry: Carry, owner: Step, values: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...]:
    """Embed with the table, or make logits with it."""
    if carry.layer.words == "writes":
        table = owner.layer.word
        assert isinstance(table, Tensor)
        return carry(lambda x, bias=None: F.linear(x, table, bias), values)
    return carry(owner.layer, values)


def first_inputs(kit: Kit) -> tuple[str, ...]:
    """Name the values that the first stage takes."""
    layers: list[Layer] = layer_list(kit.config)
    return carried_names(kit.config, layers)[0]
