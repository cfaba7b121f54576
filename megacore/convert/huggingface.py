"""Hugging Face directories to checkpoints, and back: slice by slice, in parallel over ranks."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from megacore.checkpoint.attached import ATTACHED, Attached
from megacore.checkpoint.manifest import WEIGHT
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.stream import Entry, SafetensorsStream
from megacore.communicator import Communicator, together
from megacore.convert.families import Family
from megacore.convert.hf_config import config_of, family_of, model_from
from megacore.convert.hf_files import COMPANIONS, CONFIG, HuggingFaceFiles, read_json
from megacore.convert.imports import fresh_manifest
from megacore.convert.links import Link, read_linked
from megacore.convert.stored_tensor import check_floating, same_values
from megacore.errors import CheckpointError
from megacore.publish import os_errors, publishing, write_bytes, write_text
from megacore.specs import ParamSpec, Region

_MAX_FILE_BYTES = 4 << 30
_NOT_WEIGHTS = re.compile(r"(\.position_ids|\.attn\.(masked_)?bias|\.inv_freq|embed_positions\.weight)$")
"""Buffers that some versions of transformers saved; all can be computed."""
_ALIASES = {
    "cls.predictions.bias": ("cls.predictions.decoder.bias",),
    "shared.weight": ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
}
"""Tied tensors: the name that is read first, and the others that files may have, too or instead."""


class HuggingFaceSource:
    """A Hugging Face directory as parameters.

    Args:
        path: the directory.
        seed: of the initial values of parameters that it lacks.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape, or tied tensors differ.
        ConfigError: megacore does not compute this model.
    """

    format = "hf"
    states: tuple[str, ...] = (WEIGHT,)

    def __init__(self, path: Path, seed: int = 0) -> None:
        self.path, self._seed = path, seed
        self._files = HuggingFaceFiles(path)
        where = str(path / CONFIG)
        self._family: Family = family_of(self._files.config, where)
        self.model = model_from(self._files.config, self._files.names, where)
        self.manifest = fresh_manifest(self.model)
        self.specs = self.manifest.specs()
        self._names = set(self._files.names)
        self._links: dict[str, list[Link]] = defaultdict(list)
        missing: dict[str, str] = {}
        used: set[str] = set()
        for link in self._family.links(self.model):
            found = self._found(link.theirs)
            if found is None:
                missing.setdefault(link.ours, link.theirs)
            else:
                self._check(link, found)
                self._links[link.ours].append(replace(link, theirs=found))
                used.add(found)
        self.new = self._accept_missing(missing)
        self.left_out = (*self._accept_unused(self._names - used), *self._files.others)
        self.float64 = sum(self._files.stored(name).dtype == torch.float64 for name in used)

    def _found(self, name: str) -> str | None:
        legacy = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for candidate in (name, *_ALIASES.get(name, ()), legacy):
            for spelt in (candidate, candidate.removeprefix(self._family.prefix)):
                if spelt in self._names:
                    return spelt
        return None

    def _check(self, link: Link, found: str) -> None:
        check_floating(self._files.stored(found), found)
        expected, shape = link.their_shape(self.specs[link.ours]), self._files.stored(found).shape
        if shape != expected:
            raise CheckpointError(f"{self.path}: {found} has the shape {shape}; {CONFIG} makes it {expected}")

    def _accept_missing(self, missing: dict[str, str]) -> tuple[str, ...]:
        for ours, theirs in missing.items():
            if not ours.startswith(self._family.heads) or ours in self._links:
                raise CheckpointError(f"{self.path}: {theirs} is missing")
        return tuple(missing)

    def _accept_unused(self, unused: set[str]) -> tuple[str, ...]:
        """Tell buffers, tied copies and other programs' heads from what would be lost without a word."""
        prefixed = any(name.startswith(self._family.prefix) for name in self._names)
        left_out = []
        for name in sorted(unused):
            if _NOT_WEIGHTS.search(f".{name}"):
                continue
            original = self._tied_to(name)
            if original is not None:
                if not same_values(self._files.stored(name), self._files.stored(original)):
                    raise CheckpointError(f"{self.path}: {name} differs from {original}, to which {CONFIG} ties it")
            elif prefixed and self._family.prefix and not name.startswith(self._family.prefix):
                left_out.append(name)
            else:
                raise CheckpointError(f"{self.path}: {name} has no place in a {self._files.config['model_type']} model")
        return tuple(left_out)

    def _tied_to(self, name: str) -> str | None:
        """Return the tensor that a tied copy must equal."""
        for original, copies in _ALIASES.items():
            if name in copies:
                return self._found(original)
        if name in ("lm_head.weight", "cls.predictions.decoder.weight") and self.model.tie_word_embeddings:
            return self._links["embeddings.word"][0].theirs
        return None

    def box(self, name: str, state: str, region: Region) -> NDArray[np.floating]:
        """Return a box of a parameter's weight."""
        spec = self.specs[name]
        if name in self.new:
            return spec.initial_values(name, self._seed, self.model, region)
        return read_linked(self._links[name], spec, region, self._files.read)

    def attach(self, directory: Path) -> None:
        """Copy the configuration and the tokenizer's files into a checkpoint that is being written."""
        found = [self.path / name for name in (CONFIG, *COMPANIONS) if (self.path / name).is_file()]
        Attached({file.name: file.read_bytes() for file in found}).write(directory)


