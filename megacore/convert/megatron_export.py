"""A checkpoint's weights in Megatron-LM's torch format, for any TP and PP: tensor by tensor, in parallel over ranks."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megacore.checkpoint.manifest import WEIGHT
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.stream import Entry
from megacore.communicator import Communicator, together
from megacore.config import ParallelConfig
from megacore.convert.links import Link
from megacore.convert.megatron import has_vocabulary
from megacore.convert.megatron_config import args_of, check_exportable, padded_vocabulary
from megacore.convert.megatron_files import FILE, LATEST, RELEASE
from megacore.convert.megatron_names import core_names, megatron_links
from megacore.convert.torch_stream import TorchStream
from megacore.errors import CheckpointError
from megacore.publish import os_errors, publishing, write_text
from megacore.specs import ParamSpec, Region, Shard

_BLOCK_ENTRIES = 1 << 21
"""Entries that are read at once."""
_LAYER = re.compile(r"(.*\.layers\.)(\d+)(\..*)")
_BITS: dict[str, Any] = {"float32": np.float32, "bfloat16": np.int16}


def export_megatron(
    reader: CheckpointReader,
    target: Path,
    parallel: ParallelConfig,
    dtype: str,
    group: Communicator,
    on_progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a checkpoint's weights, without the optimizer's state; every rank of ``group`` calls this.

    Norms have the names of megatron-core's own layers (``--transformer-impl local``).

    Args:
        reader: the checkpoint.
        target: the directory to write; must not exist.
        parallel: the layout of the run that is to load it.
        dtype: ``float32`` or ``bfloat16``.
        group: the ranks that work together.
        on_progress: called with the number of bytes of each tensor this rank has written.

    Raises:
        ConfigError: Megatron has no such model or layout.
        CheckpointError: the source is damaged, or the target cannot be written.
    """
    model, progress = reader.manifest.model, reader.manifest.progress
    with together(group):
        check_exportable(model, parallel)
        specs = reader.manifest.specs()
        stages = _stages(reader, parallel)
    ranks, staged = parallel.tensor_parallel_size, parallel.pipeline_parallel_size > 1
    folder = f"iter_{progress.step:07d}" if progress.step else RELEASE
    args = args_of(model, parallel) | {
        "params_dtype": {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype],
        "bf16": dtype == "bfloat16",
        "fp16": False,
        "iteration": progress.step,
        "consumed_train_samples": progress.consumed_samples,
    }
    facts = {"args": argparse.Namespace(**args), "checkpoint_version": 3.0, "iteration": progress.step}
    padded = padded_vocabulary(model, ranks)
    with publishing(target, group, CheckpointError) as directory:
        with together(group), os_errors(directory, CheckpointError):
            for number, (stage, rank) in enumerate(
                (stage, rank) for stage in range(len(stages)) for rank in range(ranks)
            ):
                if number % group.size != group.rank:
                    continue
                tensors = {
                    name: _Tensor([(link, specs[link.ours]) for link in links], rank, ranks, padded)
                    for name, links in stages[stage].items()
                }
                place = directory / folder / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if staged else ""))
                place.mkdir(parents=True)
                entries = [Entry(name, dtype, tensor.shape) for name, tensor in tensors.items()]
                with TorchStream(place / FILE, facts, "model", entries) as stream:
                    for name, tensor in tensors.items():
                        values = tensor.values(reader, dtype)
                        stream.write(name, values)
                        on_progress(values.nbytes)
        with together(group), os_errors(directory, CheckpointError):
            if group.rank == 0:
                write_text(directory / LATEST, str(progress.step or RELEASE))


def _stages(reader: CheckpointReader, parallel: ParallelConfig) -> list[dict[str, list[Link]]]:
    """Give each stage its tensors' links, by the names that they have in its files: layers from number zero."""
    model, count = reader.manifest.model, parallel.pipeline_parallel_size
    stages: list[dict[str, list[Link]]] = [defaultdict(list) for _ in range(count)]
    names = core_names(model)
    own = model.num_hidden_layers // count
    for link in megatron_links(model, names, parallel.tensor_parallel_size):
        match = _LAYER.fullmatch(link.theirs)
        if match:
            number = int(match[2])
            stages[number // own][f"{match[1]}{number % own}{match[3]}"].append(link)
        else:
            stages[0 if link.ours.startswith("embeddings.") else -1][link.theirs].append(link)
        if link.ours == "embeddings.word" and model.tie_word_embeddings and count > 1:
            stages[-1][f"{names.output}.weight"].append(link)  # the last stage computes logits with its own copy
    return stages


@dataclass(frozen=True)
class _Tensor:
    """A tensor-parallel rank's part of a tensor.

    Args:
        links: all that are fused in it, with the parameters' declarations.
        rank: its number.
        ranks: how many there are.
        padded: size of the vocabulary.
    """

    links: list[tuple[Link, ParamSpec]]
    rank: int
    ranks: int
    padded: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        link, spec = self.links[0]
        shape, dim = list(link.their_shape(spec)), link.cut_dim(spec)
        if dim is not None:
            shape[dim] = (self.padded if has_vocabulary(spec) else shape[dim]) // self.ranks
        return tuple(shape)

    def values(self, reader: CheckpointReader, dtype: str) -> NDArray[Any]:
        """Return the part (in bfloat16, as its bits); the vocabulary's padding is zero."""
        shape = self.shape
        theirs = np.zeros(shape, _BITS[dtype])
        for link, spec in self.links:
            dim = link.cut_dim(spec)
            origin = tuple(self.rank * size if position == dim else 0 for position, size in enumerate(shape))
            for region in self._regions(link, spec):
                values = reader.read(link.ours, WEIGHT, region)
                if dtype == "bfloat16":
                    values = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
                link.fill(spec, region, values, theirs, origin)
        return theirs

    def _regions(self, link: Link, spec: ParamSpec) -> Iterator[Region]:
        """Yield the boxes of the link's parameter that lie in the part."""
        bounds = list(link.our_region(spec))
        sharded = spec.sharded_dim
        if sharded is not None and has_vocabulary(spec):
            rows = self.padded // self.ranks
            size = spec.dims[sharded].size
            bounds[sharded] = (min(self.rank * rows, size), min((self.rank + 1) * rows, size))
        elif sharded is not None:
            bounds[sharded] = spec.local_region(Shard(self.rank, self.ranks))[sharded]
        return link.blocks(tuple(bounds), _BLOCK_ENTRIES)
