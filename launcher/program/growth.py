"""The ``grow`` section of a stage as words of ``megacore grow``, which alone knows its options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import typer

from megacore.config import ParallelConfig
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
            raise unknown_key(key, [*GROWABLE_KEYS, "tensor_parallel_size", *options])
        option = options[key]
        if not getattr(option, "is_flag", False):
            words += [option.opts[0], str(value)]
        elif value in (True, False):
            words += (option.opts if value else option.secondary_opts)[:1]
        else:
            raise ConfigError(f"{key}={value!r}: expected true or false")
    try:
        command.make_context("grow", ["SOURCE", "TARGET", *words])  # parsed, not run
    except typer.BadParameter as error:
        raise ConfigError(error.format_message()) from None
    return tuple(words)


def _is_size(key: str) -> bool:
    return key in ModelConfig.model_fields or key in ParallelConfig.model_fields


def _command() -> Any:
    """Return the command's parser."""
    from launcher.cli import app  # it imports this package

    return typer.main.get_command(app).commands["grow"]  # type: ignore[attr-defined]


def _key(option: Any) -> str:
    name: str = option.opts[0]
    return name.lstrip("-").replace("-", "_")
