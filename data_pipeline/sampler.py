"""The order of samples: a keyed permutation for each epoch, computed on the fly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megacore.random import random_bits, stream_key

_ROUNDS = 6


def permute(position: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Return where a random permutation of ``range(size)`` sends each position.

    A Feistel network over the smallest square of a power of two that holds ``size``; positions that fall outside are
    sent on until they are inside (cycle walking), at most a few times.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    result = _feistel(position, half_bits, key)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], half_bits, key)
    return result


def _feistel(position: NDArray[np.int64], half_bits: int, key: int) -> NDArray[np.int64]:
    mask = (1 << half_bits) - 1
    left, right = position >> half_bits, position & mask
    for number in range(_ROUNDS):
        mixed = random_bits((key + number * 0x632BE59BD9B4E019) % 2**64, right).astype(np.int64)
        left, right = right, left ^ (mixed & mask)
    return (left << half_bits) | right


def sample_order(counter: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Return the sample at each place of the endless order; each epoch is a permutation of its own."""
    epochs, positions = counter // size, counter % size
    result = np.empty_like(positions)
    for epoch in np.unique(epochs):
        now = epochs == epoch
        result[now] = permute(positions[now], size, stream_key(seed, "order", int(epoch)))
    return result
