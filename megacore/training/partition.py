"""Between DeepSpeed's ZeRO partitions and the checkpoint: every rank saves and loads its own runs of each tensor.

ZeRO 1 and 2 lay the parameters of a group end to end and give each replica an equal part of the whole; so a
replica owns, of each parameter, a run of its entries in row-major order (or nothing). DeepSpeed links each parameter
to its run (``_hp_mapping``): an fp32 master copy and the optimizer's moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megacore.checkpoint.manifest import MOMENTS, WEIGHT
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import PieceToWrite
from megacore.params import Parameter, declared
from megacore.training.engine import TrainingEngine


def pieces_to_write(engine: TrainingEngine, tensor_parallel_rank: int) -> list[PieceToWrite]:
    """List what this rank must save: its runs of the fp32 weights and of Adam's moments.

    Parameters that tensor-parallel ranks replicate are saved by the first of them.
    """
    pieces = []
    for name, parameter in declared(engine.model):
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None or (parameter.spec.sharded_dim is None and tensor_parallel_rank > 0):
            continue
        start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        whole = size == parameter.numel()
        for state in (WEIGHT, *MOMENTS):
            values = _run(engine, mapping, state)
            if whole:
                values = values.view(parameter.shape)
            run = None if whole else (start, start + size)
            pieces.append(PieceToWrite(state, name, parameter.region, run, "float32", partial(_blocks, values)))
    return pieces


def _blocks(values: torch.Tensor) -> Iterator[NDArray[np.float32]]:
    yield values.detach().cpu().numpy()


def _run(engine: TrainingEngine, mapping: Any, state: str) -> torch.Tensor:
    """Return the view of this rank's run of a parameter's weight or moment."""
    if state == WEIGHT:
        weight: torch.Tensor = mapping.hp_fragment
        return weight
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    address = mapping.hp_fragment_address
    moment: torch.Tensor = engine.optimizer.optimizer.state[flat][state].narrow(0, address.start, address.numel)
    return moment


def load_state(engine: TrainingEngine, reader: CheckpointReader) -> None:
    """Set weights, fp32 masters and, if the checkpoint has them, Adam's moments and step; at any layout."""
    states = reader.manifest.states
    if MOMENTS[0] in states:
        _make_moments(engine, reader.manifest.progress.optimizer_step)
    with torch.no_grad():
        for name, parameter in declared(engine.model):
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            for state in states:
                values = torch.from_numpy(reader.read(name, state, parameter.region))
                if state == WEIGHT:
                    parameter.copy_(values)
                if mapping is not None:
                    _run(engine, mapping, state).copy_(_part(values, parameter, mapping))


def _part(values: torch.Tensor, parameter: Parameter, mapping: Any) -> torch.Tensor:
    assert values.shape == parameter.shape
    address = mapping.lp_fragment_address
    return values.flatten().narrow(0, address.start, address.numel)


def _make_moments(engine: TrainingEngine, step: int) -> None:
    """Create Adam's state, which torch would create at the first step."""
    optimizer = engine.optimizer.optimizer
    for flat in engine.optimizer.single_partition_of_fp32_groups:
        optimizer.state[flat] = {
            "step": torch.tensor(float(step)),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
