"""Adam's state in a file of Megatron-LM's: torch's own state dictionaries, keyed by the parameters' numbers.

Parameters are numbered in groups: those that are decayed (matrices) and those that are not (norms, biases), each in
the order of the model's tensors. Where the model is in half precision, its fp32 weights are in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megacore.checkpoint.manifest import MOMENTS, WEIGHT
from megacore.convert.stored_tensor import StoredTensor, number_in

_HALF = (torch.float16, torch.bfloat16)


class NotReadable(Exception):
    """Why an optimizer's state cannot be taken over."""


def adam_tensors(
    optimizer: Any, model: Mapping[str, StoredTensor], file: Path
) -> tuple[dict[str, dict[str, StoredTensor]], int]:
    """Return each state's tensors by the parameters' names, and Adam's step.

    Args:
        optimizer: what the file holds.
        model: the file's parameters, in its order.
        file: the file, for messages.

    Raises:
        NotReadable: the state is of another kind, or not of these parameters.
        CheckpointError: its step is not a count.
    """
    try:
        inner = optimizer.get("optimizer", optimizer)
        mains = optimizer.get("fp32_from_fp16_params", optimizer.get("fp32_from_fp16"))
        found: dict[str, dict[str, StoredTensor]] = {state: {} for state in (WEIGHT, *MOMENTS)}
        steps: set[int] = set()
        if not inner["state"]:
            raise NotReadable("the distributed optimizer's")
        for number, group in enumerate(inner["param_groups"]):
            main = iter(mains[number] if mains else ())
            for (name, tensor), key in zip(_grouped(model, group), group["params"], strict=True):
                state = inner["state"][key]
                found[WEIGHT][name] = _rounded_to(tensor, next(main)) if mains and tensor.dtype in _HALF else tensor
                for moment in MOMENTS:
                    found[moment][name] = state[moment]
                steps.add(
                    number_in(state["step"] if "step" in state else group["step"], f"{file}: the optimizer's step")
                )
        for tensors in found.values():
            if tensors.keys() != model.keys() or any(tensors[name].shape != model[name].shape for name in model):
                raise NotReadable("not of these parameters")
            if not all(tensor.dtype.is_floating_point for tensor in tensors.values()):
                raise NotReadable("quantized")
        if len(steps) != 1 or (not mains and any(tensor.dtype in _HALF for tensor in model.values())):
            raise NotReadable("of another kind than Adam's with fp32 weights")
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
        raise NotReadable("of another kind than Adam's with fp32 weights") from None
    return found, steps.pop()


def _rounded_to(half: StoredTensor, main: StoredTensor) -> StoredTensor:
    """Return a fp32 weight, having looked whether its first row is the parameter's."""
    row = (slice(0, 1),)
    if main.shape != half.shape or not torch.equal(main.read(row).to(half.dtype), half.read(row)):
        raise NotReadable("not of these parameters")
    return main


def _grouped(model: Mapping[str, StoredTensor], group: Mapping[str, Any]) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the parameters of a group of Megatron's: with the factor 1 of the weight decay, or with 0."""
    decayed = bool(group["wd_mult"])
    for name, tensor in model.items():
        if (len(tensor.shape) > 1 and not name.endswith(".bias")) == decayed:
            yield name, tensor
