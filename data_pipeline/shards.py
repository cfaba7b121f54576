"""Data sets on disk: columns in safetensors files, mapped into memory, and one manifest with their checksums."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import save

from data_pipeline.sources import file_digest
from megacore.communicator import Communicator, together
from megacore.errors import DataError
from megacore.publish import os_errors, publishing, write_text
from megacore.sealed import digest, seal, unseal

MANIFEST = "manifest.json"
Columns = dict[str, NDArray[Any]]
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "I32": np.int32, "I64": np.int64}


class ShardRecord(BaseModel):
    """One file: its size, checksum, and what it holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int
    sha256: str
    counts: dict[str, int]


class DatasetManifest(BaseModel):
    """What a data set is made of, and from what it was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal["megacore-data"] = "megacore-data"
    version: Literal[1] = 1
    kind: Literal["sentences", "instances"]
    about: dict[str, Any]
    shards: dict[str, ShardRecord]

    def total(self, name: str) -> int:
        """Sum a count over all files."""
        return sum(shard.counts.get(name, 0) for shard in self.shards.values())

    @property
    def digest(self) -> str:
        """A checksum over everything, the files' checksums included."""
        return digest(self.model_dump(mode="json"))


def already_built(path: Path, kind: str, about: dict[str, Any]) -> bool:
    """Tell whether ``path`` holds this very data set.

    Raises:
        DataError: it holds another one; the message names what differs.
    """
    if not path.exists():
        return False
    existing = read_dataset(path, kind).manifest.about
    both = existing.keys() & about.keys()
    for key in sorted(existing.keys() | about.keys(), key=lambda key: (key not in both, key)):
        if existing.get(key) != about.get(key):
            raise DataError(
                f"{path} was built with {key}={existing.get(key)!r}, now it is {about.get(key)!r}; "
                "remove it or choose another output_dir"
            )
    return True


def write_dataset(
    path: Path,
    group: Communicator,
    kind: Literal["sentences", "instances"],
    about: dict[str, Any],
    shards: Iterable[tuple[str, Columns, dict[str, int]]],
    check: Callable[[DatasetManifest], None] = lambda manifest: None,
) -> None:
    """Write a data set; every rank gives its own (name, columns, counts), in any order.

    Args:
        path: must not exist.
        group: the ranks that write.
        kind: of data set.
        about: what it was made from; the same on all ranks.
        shards: this rank's files.
        check: raises `DataError` if the whole cannot be used; nothing is left then.
    """
    with publishing(path, group, DataError) as partial:
        records: dict[str, ShardRecord] = {}
        with together(group), os_errors(partial, DataError):
            for name, columns, counts in shards:
                content = save({key: np.ascontiguousarray(column) for key, column in columns.items()})
                with (partial / f"{name}.safetensors").open("xb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                sha256 = hashlib.sha256(content).hexdigest()
                records[f"{name}.safetensors"] = ShardRecord(size=len(content), sha256=sha256, counts=counts)
        gathered = group.all_gather(records)
        with together(group), os_errors(partial, DataError):
            everything = {name: record for part in gathered for name, record in part.items()}
            manifest = DatasetManifest(kind=kind, about=about, shards=dict(sorted(everything.items())))
            check(manifest)
            if group.rank == 0:
                write_text(partial / MANIFEST, seal(manifest.model_dump(mode="json")))


class Dataset:
    """A data set opened for reading; its columns are mapped, not read."""

    def __init__(self, path: Path, manifest: DatasetManifest) -> None:
        self.path, self.manifest = path, manifest
        for name, record in manifest.shards.items():
            file = path / name
            if not file.is_file():
                raise DataError(f"{file} is missing")
            if file.stat().st_size != record.size:
                raise DataError(
                    f"{file} has {file.stat().st_size} bytes instead of {record.size}: cut short or altered"
                )

    def columns(self, name: str) -> Columns:
        """Map the columns of a file."""
        file = self.path / name
        try:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(length, file.stat().st_size)))
            header.pop("__metadata__", None)
            mapped = np.memmap(file, mode="r", offset=8 + length) if header else None
            columns: Columns = {}
            for key, entry in header.items():
                start, stop = entry["data_offsets"]
                assert mapped is not None
                columns[key] = mapped[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file}: damaged: {error}") from None
        return columns

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Check the files' checksums; with ``parts``, those of one of that many ranks.

        Raises:
            DataError: naming the file that was altered.
        """
        for name, record in list(self.manifest.shards.items())[part::parts]:
            if file_digest(self.path / name) != record.sha256:
                raise DataError(f"{self.path / name} was altered (its checksum does not match)")


def read_dataset(path: Path, kind: str) -> Dataset:
    """Open a data set of a kind.

    Raises:
        DataError: there is none, or a file is missing or cut short.
    """
    file = path / MANIFEST
    try:
        manifest = DatasetManifest.model_validate(unseal(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise DataError(f"{path}: no data set of {kind} (it has no {MANIFEST})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: damaged: {str(error).splitlines()[0]}") from None
    if manifest.kind != kind:
        raise DataError(f"{path} holds {manifest.kind}, not {kind}")
    return Dataset(path, manifest)
