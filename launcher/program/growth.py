"""The ``grow`` section of a stage as words of ``megacore grow``, which alone knows its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from inspect import signature
from typing import Any

import typer

from launcher.grow_command import check_options
from launcher.options import LAYOUT
from megacore.errors import ConfigError
from megacore.growth.target import GROWABLE_KEYS
from megacore.model_config import ModelConfig
from megacore.settings import unknown_key

_NOT_IN_A_STAGE = ("dry_run", "to")
"""Options that would leave a stage undone, or its sizes unsaid."""


def growth_sizes(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of sizes and layout, without the options."""
    return {key: value for key, value in section.items() if _is_size(key)}


def growth_words(section: Mapping[str, Any]) -> tuple[str, ...]:
    """Return ``key=value`` words, then options.

    Raises:
        ConfigError: ``megacore grow`` has no such key or option, or does not take the value.
    """
    command = _command()
    options = {_key(parameter): parameter for parameter in command.params if parameter.param_type_name == "option"}
    options = {key: option for key, option in options.items() if key not in _NOT_IN_A_STAGE}
    words = [f"{key}={json.dumps(value, default=str)}" for key, value in growth_sizes(section).items()]
    for key, value in section.items():
        if _is_size(key):
            continue
        if key not in options:
            raise unknown_key(key, [*GROWABLE_KEYS, *LAYOUT, *options])
        option = options[key]
        if not getattr(option, "is_flag", False):
            words += [option.opts[0], str(value)]
        elif value in (True, False):
            words += (option.opts if value else option.secondary_opts)[:1]
        else:
            raise ConfigError(f"{key}={value!r}: expected true or false")
    try:
        given = command.make_context("grow", ["SOURCE", "TARGET", *words]).params  # parsed, not run
    except typer.BadParameter as error:
        raise ConfigError(error.format_message()) from None
    check_options(**{key: given[key] for key in signature(check_options).parameters})
    if not given["sizes"]:
        raise ConfigError("nothing to grow: give sizes such as hidden_size: 1024")
    return tuple(words)


def _is_size(key: str) -> bool:
    return key in ModelConfig.model_fields or key in LAYOUT


def _command() -> Any:
    """Return the command's parser."""
    from launcher.cli import app  # it imports this package

    return typer.main.get_group(app).commands["grow"]


def _key(option: Any) -> str:
    name: str = option.opts[0]
    return name.lstrip("-").replace("-", "_")
