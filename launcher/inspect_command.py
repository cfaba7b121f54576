"""``megacore inspect``: what a checkpoint holds, for people and for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.tree import Tree

    from megacore.checkpoint.manifest import Manifest
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
    console = Console(highlight=False, soft_wrap=not Console().is_terminal)
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
        "bytes": _bytes(manifest),
        "parameters": parameters,
    }


def _bytes(manifest: Manifest) -> int:
    return sum(file.size for file in manifest.files.values())


def _summary(facts: dict[str, Any]) -> Iterator[str]:
    from megacore.model_config import ModelConfig

    progress, layout, model = facts["progress"], facts["layout"], facts["model"]
    usual = ModelConfig().model_dump(mode="json")
    shown = {key: value for key, value in model.items() if key in _SIZES or value != usual[key]}
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


_SIZES = ("architecture", "objective", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_WIDTH = 88


def _wrapped(title: str, words: Sequence[str]) -> Iterator[str]:
    """Put words into lines, the first of which has a title."""
    line = ""
    for word in words:
        if line and len(line) + len(word) > _WIDTH:
            yield f"{title:<12}{line}"
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
    source = event.get("source")
    name = source.get("name") if isinstance(source, Mapping) else source
    if event.get("event") == "grow":
        changes = ", ".join(f"{key} {old} → {event['to'][key]}" for key, old in event["from"].items())
        return f"grow {name} at step {event['step']:,}: {changes or 'same sizes'} (optimizer {event['optimizer']})"
    if event.get("event") == "import":
        new = f"; new: {', '.join(event['new'])}" if event.get("new") else ""
        return f"import {name} from {event['format']}{new}"
    return json.dumps(event, ensure_ascii=False)


def _parameters(parameters: Mapping[str, Mapping[str, Any]], every: bool) -> Tree:
    """Show modules down to their parameters."""
    from rich.tree import Tree

    nested: dict[str, Any] = {}
    for name, entry in parameters.items():
        *modules, leaf = name.split(".")
        place = nested
        for module in modules:
            place = place.setdefault(module, {})
        place[leaf] = _leaf(entry)
    tree = Tree("parameters: axis role size, …; stored states")
    _grow_branches(tree, nested, every)
    return tree


def _leaf(entry: Mapping[str, Any]) -> str:
    axes = ", ".join(f"{axis['name']} {axis['role']} {axis['size']:,}" for axis in entry["axes"])
    dtypes = dict.fromkeys(entry["states"].values())
    if len(dtypes) == 1:
        stored = f"{' '.join(entry['states'])} {next(iter(dtypes))}"
    else:
        stored = " ".join(f"{state} {dtype}" for state, dtype in entry["states"].items())
    factors = {"lr": entry["learning_rate_multiplier"], "eps": entry["adam_eps_multiplier"]}
    multipliers = "".join(f", {name} × {factor:g}" for name, factor in factors.items() if factor != 1.0)
    return f"[{axes}] {stored}{multipliers}"


def _grow_branches(tree: Tree, nested: Mapping[str, Any], every: bool) -> None:
    from rich.markup import escape

    for first, last, content in _runs(nested, every):
        if isinstance(content, str):
            tree.add(escape(f"{first} {content}"))
        else:
            count = int(last) - int(first) + 1 if first != last else 1
            _grow_branches(tree.add(first if count == 1 else f"{first} … {last} × {count}"), content, every)


def _runs(nested: Mapping[str, Any], every: bool) -> Iterator[tuple[str, str, Any]]:
    """Yield a module's children as (first, last, content): numbered ones that follow each other and are alike as one."""
    children = list(nested.items())
    while children:
        first, content = last, _ = children.pop(0)
        while not every and children and last.isdigit() and children[0] == (str(int(last) + 1), content):
            last, _ = children.pop(0)
        yield first, last, content
