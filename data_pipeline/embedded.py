"""The embedded corpus: the docstrings of the packages that are installed where megacore runs.

Real English of several megabytes on any machine, without a download. Sources are read as text, never imported.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from data_pipeline.sentences import split_sentences
from megacore.errors import DataError
from megacore.publish import os_errors, replace_file

# A string in triple quotes that begins a line: nearly always a docstring, and found 20 times faster than by parsing.
_DOCSTRING = re.compile(r'^[ \t]*[rRuU]?("""|\'\'\')(.*?)\1', re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"^\s*(>>>|\.\.\.|\.\. |:\w|@|#|\$|>)|^\s*[=\-~^*+|`#. ]{3,}\s*$|^\s*[\w.]+\s*:\s|^\s*\S+\s*$")
_MIN_SENTENCES = 3
_MIN_LETTERS = 0.75


def embedded_documents(on_progress: Callable[[int], None] = lambda size: None) -> Iterator[str]:
    """Yield one document per installed Python module: the prose of its docstrings, no paragraph twice."""
    seen: set[bytes] = set()
    for file in _modules():
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue  # some packages carry broken files, for their own tests
        paragraphs = []
        for docstring in _docstrings(source):
            for paragraph in _prose(docstring):
                digest = hashlib.blake2b(paragraph.encode(), digest_size=12).digest()
                if digest not in seen:
                    seen.add(digest)
                    paragraphs.append(paragraph)
        document = "\n\n".join(paragraphs)
        if len(split_sentences(document)) >= _MIN_SENTENCES:
            yield document
        on_progress(len(source))


def write_embedded_corpus(path: Path, max_mb: float, on_progress: Callable[[int], None] = lambda size: None) -> int:
    """Write the embedded corpus as .jsonl and return the number of documents.

    Which documents are kept is decided by their hashes, so the mix is broad and does not depend on the order.

    Raises:
        DataError: the file cannot be written, or nothing was found.
    """
    lines = {}
    for document in embedded_documents(on_progress):
        line = json.dumps({"text": document}, ensure_ascii=False).encode() + b"\n"
        lines[hashlib.blake2b(line, digest_size=16).digest()] = line
    kept: list[bytes] = []
    size = 0
    for digest in sorted(lines):
        if size + len(lines[digest]) > max_mb * 1e6:
            break
        kept.append(lines[digest])
        size += len(lines[digest])
    if not kept:
        raise DataError(f"the installed packages have no docstrings of at most {max_mb} MB")
    with os_errors(path, DataError):
        replace_file(path, b"".join(kept))
    return len(kept)


def _modules() -> Iterator[Path]:
    """Yield the Python files of the environment and of the standard library, in a fixed order."""
    roots = dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib", "stdlib"))
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            inner = file.relative_to(root).parts
            if root.name != "site-packages" and "site-packages" in inner:
                continue  # the standard library's folder holds another environment's packages
            yield file


def _docstrings(source: str) -> Iterator[str]:
    for match in _DOCSTRING.finditer(source):
        yield inspect.cleandoc(match[2])


def _prose(docstring: str) -> Iterator[str]:
    """Yield the paragraphs of a docstring that are prose: no code, no tables, no lists of parameters."""
    for block in re.split(r"\n\s*\n", docstring):
        lines = block.splitlines()
        if not lines or any(_CODE.match(line) for line in lines) or lines[0].startswith("    "):
            continue
        text = re.sub(r":\w+:`~?([^`<]*)[^`]*`|`+([^`]*)`+", r"\1\2", " ".join(block.split()))
        letters = sum(character.isalpha() or character == " " for character in text)
        if len(text) >= 40 and letters >= _MIN_LETTERS * len(text):
            yield text
