"""Megatron-LM's checkpoints in torch's format, of GPT and BERT models at any TP and PP, as parameters."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megacore.axes import AXES, Sharding
from megacore.checkpoint.manifest import STATES, WEIGHT
from megacore.convert.imports import fresh_manifest
from megacore.convert.links import Link, read_linked
from megacore.convert.megatron_config import model_from, padded_size
from megacore.convert.megatron_files import MegatronFiles, read_parts
from megacore.convert.megatron_names import core_names, megatron_links
from megacore.convert.megatron_optimizer import NotReadable, adam_tensors
from megacore.convert.stored_tensor import StoredTensor, check_floating, number_in, same_values
from megacore.errors import CheckpointError, ConfigError
from megacore.model_config import ModelConfig
from megacore.specs import ParamSpec, Region

_TIED_COPY = "output_layer.weight"
"""The last stage's own copy of the first one's word table, where the two are tied."""


class MegatronSource:
    """A directory that Megatron-LM wrote (``--ckpt-format torch``).

    Args:
        path: the directory with ``latest_checkpointed_iteration.txt``, or an iteration's directory in it.
        model: the model that was saved; ``None`` if its arguments are in the files.

    Raises:
        CheckpointError: a file or a tensor is missing, damaged, unknown or of another shape.
        ConfigError: megacore does not compute this model, or nothing says what model it is.
    """

    format = "megatron"
    new: tuple[str, ...] = ()

    def __init__(self, path: Path, model: ModelConfig | None = None) -> None:
        self.path = path
        self._files = MegatronFiles(path)
        inexact: tuple[str, ...] = ()
        self._padded = 0
        if self._files.args:
            self._padded = padded_size(self._files.args, str(self._files.file))
            model, inexact = model_from(self._files.args, self._files.tensors, str(self._files.file), model)
        elif model is None:
            raise ConfigError(f"{self._files.file} does not say what model it is of: add --config CONFIG.yaml")
        self.manifest = fresh_manifest(model)
        self.specs = self.manifest.specs()
        self._parts: dict[str, dict[str, list[StoredTensor]]] = {WEIGHT: self._files.tensors}
        self._links: dict[str, list[Link]] = defaultdict(list)
        self._find(model)
        self.left_out = (*self._padding(model), *inexact)
        self.states: tuple[str, ...] = (WEIGHT,)
        step = self._find_optimizer()
        self.float64 = sum(parts[0].dtype == torch.float64 for parts in self._files.tensors.values())
        samples = self._files.args.get("consumed_train_samples") or 0
        progress = {
            "step": self._files.iteration,
            "optimizer_step": step,
            "consumed_samples": number_in(samples, f"{self._files.file}: consumed_train_samples"),
        }
        self.manifest = self.manifest.model_copy(
            update={"progress": self.manifest.progress.model_copy(update=progress)}
        )

    def _find(self, model: ModelConfig) -> None:
        """Find every parameter's tensors; refuse what is missing, of another shape or left over."""
        tensors, folder, ranks = self._files.tensors, self._files.folder, self._files.tensor_parallel_size
        fused_norms = any(name.endswith("linear_qkv.layer_norm_weight") for name in tensors)
        unused = set(tensors)
        for link in megatron_links(model, core_names(model, fused_norms), ranks):
            if link.theirs not in tensors:
                raise CheckpointError(f"{folder}: {link.theirs} is missing")
            self._check(link, self.specs[link.ours])
            self._links[link.ours].append(link)
            unused.discard(link.theirs)
        if _TIED_COPY in unused and model.tie_word_embeddings:
            self._check_tied()
            unused.remove(_TIED_COPY)
        if unused:
            kind = "BERT" if model.architecture == "encoder" else "GPT"
            raise CheckpointError(f"{folder}: {min(unused)} has no place in this {kind}; does it fit its args?")

    def _check(self, link: Link, spec: ParamSpec) -> None:
        expected, dim = list(link.their_shape(spec)), link.cut_dim(spec)
        parts = self._files.tensors[link.theirs]
        shapes = {tuple(part.shape) for part in parts}
        if dim is not None and has_vocabulary(spec) and all(len(shape) > dim for shape in shapes):
            there = len(parts) * min(shape[dim] for shape in shapes)
            expected[dim] = max(expected[dim], self._padded or there)
        if dim is not None:
            expected[dim] = -(-expected[dim] // len(parts))
        for rank, part in enumerate(parts):
            check_floating(part, link.theirs)
            if tuple(part.shape) != tuple(expected):
                raise CheckpointError(
                    f"{self._files.folder}: {link.theirs} of tensor-parallel rank {rank} has the shape "
                    f"{tuple(part.shape)}; its args make it {tuple(expected)}"
                )

    def _check_tied(self) -> None:
        name = self._links["embeddings.word"][0].theirs
        for first, second in zip(self._files.tensors[name], self._files.tensors[_TIED_COPY], strict=True):
            if not same_values(first, second):
                raise CheckpointError(f"{self._files.folder}: {_TIED_COPY} differs from {name}, to which it is tied")

    def _padding(self, model: ModelConfig) -> tuple[str, ...]:
        name = self._links["embeddings.word"][0].theirs
        rows = sum(part.shape[0] for part in self._files.tensors[name])
        if rows == model.vocab_size:
            return ()
        return (f"rows {model.vocab_size} to {rows - 1} of the vocabulary (padding)",)

    def _find_optimizer(self) -> int:
        """Find Adam's state of every parameter, or say that it is left out; return Adam's step."""
        parts: dict[str, dict[str, list[StoredTensor]]] = {state: defaultdict(list) for state in STATES}
        steps = set()
        separate = self._files.has_distributed_optimizer
        if not separate and not any("optimizer" in content for content in self._files.content.values()):
            return 0
        try:
            if separate:
                raise NotReadable("the distributed optimizer's")
            for (stage, rank), content in self._files.content.items():
                held = {name: self._files.tensors[name][rank] for name in self._files.held[stage, rank]}
                found, step = adam_tensors(content.get("optimizer"), held, self._files.ranks[stage, rank])
                steps.add(step)
                for state, tensors in found.items():
                    for name, tensor in tensors.items():
                        parts[state][name].append(tensor)
            if len(steps) > 1:
                raise NotReadable("of different steps")
        except NotReadable as reason:
            self.left_out += (f"the optimizer's state ({reason})",)
            return 0
        self._parts, self.states = parts, STATES
        return steps.pop()

    def box(self, name: str, state: str, region: Region) -> NDArray[np.floating]:
        """Return a box of a parameter's state."""
        spec, parts, links = self.specs[name], self._parts[state], self._links[name]
        dim = links[0].cut_dim(spec)
        return read_linked(links, spec, region, lambda theirs, box: read_parts(parts[theirs], box, dim))

    def attach(self, directory: Path) -> None:
        """Add nothing."""


def has_vocabulary(spec: ParamSpec) -> bool:
    """Tell whether Megatron pads the tensor, so that all ranks have as many rows."""
    return any(AXES[dim.axis].sharding is Sharding.BALANCED for dim in spec.dims)
