"""Masked positions of a batch of sequences: pure functions of a key per sequence."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizer import MASK, SPECIAL_TOKENS, UNK
from megacore.random import random_bits

_MASKED, _RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that become [MASK] and a random token; the rest stays (Devlin et al. 2019)."""


class Masked(NamedTuple):
    """Sequences after masking [batch, seq], and which positions were chosen [batch, seq]."""

    input_ids: NDArray[np.int64]
    chosen: NDArray[np.bool_]


def mask_tokens(
    ids: NDArray[np.int64],
    keys: NDArray[np.uint64],
    rate: float,
    vocab_size: int,
    starts_word: NDArray[np.bool_] | None = None,
) -> Masked:
    """Choose max(1, round(rate × n)) of the n tokens of each sequence and hide them.

    Args:
        ids: [batch, seq], padded with [PAD].
        keys: [batch], one per sequence.
        rate: share of tokens; special tokens are never chosen and never drawn.
        vocab_size: random tokens are drawn from the ids above the special ones and below this (no sentinels).
        starts_word: [vocab_size]; if given, whole words are chosen, as many as fit into the number (at least one).
    """
    candidate = (ids >= len(SPECIAL_TOKENS)) | (ids == UNK)
    wanted = np.maximum(1, np.rint(rate * candidate.sum(1)).astype(np.int64))
    place = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    word = place
    if starts_word is not None:
        # A word begins at its first piece or after a special token; its pieces share the number of that place.
        begins = candidate & (starts_word[ids] | ~np.roll(candidate, 1, axis=1))
        word = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    priority = _bits(keys, word, 0) >> np.uint64(1)
    priority[~candidate] = np.iinfo(np.uint64).max
    order = np.argsort(priority, axis=1, kind="stable")  # the pieces of a word stay together, in their order
    taken = np.zeros(ids.shape, np.bool_)
    rank = place + 1
    ordinary = np.take_along_axis(candidate, order, 1)
    fits = (rank <= wanted[:, None]) & ordinary
    if starts_word is not None:  # a special token has the number of the word before it
        fits = _whole_words(np.take_along_axis(word, order, 1), fits) & ordinary
    np.put_along_axis(taken, order, fits, axis=1)
    return Masked(_hidden(ids, taken, keys, place, vocab_size), taken)


def _whole_words(word: NDArray[np.int64], fits: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Give up the last word in the order if only a part of it fits; the first word is taken whole in any case."""
    next_word, next_fits = np.roll(word, -1, axis=1), np.roll(fits, -1, axis=1)
    next_word[:, -1], next_fits[:, -1] = -1, False
    broken = fits & ~next_fits & (next_word == word)
    cut_word = np.where(broken.any(1), word[np.arange(len(word)), broken.argmax(1)], -1)
    chosen: NDArray[np.bool_] = (fits & (word != cut_word[:, None])) | (word == word[:, :1])
    return chosen


def _hidden(
    ids: NDArray[np.int64],
    chosen: NDArray[np.bool_],
    keys: NDArray[np.uint64],
    place: NDArray[np.int64],
    vocab_size: int,
) -> NDArray[np.int64]:
    fate = (_bits(keys, place, 1) >> np.uint64(11)) * 2.0**-53
    first = len(SPECIAL_TOKENS)
    drawn = first + (_bits(keys, place, 2) % np.uint64(vocab_size - first)).astype(np.int64)
    hidden = np.where(fate < _MASKED, MASK, np.where(fate < _MASKED + _RANDOM, drawn, ids))
    result: NDArray[np.int64] = np.where(chosen, hidden, ids)
    return result


def _bits(keys: NDArray[np.uint64], place: NDArray[np.int64], purpose: int) -> NDArray[np.uint64]:
    """Return random bits [batch, seq] for (sequence, place, purpose)."""
    with np.errstate(over="ignore"):
        counters = keys[:, None] + (place.astype(np.uint64) * np.uint64(4) + np.uint64(purpose))
    return random_bits(0, counters)
