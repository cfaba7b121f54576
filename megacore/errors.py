"""Errors that a user can mend: each message names the key, file or rank, what is wrong and what to do."""


class MegacoreError(Exception):
    """Base of all errors shown to the user as one line, without a traceback."""

    agreed: bool = False
    """True if all ranks of the job raised this error together, so that one of them may speak for all."""


class ConfigError(MegacoreError):
    """A configuration key, or a combination of keys, that cannot be."""


class CheckpointError(MegacoreError):
    """A checkpoint that is missing, incomplete, altered, or of another shape than asked for."""


class DamagedError(CheckpointError):
    """A checkpoint that is not what was written: a file is missing, cut short or altered."""


class DataError(MegacoreError):
    """Text, a tokenizer or shards that cannot be used."""
