"""What DeepSpeed's ``ds_to_universal`` must know of a model to join what tensor-parallel ranks saved of it."""

from __future__ import annotations

import re
from typing import Any

from deepspeed.checkpoint import constants
from torch import nn

from megacore.convert.module_names import TIED_WORDS, module_names
from megacore.model_config import ModelConfig
from megacore.models.transformer import declarations


def add_universal_info(module: nn.Module, config: ModelConfig, pipeline: bool) -> None:
    """Set the module's attribute that DeepSpeed saves with its native checkpoints.

    Its lists are patterns of names: parameters that every tensor-parallel rank has whole, those that are cut along
    their second dim (all others are along the first), and those that several pipeline stages have.

    Args:
        module: what is put under DeepSpeed.
        config: of the model.
        pipeline: the module is a ``PipelineModule``.
    """
    specs, names = declarations(config), module_names(config, pipeline)

    def patterns(dim: int | None) -> list[str]:
        return [f"{re.escape(theirs)}$" for theirs, ours in names.items() if specs[ours].sharded_dim == dim]

    info: dict[str, Any] = {
        constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        constants.TP_REPLICATED_PARAMETER_PATTERNS: patterns(None),
        constants.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: patterns(1),
        constants.PIPELINE_REPLICATED_PARAMETER_PATTERNS: [re.escape(TIED_WORDS)] if pipeline else [],
    }
    setattr(module, constants.UNIVERSAL_CHECKPOINT_INFO, info)
