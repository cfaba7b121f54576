"""How DeepSpeed names the parameters of megacore's modules: by their place in the list of layers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megacore.axes import AXES
from megacore.convert.links import Columns, Link
from megacore.model_config import ModelConfig
from megacore.models.transformer import Transformer, declarations
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, Parameter
from megacore.specs import Role

TIED_WORDS = "tied_modules.words.layer.word"


def module_names(config: ModelConfig, pipeline: bool) -> dict[str, str]:
    """Return each name in the module -> the parameter's global name.

    Args:
        config: of the model.
        pipeline: as ``PipelineModule`` names them, instead of `Transformer`.
    """
    model = Transformer(Kit(config, Declare(config, device="meta"), ParallelGrid()))
    names: dict[str, str] = {}
    for number, step in enumerate(model.steps):
        for name, parameter in step.named_parameters():
            assert isinstance(parameter, Parameter)
            if not pipeline:
                if parameter.global_name not in names.values():
                    names[f"steps.{number}.{name}"] = parameter.global_name
            elif parameter.global_name == "embeddings.word":
                names[TIED_WORDS] = parameter.global_name
            else:
                names[f"{number}.{name}"] = parameter.global_name
    return names


def module_links(config: ModelConfig, pipeline: bool, tensor_parallel_size: int) -> Iterator[Link]:
    """Yield the link of each parameter to the module's, as a matrix of all ranks' parts laid end to end.

    Args:
        config: of the model.
        pipeline: as ``PipelineModule`` names them, instead of `Transformer`.
        tensor_parallel_size: ranks whose parts the matrices are made of.
    """
    specs = declarations(config)
    for theirs, ours in module_names(config, pipeline).items():
        spec = specs[ours]
        if not AXES[spec.dims[0].axis].stacks:
            yield Link(theirs, ours)
            continue
        # Each rank stacks its own parts of the matrices.
        stacked = spec.dims[0].size
        outputs = math.prod(dim.size for dim in spec.dims[1:] if dim.role is Role.WRITE)
        groups = tensor_parallel_size if spec.sharded_dim is not None else 1
        own = outputs // groups
        for part in range(stacked):
            yield Link(theirs, ours, part, columns=Columns(groups, stacked * own, part * own, (part + 1) * own))
