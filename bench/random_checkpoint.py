"""Checkpoints of random values, for measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megacore.checkpoint.files import plan_files
from megacore.checkpoint.manifest import MOMENTS, WEIGHT, Layout, Manifest, Progress, parameter_records
from megacore.checkpoint.writer import write_checkpoint
from megacore.communicator import Alone
from megacore.model_config import ModelConfig
from megacore.models.transformer import declarations
from megacore.specs import Region, region_shape


def described(model: ModelConfig, layout: Layout) -> Manifest:
    """Return the manifest of a model without its files."""
    specs = declarations(model)
    records = parameter_records(specs, dict.fromkeys(specs, (1.0, 1.0)))
    return Manifest(model=model, layout=layout, progress=Progress(), parameters=records, files={})


def write_random(path: Path, model: ModelConfig, layout: Layout, optimizer: bool = False) -> None:
    """Write a checkpoint of random bf16 weights and, if asked for, fp32 moments."""
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    values = {WEIGHT: noise, MOMENTS[0]: noise, MOMENTS[1]: noise**2}

    def box(name: str, state: str, region: Region) -> np.ndarray[Any, Any]:
        return np.resize(values[state], region_shape(region))

    def dtype(name: str, state: str) -> str:
        return "bfloat16" if state == WEIGHT else "float32"

    states = (WEIGHT, *MOMENTS) if optimizer else (WEIGHT,)
    write_checkpoint(
        path, Alone(), plan_files(declarations(model), states, layout, dtype, box), described(model, layout)
    )
