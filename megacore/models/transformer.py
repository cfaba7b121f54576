"""A whole model in one process (of each tensor-parallel rank), made of the layer list."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megacore.model_config import ModelConfig
from megacore.models.batch import ModelBatch
from megacore.models.layers import Step, carried_names, input_names, layer_list
from megacore.nn.embedding import WordTable
from megacore.nn.heads import OutputTable
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared
from megacore.specs import ParamSpec


class Transformer(nn.Module):
    """The layers of the list, one after the other.

    Args:
        kit: what parts are made with.
        activation_checkpointing: keep only what is carried between layers, and compute the rest again.
        finish: called with each layer once it is made, before the next one.
    """

    def __init__(
        self,
        kit: Kit,
        activation_checkpointing: bool = False,
        finish: Callable[[nn.Module], None] = lambda layer: None,
    ) -> None:
        super().__init__()
        self.config = kit.config
        layers = layer_list(kit.config)
        names = carried_names(kit.config, layers)
        self.steps = nn.ModuleList()
        words: nn.Parameter | None = None
        for number, layer in enumerate(layers):
            step = Step(kit, layer, names[number], names[number + 1], activation_checkpointing)
            if isinstance(step.layer, WordTable):
                if words is not None:
                    step.layer.word = words  # type: ignore[assignment]
                words = step.layer.word
            if layer.words == "writes" and isinstance(step.layer, OutputTable) and words is not None:
                step.layer.weight = words
            finish(step)
            self.steps.append(step)
        self._inputs = input_names(kit.config)
        self._first = names[0]

    def forward(self, batch: ModelBatch) -> tuple[Tensor, ...]:
        """Return what the list ends with (`megacore.models.layers.output_names`)."""
        inputs = dict(zip(self._inputs, batch.inputs(self._inputs), strict=True))
        values = tuple(inputs[name] for name in self._first)
        for step in self.steps:
            values = step(values)
        return values


def declarations(config: ModelConfig) -> dict[str, ParamSpec]:
    """Return every parameter of a model by name, without making the model."""
    model = Transformer(Kit(config, Declare(config, device="meta"), ParallelGrid()))
    return {name: parameter.spec for name, parameter in declared(model)}
