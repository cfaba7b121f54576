"""DeepSpeed's checkpoints of megacore's and of Megatron-DeepSpeed's models, native and universal, as parameters."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megacore.checkpoint.assemble import assembled
from megacore.checkpoint.manifest import Manifest, carried_manifest
from megacore.convert.deepspeed_files import DeepSpeedFiles, Part, open_deepspeed
from megacore.convert.imports import fresh_manifest
from megacore.convert.links import Box2D, Link, read_linked
from megacore.convert.megatron_deepspeed import is_megatron, megatron_deepspeed_links, megatron_deepspeed_model
from megacore.convert.module_names import module_links
from megacore.convert.stored_tensor import StoredTensor, number_in
from megacore.errors import CheckpointError, ConfigError
from megacore.model_config import ModelConfig
from megacore.specs import Region, Shard, region_shape

CARRIED = "megacore"
"""Key of the client state under which an exported checkpoint carries its manifest."""


class DeepSpeedSource:
    """A directory that DeepSpeed's ``save_checkpoint`` wrote, or a universal checkpoint.

    Args:
        path: the directory with ``latest`` (or ``latest_universal``), or one tag's directory in it.
        model: the model that was saved; ``None`` if the checkpoint says it.

    Raises:
        CheckpointError: a file or a part of a parameter is missing or damaged.
        ConfigError: the model is not known, or is not the one that was saved.
    """

    format = "deepspeed"
    new: tuple[str, ...] = ()

    def __init__(self, path: Path, model: ModelConfig | None = None) -> None:
        self.path = path
        self._files: DeepSpeedFiles = open_deepspeed(path)
        self.states = self._files.states
        self._is_megatron = is_megatron(self._files.parts)
        self._hint = "does it fit its args?" if model is None else "is --config the run's that was saved?"
        inexact: tuple[str, ...] = ()
        if self._is_megatron:
            names = self._files.parts.keys()
            model, inexact = megatron_deepspeed_model(self._files.facts, names, str(self._files.folder), model)
        self.manifest = self._manifest(model)
        self.specs = self.manifest.specs()
        if self.manifest.model.num_experts:
            raise ConfigError(f"{path}: mixtures of experts are not read from DeepSpeed's checkpoints")
        self._links: dict[str, list[Link]] = defaultdict(list)
        self._placed: dict[str, list[tuple[Region, Part]]] = {}
        padding = []
        for link in self._all_links():
            self._links[link.ours].append(link)
            if link.theirs not in self._placed:
                self._placed[link.theirs], rows = self._place(link)
                padding += [f"{rows} rows of padding of {link.theirs}"] if rows else []
        self.left_out = (*padding, *inexact)
        self.float64 = sum(parts[0].dtype == torch.float64 for parts in self._files.parts.values())
        self._boxes = lru_cache(maxsize=8)(self._all_boxes)

    def _manifest(self, model: ModelConfig | None) -> Manifest:
        facts = self._files.facts
        if CARRIED in facts:
            manifest = carried_manifest(facts[CARRIED], str(self._files.folder))
            if model is not None and model != manifest.model:
                raise ConfigError(f"{self.path} says what model it is of, and --config says another: leave it out")
        elif model is None:
            raise ConfigError(f"{self.path} does not say what model it is of: add --config CONFIG.yaml, the run's")
        else:
            manifest = fresh_manifest(model)
        step = number_in(facts.get("global_steps", 0), f"{self._files.folder}: global_steps")
        progress = manifest.progress.model_copy(update={"step": step, "optimizer_step": self._files.step})
        return manifest.model_copy(update={"progress": progress})

    def _all_links(self) -> list[Link]:
        """Return the links of all parameters, having checked that they are to what there is."""
        found, model, ranks = self._files.parts.keys(), self.manifest.model, self._files.tensor_parallel_size
        if self._is_megatron:
            links = list(megatron_deepspeed_links(model, found, self._files.facts, ranks, str(self.path)))
            unknown = self.specs.keys() ^ {link.ours for link in links}
            if unknown:
                raise ConfigError(f"{self.path}: Megatron-DeepSpeed's models have no {min(unknown)}; {self._hint}")
        else:
            pipeline = not any(name.startswith("steps.") for name in found)
            links = list(module_links(model, pipeline, ranks))
        expected = {link.theirs for link in links}
        for name in sorted(found ^ expected):
            what = "is missing" if name in expected else "does not belong to the model"
            raise CheckpointError(f"{self._files.folder}: {name} {what}; {self._hint}")
        return links

    def _place(self, link: Link) -> tuple[list[tuple[Region, Part]], int]:
        """Return where the ranks' parts of a tensor lie in the whole of it, and how many rows are padding."""
        spec, parts = self.specs[link.ours], self._files.parts[link.theirs]
        whole, cut = link.their_shape(spec), link.cut_dim(spec)
        if cut is None:
            parts = parts[:1]
        placed: list[tuple[Region, Part]] = []
        start = 0
        for rank, part in enumerate(parts):
            shape = self._part_shape(link, part, rank, len(parts))
            first = [start if dim == cut else 0 for dim in range(len(shape))]
            placed.append((tuple((low, low + size) for low, size in zip(first, shape, strict=True)), part))
            start += 0 if cut is None else shape[cut]
        return placed, 0 if cut is None else start - whole[cut]

    def _part_shape(self, link: Link, part: Part, rank: int, ranks: int) -> tuple[int, ...]:
        """Return the shape of a rank's part, as far as the foreign tensor's dims go, having checked it."""
        spec, cut = self.specs[link.ours], link.cut_dim(self.specs[link.ours])
        shape = list(link.their_shape(spec))
        if self._is_megatron:
            if cut is not None:
                shape[cut] = self._megatron_rows(link, part, shape[cut], ranks)
            expected = tuple(shape)
        else:
            expected = region_shape(spec.local_region(Shard(rank, ranks)))
            if cut is not None:
                shape[cut] = shape[cut] * math.prod(expected) // math.prod(spec.shape)
        if part.shape not in (expected, (math.prod(expected),)):
            raise CheckpointError(
                f"{part.path}: {link.theirs} has the shape {part.shape}; the model makes it {expected}; {self._hint}"
            )
        return tuple(shape)

    def _megatron_rows(self, link: Link, part: Part, size: int, ranks: int) -> int:
        """Return a rank's share of a dim: equal ones, for which Megatron pads its vocabulary."""
        spec = self.specs[link.ours]
        if "vocab" not in {dim.axis for dim in spec.dims}:
            return size // ranks
        rows = part.size * size // math.prod(link.their_shape(spec))
        return max(rows, -(-size // ranks))

    def box(self, name: str, state: str, region: Region) -> NDArray[np.floating]:
        """Return a box of a parameter's state."""

        def read(theirs: str, box: Box2D) -> NDArray[Any]:
            readers = {place: partial(_read, tensor) for place, tensor in self._boxes(theirs, state).items()}
            return assembled(tuple((edges.start, edges.stop) for edges in box), readers, np.dtype(np.float32))[0]

        return read_linked(self._links[name], self.specs[name], region, read)

    def _all_boxes(self, theirs: str, state: str) -> dict[Region, StoredTensor]:
        """Return the boxes of a whole tensor, with what is stored there."""
        return {box: piece for region, part in self._placed[theirs] for box, piece in _pieces(region, part.runs(state))}

    def attach(self, directory: Path) -> None:
        """Add nothing."""


def _read(tensor: StoredTensor, part: Region) -> NDArray[np.floating]:
    values: NDArray[np.floating] = tensor.read(tuple(slice(*edges) for edges in part)).float().numpy()
    return values


def _pieces(region: Region, runs: Iterable[StoredTensor]) -> Iterator[tuple[Region, StoredTensor]]:
    """Yield the boxes that flat runs make of a region, one after the other, with what is stored there.

    A run is whole rows, and what it has of the rows before and behind them.

    Args:
        region: one or two dims.
        runs: that fill it, in order.
    """
    width = math.prod(region_shape(region)[1:])
    start = 0
    for run in runs:
        stop = start + run.shape[0]
        edges = sorted({start, min(stop, -(-start // width) * width), max(start, stop // width * width), stop})
        for low, high in pairwise(edges):
            row, column = divmod(low, width)
            rows = max(1, (high - low) // width)
            place = (row, row + rows), (column, column + (high - low) // rows)
            box = tuple((a + first, b + first) for (a, b), (first, _) in zip(place, region, strict=False))
            piece = run.narrow(low - start, high - low)
            yield box, replace(piece, shape=region_shape(box), strides=(width, 1)[-len(box) :])
        start = stop
