"""Initial values and dropout do not depend on the layout."""

from __future__ import annotations

import numpy as np
import torch

from megacore.models.bert import Bert, declarations
from megacore.nn.residual import HiddenDropout
from megacore.parallel.dropout import DropoutKeys
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared, initialise
from tests.models import model_config, whole_model


def test_shards_of_any_size_are_cut_from_the_same_initial_model() -> None:
    config = model_config()
    whole = dict(declared(whole_model(config)))
    for parts in (2, 4):
        seen = {name: torch.zeros(parameter.shape, dtype=torch.int) for name, parameter in whole.items()}
        for rank in range(parts):
            shard = Bert(config, Declare(config, rank, parts), ParallelGrid())
            initialise(shard, config, seed=1)
            for name, parameter in declared(shard):
                box = tuple(slice(start, stop) for start, stop in parameter.region)
                assert torch.equal(parameter, whole[name][box])
                seen[name][box] += 1
        for name, spec in declarations(config).items():
            copies = 1 if spec.sharded_dim is not None else parts
            assert (seen[name] == copies).all(), name


def test_initial_weights_are_normal_with_the_configured_spread() -> None:
    word = whole_model(model_config(vocab_size=4000)).embeddings.word.detach().numpy() / 0.2
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
    keys = DropoutKeys(7, torch.tensor(samples))
    return HiddenDropout(rate, site)(torch.ones(len(samples), *shape), keys)


def test_a_samples_mask_does_not_depend_on_its_batch_or_padding() -> None:
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
    config = model_config(attention_dropout=0.3)
    model = whole_model(config, dtype=torch.float64)
    attention = model.layers[0].attention  # type: ignore[union-attr]
    x = torch.randn(2, 10, config.hidden_size, dtype=torch.float64)
    keys = DropoutKeys(5, torch.tensor([4, 8]))
    query = torch.einsum("bsh,ndh->bnsd", x, attention.query_weight) + attention.query_bias[None, :, None]
    key_value = torch.einsum("bsh,cndh->cbnsd", x, attention.key_value_weight)
    key, value = key_value + attention.key_value_bias[:, None, :, None]
    weights = torch.softmax(query @ key.transpose(-1, -2) / np.sqrt(config.head_dim), dim=-1)
    seq, stride = 10, config.max_position_embeddings
    ones = torch.ones(2, 4, seq, seq, dtype=torch.float64)
    offsets = tuple(
        torch.arange(size, dtype=torch.int32) * step for size, step in ((4, stride * stride), (seq, stride), (seq, 1))
    )
    mask = keys.drop(ones, 0.3, "layers.0.attention.probabilities", offsets)
    context = torch.einsum("bnqk,bnkd->bqnd", weights * mask, value)
    expected = torch.einsum("bsnd,hnd->bsh", context, attention.output_weight) + attention.output_bias
    assert torch.allclose(attention(x, None, keys), expected, atol=1e-12)
