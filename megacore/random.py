"""Random numbers as pure functions of (seed, name, index): the same for any layout, order or number of ranks.

A 64-bit finaliser (the splitmix64 mixing function, Steele et al. 2014) of ``key + index * golden ratio`` is a
counter-based generator: any slice of the stream can be drawn alone.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)


def stream_key(seed: int, *names: str | int) -> int:
    """Return a 64-bit key for the stream called ``names`` under ``seed``."""
    text = "\x1f".join((str(seed), *(str(name) for name in names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def random_bits(key: int, index: NDArray[np.integer]) -> NDArray[np.uint64]:
    """Return 64 random bits for each counter in ``index``."""
    x = index.astype(np.uint64)
    with np.errstate(over="ignore"):
        x *= _GOLDEN
        x += np.uint64(key)
        x ^= x >> np.uint64(30)
        x *= _MIX1
        x ^= x >> np.uint64(27)
        x *= _MIX2
        x ^= x >> np.uint64(31)
    return x


def uniform(key: int, index: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1), one for each counter in ``index``."""
    numbers: NDArray[np.float64] = (random_bits(key, index) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def uniform_rows(key: int, rows: NDArray[np.integer], length: int) -> NDArray[np.float32]:
    """Return uniform numbers of mean 0 and variance 1, [rows, length]; a row depends on its number alone.

    Fast, for where the distribution's form does not matter: each 64 random bits give four numbers.
    """
    words = -(-length // 4)
    counters: NDArray[np.int64] = rows.astype(np.int64).reshape(-1, 1) * words + np.arange(words)
    bits = random_bits(key, counters)
    quarters = bits.astype("<u8", copy=False).view("<u2").reshape(len(bits), -1)[:, :length]
    numbers = quarters.astype(np.float32)
    numbers -= np.float32(32767.5)
    numbers *= np.float32(math.sqrt(12.0 / (65536.0**2 - 1)))
    return numbers


def standard_normal(key: int, index: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return standard normal numbers (Box-Muller), one for each counter in ``index``."""
    bits = random_bits(key, index)
    # 32 bits each for the radius and the angle; the half keeps the logarithm finite.
    radius = ((bits >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    angle = (bits & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * np.pi * 2.0**-32)
    normal: NDArray[np.float64] = np.sqrt(-2.0 * np.log(radius)) * np.cos(angle)
    return normal


TRUNCATION = 1.1368472343385565
"""What a normal distribution cut off at two standard deviations must be multiplied by to have variance one."""


def truncated_normal(key: int, index: NDArray[np.integer]) -> NDArray[np.float64]:
    """Return standard normal numbers conditioned on [-2, 2] (so of a variance below one), one for each counter."""
    import torch  # here: the data pipeline needs no torch

    tail = 0.5 * math.erfc(math.sqrt(2.0))
    quantile = tail + (1.0 - 2.0 * tail) * uniform(key, index)
    normal: NDArray[np.float64] = torch.special.ndtri(torch.from_numpy(quantile)).numpy()
    return normal
