"""Checks that several commands make of their options."""

from __future__ import annotations

from collections.abc import Iterable

from megacore.errors import ConfigError


def one_of(option: str, value: str, allowed: Iterable[str]) -> None:
    """Refuse a value that an option does not have.

    Raises:
        ConfigError: naming the option and its values.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ConfigError(f"{option} {value}: use {', '.join(allowed[:-1])} or {allowed[-1]}")
