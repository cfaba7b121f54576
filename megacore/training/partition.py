"""Between DeepSpeed's ZeRO partitions and the checkpoint: every rank saves and loads its own runs of each tensor.

ZeRO 1 and 2 lay the parameters of a group end to end and give each replica an equal part of the whole; so a
replica owns, of each parameter, a run of its entries in row-major order (or nothing). DeepSpeed links each parameter
to its run (``_hp_mapping``): an fp32 master copy and the optimizer's moments. ZeRO 3 gives each replica an equal run of
every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from megacore.checkpoint.manifest import MOMENTS, WEIGHT
from megacore.checkpoint.pieces import Piece
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import PieceToWrite
from megacore.parallel.grid import ParallelGrid
from megacore.params import Parameter, declared
from megacore.specs import region_shape
from megacore.training.engine import TrainingEngine


class Run(NamedTuple):
    """The entries [start, stop) of a parameter's local tensor that this process's optimizer owns."""

    start: int
    stop: int
    values: dict[str, torch.Tensor]
    """By state: views of the fp32 master and of Adam's moments, [stop - start]."""


def pieces_to_write(engine: TrainingEngine, grid: ParallelGrid) -> list[PieceToWrite]:
    """List what this rank must save: its runs of the fp32 weights and of Adam's moments.

    Parameters that tensor-parallel ranks replicate are saved by the first of them, tied ones by the first stage.
    """
    if not engine.optimizer.optimizer.state:  # every step so far was skipped
        _make_moments(engine, 0)
    pieces = []
    for name, parameter in declared(engine.model):
        if name not in engine.owned or (parameter.spec.sharded_dim is None and grid.tensor_parallel_rank > 0):
            continue
        run = _run(engine, parameter)
        if run is None:
            continue
        shape = region_shape(parameter.region)
        whole = (run.start, run.stop) == (0, math.prod(shape))
        for state in (WEIGHT, *MOMENTS):
            values = run.values[state].view(shape) if whole else run.values[state]
            part = None if whole else (run.start, run.stop)
            piece = Piece(name, state, parameter.region, part, "float32")
            pieces.append(PieceToWrite(piece, partial(_blocks, values)))
    return pieces


def _blocks(values: torch.Tensor) -> Iterator[NDArray[np.float32]]:
    yield values.detach().cpu().numpy()


def load_state(engine: TrainingEngine, reader: CheckpointReader) -> None:
    """Set weights, fp32 masters and, if the checkpoint has them, Adam's moments and step; at any layout."""
    states = reader.manifest.states
    if MOMENTS[0] in states:
        _make_moments(engine, reader.manifest.progress.optimizer_step)
    with torch.no_grad():
        for name, parameter in declared(engine.model):
            run = _run(engine, parameter)
            for state in states:
                values = torch.from_numpy(reader.read(name, state, parameter.region))
                if state == WEIGHT:
                    _set_weight(engine, parameter, values)
                if run is not None:
                    run.values[state].copy_(values.flatten()[run.start : run.stop])


def _run(engine: TrainingEngine, parameter: Parameter) -> Run | None:
    return _run_of_every(engine, parameter) if engine.zero_stage == 3 else _run_of_group(engine, parameter)


def _run_of_group(engine: TrainingEngine, parameter: Parameter) -> Run | None:
    """Find the run under ZeRO 1 and 2."""
    mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    address, start = mapping.hp_fragment_address, mapping.lp_fragment_address.start
    moments = engine.optimizer.optimizer.state.get(flat, {})
    values = {state: moments[state].narrow(0, address.start, address.numel) for state in MOMENTS if state in moments}
    return Run(start, start + address.numel, values | {WEIGHT: mapping.hp_fragment})


def _run_of_every(engine: TrainingEngine, parameter: Parameter) -> Run | None:
    """Find the run under ZeRO 3: replica r has the r-th of equal parts, the last of which may be cut short."""
    size, part = math.prod(region_shape(parameter.region)), parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    start = min(size, part * engine.gradient_rank)
    stop = min(size, start + part)
    if start == stop:
        return None

    def state(key: str | None) -> torch.Tensor:
        view: torch.Tensor = engine.optimizer._get_fp32_opt_state_partition(parameter, False, key)[0]
        return view.narrow(0, 0, stop - start)

    has_moments = bool(engine.optimizer.optimizer.state)
    return Run(start, stop, {WEIGHT: state(None), **{key: state(key) for key in MOMENTS if has_moments}})


def _set_weight(engine: TrainingEngine, parameter: Parameter, values: torch.Tensor) -> None:
    """Set the weight that the model computes with."""
    if engine.zero_stage < 3:
        parameter.copy_(values)
        return
    part: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
    start = part.numel() * engine.gradient_rank
    own = values.flatten()[start : start + part.numel()]
    part[: len(own)].copy_(own)
    if parameter.numel() == values.numel():  # small parameters stay gathered
        parameter.copy_(values)


def _make_moments(engine: TrainingEngine, step: int) -> None:
    """Create Adam's state, which torch would create at the first step."""
    optimizer = engine.optimizer
    masters = (
        optimizer.fp32_partitioned_groups_flat if engine.zero_stage == 3 else optimizer.single_partition_of_fp32_groups
    )
    for flat in masters:
        optimizer.optimizer.state[flat] = {
            "step": torch.tensor(float(step)),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }
