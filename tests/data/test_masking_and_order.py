"""Masks and the order of samples: exact counts, pure functions of their keys."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.masking import mask_tokens
from data_pipeline.sampler import permute, sample_order
from data_pipeline.tokenizer import CLS, MASK, PAD, SEP
from megacore.random import random_bits

VOCAB = 300


def sequences(count: int, length: int = 64, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, VOCAB, (count, length))
    ids[:, 0], ids[:, length // 2], ids[:, -1] = CLS, SEP, SEP
    for row in ids:
        size = rng.integers(8, length + 1)
        row[size - 1], row[size:] = SEP, PAD
    return ids


def keys(count: int) -> np.ndarray:
    return random_bits(1, np.arange(count))


def test_token_masks_have_exact_counts_and_spare_special_tokens() -> None:
    ids = sequences(500)
    masked, chosen = mask_tokens(ids, keys(500), 0.15, VOCAB)
    ordinary = ids >= 5
    assert not (chosen & ~ordinary).any()
    for row, number in zip(ordinary, chosen.sum(1), strict=True):
        assert number == max(1, round(0.15 * row.sum()))
    assert np.array_equal(masked[~chosen], ids[~chosen])
    assert not np.isin(masked[chosen], [PAD, 1, CLS, SEP]).any()


def test_eighty_ten_ten() -> None:
    ids = sequences(4000)
    masked, chosen = mask_tokens(ids, keys(4000), 0.15, VOCAB)
    before, after = ids[chosen], masked[chosen]
    n = len(after)
    replaced = (after != MASK) & (after != before)
    # A drawn token equals the old one with probability 1 / 295.
    for share, expected in (((after == MASK).mean(), 0.8), (replaced.mean(), 0.1 * (1 - 1 / 295))):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / n)


def test_every_position_is_equally_likely() -> None:
    ids = np.full((20000, 20), 7)
    _, chosen = mask_tokens(ids, keys(20000), 0.15, VOCAB)
    assert np.abs(chosen.mean(0) - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 20000)


def test_whole_words_are_never_split() -> None:
    ids = sequences(500)
    starts_word = np.arange(VOCAB) % 3 == 0
    _, chosen = mask_tokens(ids, keys(500), 0.15, VOCAB, starts_word)
    wanted = np.maximum(1, np.rint(0.15 * (ids >= 5).sum(1)))
    too_many = 0
    for row, marks, limit in zip(ids, chosen, wanted, strict=True):
        words: list[list[int]] = []
        for place, token in enumerate(row):
            if token < 5:
                continue
            if starts_word[token] or not words or words[-1][-1] != place - 1:
                words.append([])
            words[-1].append(place)
        assert sum(map(len, words)) == (row >= 5).sum()
        taken = [word for word in words if marks[word].any()]
        assert all(marks[word].all() for word in taken)
        assert taken
        if sum(map(len, taken)) > limit:  # only a first word that is too long by itself
            assert len(taken) == 1
            too_many += 1
    assert too_many < 200  # a third of the words here have four pieces or more


def test_masks_depend_on_the_key_alone() -> None:
    ids = np.repeat(sequences(1), 2, axis=0)
    first = mask_tokens(ids, np.array([5, 6], np.uint64), 0.15, VOCAB)
    second = mask_tokens(ids[:1], np.array([6], np.uint64), 0.15, VOCAB)
    assert np.array_equal(first.input_ids[1], second.input_ids[0])
    assert not np.array_equal(first.chosen[0], first.chosen[1])


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_the_order_is_a_permutation(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_epochs_differ_and_the_order_looks_random() -> None:
    order = sample_order(np.arange(3000), 1000, seed=3).reshape(3, 1000)
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(1000), (3, 1)))
    for a, b in ((order[0], order[1]), (order[0], np.arange(1000)), (order[0][1:], order[0][:-1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.12
        assert (a == b).sum() < 8
