"""A model as a list of layers, made from its configuration: the one definition for any number of pipeline stages.

The layers hand on named values. Each names what it takes and what it gives; what a later layer still needs travels
on, everything else is dropped. With pipeline stages the same list goes to DeepSpeed's ``PipelineModule``, and the
values are sent from stage to stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megacore.model_config import ModelConfig, Stack
from megacore.nn.block import Block, CrossBlock
from megacore.nn.embedding import InputEmbedding, WordTable
from megacore.nn.heads import NSPHead, OutputTable, TokenHead
from megacore.nn.kit import Kit
from megacore.nn.norm import Norm
from megacore.nn.positions import RelativeBias
from megacore.params import name_parameters

SOURCE = ("tokens", "sequences")
TARGET = ("target_tokens", "target_sequences")


@dataclass(frozen=True)
class Layer:
    """One entry of the list.

    Args:
        prefix: of the names of its parameters.
        build: makes the module.
        takes: names of the values that are its arguments.
        gives: names of its results.
        words: which part it has in the word table: ``owns`` it, ``reads`` the same table as an embedding of the
            target, ``writes`` logits with it, or none.
    """

    prefix: str
    build: Callable[[Kit], nn.Module]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    words: str = ""
    options: tuple[str, ...] = ()
    """Further values that it takes, as the keyword after the last dot of their names."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of all values that it takes."""
        return self.takes + self.options


def input_names(config: ModelConfig) -> tuple[str, ...]:
    """Name the values of a micro-batch that the list starts from."""
    names = SOURCE + (TARGET if config.architecture == "encoder_decoder" else ()) + ("label_positions",)
    return (*names, "pair_positions") if config.objective == "mlm_nsp" else names


def output_names(config: ModelConfig) -> tuple[str, ...]:
    """Name the values that the list ends with."""
    names: tuple[str, ...] = ("logits",)
    if config.objective == "mlm_nsp":
        names += ("pair_logits",)
    return (*names, "balance") if config.num_experts else names


def layer_list(config: ModelConfig) -> list[Layer]:
    """Return the layers of a model in order."""
    if config.architecture == "encoder_decoder":
        layers = [
            Layer("embeddings", WordTable, SOURCE, ("x",), "owns"),
            *_stack(config, "encoder", "encoder.", "x", SOURCE),
            Layer("embeddings", WordTable, TARGET, ("y",), "reads"),
            *_stack(config, "decoder", "decoder.", "y", TARGET),
        ]
        return layers + _heads(config, "y", TARGET)
    stack: Stack = "encoder" if config.architecture == "encoder" else "decoder"
    layers = [Layer("embeddings", WordTable, SOURCE, ("x",), "owns"), *_stack(config, stack, "", "x", SOURCE)]
    return layers + _heads(config, "x", SOURCE)


def _stack(config: ModelConfig, stack: Stack, prefix: str, stream: str, data: tuple[str, ...]) -> list[Layer]:
    """Return a stack's layers: what is added to the words, the blocks, the final norm."""
    bias = f"{prefix}bias"
    relative = config.position_embedding == "relative"
    balance = ("balance",) if config.num_experts else ()
    layers = [
        Layer(
            f"{prefix}embeddings",
            partial(InputEmbedding, site=f"{prefix}embeddings"),
            (stream, *data),
            (stream,),
        )
    ]
    if relative:
        layers.append(Layer(f"{prefix}relative_bias", RelativeBias, (), (bias,)))
    for number in range(config.layers_of(stack)):
        site = f"{prefix}layers.{number}"
        block = partial(CrossBlock, site=site) if stream == "y" else partial(Block, site=site, stack=stack)
        memory, source = (("x",), SOURCE) if stream == "y" else ((), ())
        is_first = number == 0 and stream == "x"
        options = ((bias,) if relative else ()) + (() if is_first else balance)
        takes = (stream, *memory, *data, *source)
        layers.append(Layer(site, block, takes, (stream, *balance), options=options))
    if config.norms_inputs:
        # The last stack's norm hands over to the output table alone, unless a dense layer or a pooler reads it.
        last = stream == "y" or config.architecture != "encoder_decoder"
        tied = last and config.tie_word_embeddings and config.has_output_gain and not config.lm_transform
        layers.append(Layer(f"{prefix}final_norm", partial(Norm, tied=tied), (stream,), (stream,)))
    return layers


def _heads(config: ModelConfig, stream: str, data: tuple[str, ...]) -> list[Layer]:
    layers = []
    if config.objective == "mlm_nsp":
        layers.append(Layer("nsp_head", NSPHead, (stream, *data, "pair_positions"), ("pair_logits",)))
    bias = ("bias",) if config.lm_bias else ()
    layers.append(Layer("lm_head", TokenHead, (stream, *data, "label_positions"), (stream, *bias)))
    words = "writes" if config.tie_word_embeddings else ""
    layers.append(Layer("lm_head", OutputTable, (stream, *bias), ("logits",), words))
    return layers


def carried_names(config: ModelConfig, layers: list[Layer]) -> list[tuple[str, ...]]:
    """Return the names of the values that enter each layer and, last, that leave the list."""
    carried = [output_names(config)]
    for layer in reversed(layers):
        # In front of a layer: what it takes, and what is needed behind it and comes from before it.
        needed = set(layer.reads) | (set(carried[-1]) - set(layer.gives))
        carried.append(tuple(sorted(needed)))
    return carried[::-1]


class Step(nn.Module):
    """A layer that takes and gives the values that are carried at its place, as a tuple.

    Args:
        kit: what parts are made with.
        layer: entry of the list.
        before: names of the values that come in.
        after: names of the values that go out.
        recompute: keep only what comes in, and compute the rest again in the backward pass.
    """

    def __init__(
        self, kit: Kit, layer: Layer, before: tuple[str, ...], after: tuple[str, ...], recompute: bool = False
    ) -> None:
        super().__init__()
        self.layer = layer.build(kit)
        name_parameters(self.layer, layer.prefix)
        self.carry, self._recompute = Carry(layer, before, after), recompute

    def forward(self, values: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...]:
        """values: in the order of ``before`` -> in the order of ``after``."""
        if self._recompute and self.training:  # dropout is a function of counters: no state to restore
            result: tuple[Tensor, ...] = checkpoint(
                self.carry, self.layer, values, use_reentrant=False, preserve_rng_state=False
            )
            return result
        return self.carry(self.layer, values)


@dataclass(frozen=True)
class Carry:
    """Calls a layer with its arguments out of the carried values."""

    layer: Layer
    before: tuple[str, ...]
    after: tuple[str, ...]

    def __call__(
        self, module: Callable[..., Tensor | tuple[Tensor, ...]], values: tuple[Tensor, ...] | Tensor
    ) -> tuple[Tensor, ...]:
        """Return the values that are carried on."""
        tensors = (values,) if isinstance(values, Tensor) else values
        named = dict(zip(self.before, tensors, strict=True))
        options = {name.rpartition(".")[2]: named[name] for name in self.layer.options}
        result = module(*(named[name] for name in self.layer.takes), **options)
        named.update(zip(self.layer.gives, (result,) if isinstance(result, Tensor) else result, strict=True))
        return tuple(named[name] for name in self.after)
