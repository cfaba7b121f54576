"""How the process gets its memory, for commands that make and drop one block after the other."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_BLOCK_BYTES, _KEPT_BYTES = 32 << 20, 128 << 20


def keep_freed_memory() -> None:
    """Let the C library keep up to 128 MiB of what is freed for the blocks to come.

    It would give each block back to the system, which clears the pages of the next one: that takes longer than to read
    what goes into them. Without glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