def export_huggingface(
    reader: CheckpointReader,
    target: Path,
    dtype: str,
    group: Communicator,
    on_progress: Callable[[int], None] = lambda size: None,
) -> None:
    """Write a checkpoint's weights as a Hugging Face directory; every rank of ``group`` calls this.

    Args:
        reader: the checkpoint.
        target: the directory to write; must not exist.
        dtype: ``float32`` or ``bfloat16``.
        group: the ranks that work together.
        on_progress: called with the number of bytes of each tensor this rank has written.

    Raises:
        ConfigError: Hugging Face has no such architecture.
        CheckpointError: the checkpoint is damaged, or the target cannot be written.
    """
    with together(group):
        config, family = config_of(reader.manifest.model)
        tensors = _tensors(reader, family)
        shards = _shards(tensors, dtype)
    name_of = partial(_shard_name, count=len(shards))
    with publishing(target, group, CheckpointError) as directory:
        with together(group), os_errors(directory, CheckpointError):
            for number, entries in enumerate(shards):
                if number % group.size == group.rank:
                    _write_shard(directory / name_of(number), tensors, entries, on_progress)
        with together(group), os_errors(directory, CheckpointError):
            if group.rank == 0:
                _write_rest(directory, reader.path / ATTACHED, config | {"dtype": dtype})
                if len(shards) > 1:
                    weights = {entry.key: name_of(number) for number, shard in enumerate(shards) for entry in shard}
                    index = {"metadata": {}, "weight_map": weights}
                    write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=1))


@dataclass(frozen=True)
class _Tensor:
    """A tensor to be exported: its shape, and what makes its values when they are wanted."""

    shape: tuple[int, ...]
    values: Callable[[], NDArray[np.floating]]


def _tensors(reader: CheckpointReader, family: Family) -> dict[str, _Tensor]:
    specs, model = reader.specs(), reader.manifest.model
    fused: dict[str, list[Link]] = defaultdict(list)
    for link in family.links(model):
        fused[link.theirs].append(link)
    tensors = {
        theirs: _Tensor(links[0].their_shape(specs[links[0].ours]), partial(_joined, reader, specs, links))
        for theirs, links in fused.items()
    }
    for theirs, table in family.computed(model).items():
        tensors[theirs] = _Tensor(table.shape, partial(np.asarray, table))
    return tensors


def _shards(tensors: dict[str, _Tensor], dtype: str) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    size = 0
    for theirs, tensor in tensors.items():
        more = math.prod(tensor.shape) * (2 if dtype == "bfloat16" else 4)
        if shards[-1] and size + more > _MAX_FILE_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(Entry(theirs, dtype, tensor.shape))
        size += more
    return shards


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _write_shard(
    path: Path, tensors: dict[str, _Tensor], entries: list[Entry], on_progress: Callable[[int], None]
) -> None:
    with SafetensorsStream(path, entries, lambda checksums: {"format": "pt"}) as stream:
        for entry in entries:
            stream.write(entry.key, (tensors[entry.key].values(),))
            on_progress(math.prod(entry.shape) * 4)


def _joined(reader: CheckpointReader, specs: dict[str, ParamSpec], links: list[Link]) -> NDArray[np.floating]:
    """Make a foreign tensor of its fused parts."""
    theirs = np.empty(links[0].their_shape(specs[links[0].ours]), np.float32)
    for link in links:
        spec = specs[link.ours]
        region = link.our_region(spec)
        link.fill(spec, region, reader.read(link.ours, WEIGHT, region), theirs)
    return theirs


def _write_rest(directory: Path, attached: Path, config: dict[str, object]) -> None:
    """Write the configuration, on top of the one that was imported, and the tokenizer's files."""
    if (attached / CONFIG).is_file():
        config = {**read_json(attached / CONFIG), **config}
        config.pop("torch_dtype", None)
    write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")
    for name in COMPANIONS:
        if (attached / name).is_file():
            write_bytes(directory / name, (attached / name).read_bytes())
