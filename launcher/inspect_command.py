"""``megacore inspect``: what a checkpoint holds, for people and for programs."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

_ALWAYS_SHOWN = ("architecture", "objective", "vocab_size")
"""Keys of the model that are shown even where they have their default."""
_WIDTH = 100
"""Columns where there is no terminal."""
_LAYER = re.compile(r".*\.\d+")

if TYPE_CHECKING:
    from rich.tree import Tree

    from megacore.checkpoint.reader import CheckpointReader


def inspect(
    checkpoint: Path = typer.Argument(..., help="Directory of a checkpoint.", show_default=False),
    every: bool = typer.Option(False, "--all", help="Show every layer; by default layers that are alike are one."),
    as_json: bool = typer.Option(False, "--json", help="Print the facts as one JSON object instead."),
) -> None:
    """Show what a checkpoint holds: layout, progress, size, lineage, and the tree of its parameters."""
    from rich.console import Console

    from megacore.checkpoint.reader import CheckpointReader
    from megacore.communicator import Alone
    from megacore.training.runs import followed

    reader = CheckpointReader(followed(checkpoint, Alone()))
    facts = _facts(reader)
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    terminal = Console().is_terminal
    console = Console(highlight=False, width=None if terminal else _WIDTH)
    for line in _summary(facts):
        console.print(line, markup=False)
    for tree in (_lineage(facts["lineage"]), _parameters(facts["parameters"], every)):
        console.print(tree)


def _facts(reader: CheckpointReader) -> dict[str, Any]:
    manifest = reader.manifest
    facts = manifest.model_dump(mode="json", include={"model", "layout", "progress", "annealing", "lineage"})
    parameters = {}
    for name, record in manifest.parameters.items():
        parameters[name] = {
            **record.model_dump(mode="json"),
            "shape": list(reader.shape(name)),
            "states": {state: reader.dtype(name, state) for state in manifest.states},
        }
    return {
        "checkpoint": str(reader.path),
        **facts,
        "num_parameters": sum(math.prod(entry["shape"]) for entry in parameters.values()),
        "files": len(manifest.files),
        "bytes": sum(file.size for file in manifest.files.values()),
        "parameters": parameters,
    }


def _summary(facts: dict[str, Any]) -> Iterator[str]:
    from megacore.model_config import ModelConfig

    progress, layout, model = facts["progress"], facts["layout"], facts["model"]
    usual = {key: field.default for key, field in ModelConfig.model_fields.items()}
    shown = {key: value for key, value in model.items() if key in _ALWAYS_SHOWN or value != usual[key]}
    yield facts["checkpoint"]
    yield from _wrapped("model", [f"{key}={value}" for key, value in shown.items()])
    yield f"parameters  {facts['num_parameters']:,}"
    yield f"on disk     {_size(facts['bytes'])} in {facts['files']} files"
    yield (
        f"saved at    tp={layout['tensor_parallel_size']} pp={layout['pipeline_parallel_size']} "
        f"dp={layout['data_parallel_size']}"
    )
    yield (
        f"progress    step {progress['step']:,} (this stage began at {progress['stage_first_step']:,}), "
        f"{progress['tokens']:,} tokens, {progress['flops']:.3g} FLOPs"
    )


def _wrapped(title: str, words: Sequence[str]) -> Iterator[str]:
    """Put words into lines, the first of which has a title."""
    line = ""
    for word in words:
        if line and len(line) + len(word) > _WIDTH - 14:
            yield f"{title:<12}{line}".rstrip()
            title, line = "", ""
        line += f"{word} "
    yield f"{title:<12}{line}".rstrip()


def _size(count: int) -> str:
    """Return a number of bytes as a reader's number, in decimal units."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"


def _lineage(events: Sequence[Mapping[str, Any]]) -> Tree:
    """Show where the weights come from, oldest first."""
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree("lineage" if events else "lineage: trained from random weights")
    for event in events:
        tree.add(escape(_event(event)))
    return tree


