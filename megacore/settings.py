"""Typed settings from YAML and ``key=value`` words: one loader for every configuration of the project.

Keys are unique over all sections of a configuration, so a command line names a key alone
(``hidden_size=256``); ``section.key=value`` works too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from megacore.errors import ConfigError


class Settings(BaseModel):
    """Base of all configuration sections: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


S = TypeVar("S", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a string; people who train models mean a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Read YAML with plain values only: no tag makes an object or runs code."""
    return yaml.load(text, _Loader)  # a SafeLoader


def leaf_keys(kind: type[Settings], prefix: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """Map every key of ``kind`` to its path through the sections, e.g. ``{"seed": ("training", "seed")}``."""
    keys: dict[str, tuple[str, ...]] = {}
    for name, field in kind.model_fields.items():
        path = (*prefix, name)
        section = field.annotation
        if isinstance(section, type) and issubclass(section, Settings):
            keys.update(leaf_keys(section, path))
        else:
            keys[name] = path
    return keys


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """Split ``key=value`` words; values are read as YAML (so ``1e-3``, ``true`` and ``null`` mean what they say)."""
    overrides: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"'{word}' is not of the form key=value")
        if key in overrides:
            raise ConfigError(f"{key} is given twice on the command line")
        try:
            overrides[key] = parse_yaml(text) if text else ""
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{key}={text}: the value is not valid YAML") from error
    return overrides


def unknown_key(key: str, known: Iterable[str], where: str = "") -> ConfigError:
    """Build the error for a key that does not exist, with the nearest ones that do."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(known)}"
    return ConfigError(f"{where}unknown key '{key}'; {hint}")


def merge(kind: type[Settings], values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with each override put into the section its key belongs to."""
    paths = leaf_keys(kind)
    merged: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in values.items()}
    for section in {path[0] for path in paths.values() if len(path) > 1} & merged.keys():
        if merged[section] is None:
            merged[section] = {}  # a section without keys
    for key, value in overrides.items():
        path = tuple(key.split("."))
        if len(path) == 1:
            if key not in paths:
                raise unknown_key(key, paths)
            path = paths[key]
        elif path not in paths.values():
            dotted = [".".join(p) for p in paths.values()]
            same_name = [name for name in dotted if name.endswith("." + path[-1])]
            raise unknown_key(key, same_name or dotted)
        target = merged
        for name in path[:-1]:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{name}={target!r}: expected a mapping of keys to values")
        target[path[-1]] = value
    return merged


def validated(kind: type[S], values: Mapping[str, Any], where: str = "") -> S:
    """Build ``kind`` from plain values; any failure becomes a `ConfigError` naming key, value and what is allowed."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        paths = leaf_keys(kind)
        # A misspelt key also makes the right one missing: speak of the misspelling.
        for problem in sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden"):
            location = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                known = {path[-1] for path in paths.values() if path[:-1] == problem["loc"][:-1]}
                sections = {path[0] for path in paths.values()} if len(problem["loc"]) == 1 else set()
                raise unknown_key(location, known | sections, where) from None
            if problem["type"] == "value_error":
                raise ConfigError(f"{where}{problem['ctx']['error']}") from None
            if problem["type"] == "missing":
                raise ConfigError(f"{where}the key '{location}' is missing") from None
            raise ConfigError(f"{where}{location}={problem['input']!r}: {problem['msg']}") from None
        raise


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; a missing, unreadable or non-mapping file is a `ConfigError` naming it."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of sections to keys, got {type(values).__name__}")
    return values


def load(kind: type[S], path: Path | None, words: Iterable[str] = ()) -> S:
    """Read ``kind`` from a YAML file (or from nothing) with ``key=value`` overrides."""
    values = read_yaml(path) if path else {}
    return validated(kind, merge(kind, values, parse_overrides(words)), f"{path}: " if path else "")
