"""Initial values and dropout do not depend on the layout."""

from __future__ import annotations

import numpy as np
import torch

from megacore.models.transformer import Transformer, declarations
from megacore.nn.attend import Scores, attend
from megacore.nn.kit import Kit
from megacore.nn.packed import packed
from megacore.parallel.dropout import Dropout
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared, initialise
from megacore.specs import Shard
from tests.models import model_config, whole_model


def test_shards_of_any_size_are_cut_from_the_same_initial_model() -> None:
    config = model_config()
    whole = dict(declared(whole_model(config)))
    for parts in (2, 4):
        seen = {name: torch.zeros(parameter.shape, dtype=torch.int) for name, parameter in whole.items()}
        for rank in range(parts):
            shard = Transformer(Kit(config, Declare(config, Shard(rank, parts)), ParallelGrid()))
            initialise(shard, config, seed=1)
            for name, parameter in declared(shard):
                box = tuple(slice(start, stop) for start, stop in parameter.region)
                assert torch.equal(parameter, whole[name][box])
                seen[name][box] += 1
        for name, spec in declarations(config).items():
            copies = 1 if spec.sharded_dim is not None else parts
            assert (seen[name] == copies).all(), name


def test_initial_weights_are_normal_with_the_configured_spread() -> None:
    named = dict(declared(whole_model(model_config(vocab_size=4000))))
    word = named["embeddings.word"].detach().numpy() / 0.2
    assert abs(word.mean()) < 4 / np.sqrt(word.size)
    assert abs(word.std() - 1) < 4 / np.sqrt(2 * word.size)
    assert abs((word**4).mean() - 3) < 4 * np.sqrt(96 / word.size)
    assert abs(np.corrcoef(word[:-1].ravel(), word[1:].ravel())[0, 1]) < 4 / np.sqrt(word.size)


def test_different_seeds_and_names_give_different_weights() -> None:
    first, second = (dict(declared(whole_model(model_config(), seed))) for seed in (1, 2))
    assert not torch.equal(first["embeddings.word"], second["embeddings.word"])
    layers = [first[f"layers.{number}.mlp.up_weight"] for number in (0, 1)]
    assert not torch.equal(*layers)


def masks(samples: list[int], shape: tuple[int, int], site: str = "here", rate: float = 0.1) -> torch.Tensor:
    """Return what is left of ones after dropout in sequences of one length: [samples, length, hidden]."""
    length, hidden = shape
    of_tokens = torch.tensor(samples).repeat_interleave(length)
    positions = torch.arange(length).repeat(len(samples))
    dropped = Dropout(rate, 7, site).stream(torch.ones(len(of_tokens), hidden), of_tokens, positions)
    return dropped.view(len(samples), length, hidden)


def test_a_samples_mask_does_not_depend_on_its_batch_or_length() -> None:
    batch = masks([3, 900, 2**40 + 1], (16, 32))
    alone = masks([900], (24, 32))
    assert torch.equal(batch[1], alone[0, :16])


def test_dropout_has_its_rate_and_keeps_the_mean() -> None:
    for rate in (0.1, 0.5):
        dropped = masks(list(range(64)), (32, 64), rate=rate)
        share = float((dropped == 0).double().mean())
        assert abs(share - rate) < 4 * np.sqrt(rate * (1 - rate) / dropped.numel())
        assert torch.allclose(dropped[dropped > 0], torch.tensor(1 / (1 - rate)))


def test_masks_of_samples_sites_and_neighbours_are_uncorrelated() -> None:
    kept = (masks(list(range(50)), (32, 64)) > 0).double()
    other = (masks(list(range(50)), (32, 64), "elsewhere") > 0).double()
    limit = 5 / np.sqrt(kept.numel())
    pairs = [(kept[1:], kept[:-1]), (kept, other), (kept[:, 1:], kept[:, :-1]), (kept[..., 1:], kept[..., :-1])]
    for a, b in pairs:
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < limit


def test_attention_dropout_equals_a_plain_computation_with_the_same_masks() -> None:
    """In sequences of different lengths, with the heads of the second of two ranks."""
    lengths, heads = (10, 6), 4
    rows = [torch.stack([torch.zeros(n), torch.zeros(n), torch.arange(n)]).long() for n in lengths]
    sequences = torch.tensor([lengths, (0, 0), (4, 8)])
    where = packed(torch.cat(rows, 1), sequences, ParallelGrid())
    query, key, value = torch.randn(3, sum(lengths), heads, 5, dtype=torch.float64)
    dropout = Dropout(0.3, 5, "here")
    output = attend(query, key, value, where, where, Scores("causal", 0.4, None, dropout, first_head=4))
    start = 0
    for number, length in enumerate(lengths):
        q, k, v = (x[start : start + length] for x in (query, key, value))
        scores = 0.4 * torch.einsum("ihd,jhd->hij", q, k)
        hidden = torch.arange(length)[None, :] > torch.arange(length)[:, None]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        ones = torch.ones(1, 8, length, length, dtype=torch.float64)
        mask = dropout.probabilities(ones, sequences[2, number : number + 1], 0)[0, 4:]
        assert 0 < float((mask == 0).double().mean()) < 1
        expected = torch.einsum("hij,jhd->ihd", weights * mask, v)
        assert torch.allclose(output[start : start + length], expected, atol=1e-12)
        start += length