def _event(event: Mapping[str, Any]) -> str:
    try:
        sentence = _sentence(event)
    except (AttributeError, KeyError, TypeError, ValueError):  # other programs write manifests, too
        sentence = None
    return sentence or json.dumps(event, ensure_ascii=False)


def _sentence(event: Mapping[str, Any]) -> str | None:
    source = event.get("source")
    name = source.get("name") if isinstance(source, Mapping) else source
    if event.get("event") == "grow" and event.keys() >= {"from", "to", "step", "optimizer"}:
        changes = ", ".join(f"{key} {old} → {event['to'][key]}" for key, old in event["from"].items())
        return f"grow {name} at step {event['step']:,}: {changes or 'same sizes'} (optimizer {event['optimizer']})"
    if event.get("event") == "verify" and event.keys() >= {"against", "dtype", "passed"}:
        errors = [
            f"{error:.2e} ({key.removesuffix('_relative_error').upper()})"
            for key, error in event.items()
            if key.endswith("_relative_error")
        ]
        verdict = "the same function as" if event["passed"] else "NOT the same function as"
        return f"{verdict} {event['against']['name']} in {event['dtype']}: relative |Δlogit| {', '.join(errors)}"
    if event.get("event") == "import" and "format" in event:
        new = f"; new: {', '.join(event['new'])}" if event.get("new") else ""
        return f"import {name} from {event['format']}{new}"
    return None


def _parameters(parameters: Mapping[str, Mapping[str, Any]], every: bool) -> Tree:
    """Show modules down to their parameters."""
    from rich.tree import Tree

    if not parameters:
        return Tree("parameters: none")
    usual = Counter(_stored(entry["states"]) for entry in parameters.values()).most_common(1)[0][0]
    nested: dict[str, Any] = {}
    for name, entry in parameters.items():
        *modules, leaf = re.split(r"\.(?!\d)", name)  # a layer's number stays with its list: layers.0
        place = nested
        for module in modules:
            place = place.setdefault(module, {})
        place[leaf] = _leaf(entry, usual)
    tree = Tree(f"parameters ({usual}; an axis's role is write unless said)")
    _branch_out(tree, nested, every)
    return tree


def _leaf(entry: Mapping[str, Any], usual: str) -> str:
    """Describe a parameter: its axes with their roles and sizes, and what is not as usual."""
    axes = [
        f"{axis['name']} {axis['size']:,}{'' if axis['role'] == 'write' else ' (' + axis['role'] + ')'}"
        for axis in entry["axes"]
    ]
    factors = {"lr": entry["learning_rate_multiplier"], "eps": entry["adam_eps_multiplier"]}
    words = [f"{name}×{factor:g}" for name, factor in factors.items() if factor != 1.0]
    stored = _stored(entry["states"])
    return " ".join([f"[{', '.join(axes)}]", *words, *([] if stored == usual else [f"stored as {stored}"])])


def _stored(states: Mapping[str, str]) -> str:
    """Return which states of a parameter are stored, and how."""
    dtypes = set(states.values())
    if len(dtypes) == 1:
        return f"{', '.join(states)} in {dtypes.pop()}"
    return ", ".join(f"{state} in {dtype}" for state, dtype in states.items())


def _branch_out(tree: Tree, nested: Mapping[str, Any], every: bool) -> None:
    from rich.markup import escape

    for names, content in _alike(nested, every):
        if isinstance(content, str):
            tree.add(escape(f"{names[0]} {content}"))
        else:
            title = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} × {len(names)}"
            _branch_out(tree.add(title), content, every)


def _alike(nested: Mapping[str, Any], every: bool) -> Iterator[tuple[list[str], Any]]:
    """Yield a module's children as (names, content): layers that follow each other and are alike come together."""
    names: list[str] = []
    content: Any = None
    for name, child in nested.items():
        if names and not every and _LAYER.fullmatch(name) and _LAYER.fullmatch(names[0]) and child == content:
            names.append(name)
            continue
        if names:
            yield names, content
        names, content = [name], child
    if names:
        yield names, content
