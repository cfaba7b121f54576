"""How a box of a parameter lies in another program's tensor, against torch's and numpy's own views."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megacore.convert.links import Columns, Link, read_linked
from megacore.convert.megatron_names import core_names, megatron_links
from megacore.models.transformer import declarations
from tests.models import model_config

MODEL = model_config(
    architecture="decoder",
    num_attention_heads=6,
    num_key_value_heads=3,
    hidden_size=24,
    intermediate_size=8,
    gated_mlp=True,
    residual="pre_norm",
    embedding_norm=False,
    lm_transform=False,
    type_vocab_size=0,
)
SPECS = declarations(MODEL)


def linked(ours: str, tensor_parallel_size: int = 1) -> list[Link]:
    links = megatron_links(MODEL, core_names(MODEL), tensor_parallel_size)
    return [link for link in links if link.ours == ours]


def test_any_range_of_heads_is_found_in_megatrons_interleaved_rows() -> None:
    fused = np.random.default_rng(0).normal(size=((6 + 2 * 3) * 4, 24))
    groups = fused.reshape(3, 4, 4, 24)  # [key heads, two queries, key and value, head_dim, hidden]
    queries = groups[:, :2].reshape(6, 4, 24)
    name = "layers.1.attention.query_weight"
    (link,) = linked(name)
    assert link.their_shape(SPECS[name]) == fused.shape
    for first, stop in itertools.combinations(range(7), 2):  # most of them cut a group
        region = ((first, stop), (0, 4), (0, 24))
        found = read_linked([link], SPECS[name], region, lambda theirs, box: fused[box])
        assert np.array_equal(found, queries[first:stop])
    name = "layers.1.attention.key_value_weight"
    for part, first in itertools.product((0, 1), (0, 1, 2)):
        region = ((part, 2), (first, 3), (0, 4), (0, 24))
        found = read_linked(linked(name), SPECS[name], region, lambda theirs, box: fused[box])
        assert np.array_equal(found, groups[first:, 2 + part :].swapaxes(0, 1))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_gates_are_interleaved_by_tensor_parallel_rank(parts: int) -> None:
    name = "layers.0.mlp.up_weight"
    gate, up = np.random.default_rng(0).normal(size=(2, 8, 24))
    ranks = [np.concatenate(pair) for pair in zip(np.split(gate, parts), np.split(up, parts), strict=True)]
    fused, filled = np.concatenate(ranks), np.zeros((16, 24))
    region = ((0, 2), (3, 7), (0, 24))
    found = read_linked(linked(name, parts), SPECS[name], region, lambda theirs, box: fused[box])
    assert np.array_equal(found, np.stack([gate, up])[:, 3:7])
    for link, values in zip(linked(name, parts), (gate, up), strict=True):
        link.fill(SPECS[name], link.our_region(SPECS[name]), values[None], filled)
    assert np.array_equal(filled, fused)


def test_a_transposed_part_is_filled_by_columns_and_from_an_origin() -> None:
    name = "layers.0.attention.query_weight"
    link = Link("theirs", name, transposed=True, columns=Columns(3, 16, 4, 12))
    values = np.random.default_rng(0).normal(size=(2, 4, 24))  # heads 1 and 2: the first group's end, the next's start
    whole, part = np.zeros((24, 48)), np.zeros((24, 32))
    region = ((1, 3), (0, 4), (0, 24))
    link.fill(SPECS[name], region, values, whole)
    assert np.array_equal(whole[:, 8:12], values[0].T) and np.array_equal(whole[:, 20:24], values[1].T)
    assert np.count_nonzero(whole) == values.size
    link.fill(SPECS[name], region, values, part, origin=(0, 8))
    assert np.array_equal(part, whole[:, 8:40])
    assert np.array_equal(read_linked([link], SPECS[name], region, lambda theirs, box: whole[box]), values)
