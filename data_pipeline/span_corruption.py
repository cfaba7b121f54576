"""Span corruption (Raffel et al. 2020, §3.1.4): spans of a text are taken out, and are what the decoder writes.

The input has a sentinel in the place of each span; the target is each sentinel followed by its span, then one more
sentinel. Both end with [SEP]. All masks with the wanted number of tokens and of spans are equally likely, as in the
paper's figure 2; T5's code, unlike it, always takes the last token out and never the first.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizer import SEP, sentinel_ids
from megacore.random import random_bits

_TEXT, _NOISE, _SENTINEL = range(3)


class Corrupted(NamedTuple):
    """What the encoder reads [input] and what the decoder is to write [target]."""

    input_ids: NDArray[np.int64]
    target_ids: NDArray[np.int64]


def noise_counts(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Return how many tokens of a text are noise, and in how many spans.

    At least one of each; spans are fewer than the mean length asks for where the text is too short to part them.
    """
    noise = max(1, round(length * noise_density))
    spans = max(1, round(noise / mean_span_length))
    return noise, min(spans, length - noise + 1)


def sentinels_needed(length: int, noise_density: float, mean_span_length: float) -> int:
    """Return the number of sentinels in the target of a text; shorter texts need no more."""
    return noise_counts(length, noise_density, mean_span_length)[1] + 1


def piece_length(sequence_length: int, noise_density: float, mean_span_length: float) -> int:
    """Return the length of the longest text whose input and target have at most ``sequence_length`` tokens."""

    def longer_side(length: int) -> int:
        noise, spans = noise_counts(length, noise_density, mean_span_length)
        return max(length - noise + spans + 1, noise + spans + 2)

    # Both sides grow with the text, and every token of it is in one of them.
    return bisect_right(range(2 * sequence_length), sequence_length, lo=1, key=longer_side) - 1


def noise_mask(length: int, noise: int, spans: int, key: int) -> NDArray[np.bool_]:
    """Draw which tokens are noise [length]: ``noise`` of them in exactly ``spans`` runs; a pure function of the key."""
    bits = random_bits(key, np.arange(length))
    runs = np.empty(2 * spans + 1, np.int64)
    runs[1::2] = _parts(noise, spans, bits[: noise - 1])
    runs[::2] = _parts(length - noise + 2, spans + 1, bits[noise - 1 :])
    runs[[0, -1]] -= 1  # a span may begin or end the text; between two spans is a token at least
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def _parts(total: int, count: int, bits: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Cut ``total`` into ``count`` positive parts at the places [total - 1] with the smallest random numbers."""
    cuts = np.sort(np.argsort(bits, kind="stable")[: count - 1]) + 1
    return np.diff(cuts, prepend=0, append=total)


def corrupt(tokens: NDArray[Any], noise: NDArray[np.bool_], vocab_size: int) -> Corrupted:
    """Take the noise out of a text.

    Args:
        tokens: [length].
        noise: [length], true for the tokens to be taken out.
        vocab_size: the sentinels are the last ids below it.
    """
    begins = np.flatnonzero(noise & ~np.append(False, noise[:-1]))
    sentinels = sentinel_ids(vocab_size, len(begins) + 1)
    marked = np.insert(tokens.astype(np.int64), begins, sentinels[:-1])
    kind = np.insert(np.where(noise, _NOISE, _TEXT), begins, _SENTINEL)
    return Corrupted(
        np.append(marked[kind != _NOISE], SEP),
        np.append(marked[kind != _TEXT], [sentinels[-1], SEP]),
    )
