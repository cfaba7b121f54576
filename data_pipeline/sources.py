"""Documents from text files, in units of work that do not depend on the number of ranks."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megacore.errors import DataError

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Unit(NamedTuple):
    """A block of a file: it owns the documents that start in bytes [start, stop)."""

    path: Path
    start: int
    stop: int


def units(paths: Sequence[Path], block_bytes: int) -> list[Unit]:
    """Cut files into blocks; depends on the files' sizes and the block size only.

    Raises:
        DataError: a file is missing, is of an unknown kind, or all are empty.
    """
    blocks = []
    for path in paths:
        if path.suffix not in _READERS:
            raise DataError(f"{path}: unknown kind of file '{path.suffix}'; known: {', '.join(_READERS)}")
        if not path.is_file():
            raise DataError(f"{path}: no such file")
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, os.SEEK_END)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        blocks += [Unit(path, start, min(start + block_bytes, size)) for start in range(0, size, block_bytes)]
    if not blocks:
        raise DataError(f"the corpus is empty: {', '.join(map(str, paths))}")
    return blocks


def documents(unit: Unit) -> Iterator[str]:
    """Yield the documents of a unit; control characters become spaces.

    Raises:
        DataError: bytes that are not UTF-8, a line that is not JSON or has no ``text``; with the line and byte.
    """
    with unit.path.open("rb") as stream:
        for text in _READERS[unit.path.suffix](unit, stream):
            text = _CONTROL.sub(" ", text).strip()
            if text:
                yield text


def _lines_from(stream: BinaryIO, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, line) for the lines that start at ``start`` or later."""
    if start:
        stream.seek(start - 1)
        stream.readline()
    while True:
        offset = stream.tell()
        line = stream.readline()
        if not line:
            return
        yield offset, line


def _json_lines(unit: Unit, stream: BinaryIO) -> Iterator[str]:
    for offset, line in _lines_from(stream, unit.start):
        if offset >= unit.stop:
            return
        if not line.strip():
            continue
        text = _decoded(unit, offset, line)
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # besides bad syntax, very long numbers and very deep nesting
            raise _problem(unit, offset, f"not JSON: {getattr(error, 'msg', error)}") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise _problem(unit, offset, 'no "text" field with a string')
        try:
            record["text"].encode()
        except UnicodeEncodeError:
            raise _problem(unit, offset, "half of a surrogate pair") from None
        yield record["text"]


def _paragraphs(unit: Unit, stream: BinaryIO) -> Iterator[str]:
    inside_foreign = unit.start > 0 and not _follows_blank_line(unit, stream)
    collected: list[str] = []
    for offset, line in _lines_from(stream, unit.start):
        blank = not line.strip()
        if inside_foreign:  # the rest of a document that an earlier unit owns
            inside_foreign = not blank
            if inside_foreign and offset >= unit.stop:
                return
            continue
        if blank:
            if collected:
                yield "".join(collected)
            collected = []
        elif collected or offset < unit.stop:
            collected.append(_decoded(unit, offset, line))
        if not collected and offset >= unit.stop:
            return
    if collected:
        yield "".join(collected)


def _follows_blank_line(unit: Unit, stream: BinaryIO) -> bool:
    """Tell whether the line before the unit's first own line is blank, so that a document may start there."""
    first = next(_lines_from(stream, unit.start), None)
    if first is None:
        return False
    end = first[0] - 1
    while end > 0:  # backwards: a blank line may hold any number of spaces
        begin = max(0, end - 4096)
        stream.seek(begin)
        _, line_break, line = stream.read(end - begin).rpartition(b"\n")
        if line.strip():
            return False
        if line_break:
            break
        end = begin
    return True


def _decoded(unit: Unit, offset: int, line: bytes) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _problem(unit, offset + error.start, f"byte 0x{line[error.start]:02x} is not UTF-8") from None
    return text if offset else text.removeprefix("\ufeff")  # the byte order mark that some editors write


def _problem(unit: Unit, offset: int, what: str) -> DataError:
    with unit.path.open("rb") as stream:
        line = stream.read(offset).count(b"\n") + 1
    return DataError(f"{unit.path} line {line} (byte {offset}): {what}; mend or remove it")


_READERS = {".txt": _paragraphs, ".jsonl": _json_lines}


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _hash(stream)


def _hash(stream: BinaryIO) -> str:
    checksum = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while block := stream.read(1 << 20):
        checksum.update(block)
    return checksum.hexdigest()
