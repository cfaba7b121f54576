"""How DeepSpeed names the parameters of megacore's modules: by their place in the list of layers."""

from __future__ import annotations

from megacore.model_config import ModelConfig
from megacore.models.transformer import Transformer
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, Parameter

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
