"""Growth changes the size and nothing else: every family along every axis, trained before, in float64."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch

from megacore.checkpoint.load import load_model
from megacore.checkpoint.reader import CheckpointReader
from megacore.errors import ConfigError
from megacore.growth.plan import Symmetry, make_plan
from megacore.models.transformer import Transformer
from megacore.params import declared
from megacore.specs import Role
from tests.growth.small import (
    EVEN,
    FAMILIES,
    LLAMA,
    adam_of,
    batch_of,
    family,
    grow,
    loss_of,
    relative_errors,
    save,
    step,
    trained_model,
)
from tests.models import model_config

AXES: dict[str, dict[str, int]] = {
    "hidden x2": {"hidden_size": 48},
    "hidden x1.5": {"hidden_size": 36},
    "hidden 24 to 25": {"hidden_size": 25},
    "hidden 24 to 31": {"hidden_size": 31},
    "hidden x2.5": {"hidden_size": 60},
    "heads x2": {"num_attention_heads": 8},
    "heads 4 to 6": {"num_attention_heads": 6},
    "heads and key heads x3": {"num_attention_heads": 12, "num_key_value_heads": 12},
    "head size x2": {"head_dim": 12},
    "head size 6 to 10": {"head_dim": 10},
    "ffn x2": {"intermediate_size": 80},
    "ffn 40 to 67": {"intermediate_size": 67},
    "vocabulary": {"vocab_size": 128},
    "positions": {"max_position_embeddings": 50},
    "depth x2": {"num_hidden_layers": 6},
    "depth to 7": {"num_hidden_layers": 7},
    "all x2": {
        "hidden_size": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 12,
        "intermediate_size": 80,
        "num_hidden_layers": 6,
        "vocab_size": 128,
    },
    "all unevenly": {
        "hidden_size": 37,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 8,
        "intermediate_size": 67,
        "num_hidden_layers": 5,
        "vocab_size": 103,
        "max_position_embeddings": 40,
    },
}
GROUPED: dict[str, dict[str, int]] = {
    "key heads x2": {"num_key_value_heads": 4, "num_attention_heads": 8},
    "key heads 2 to 3": {"num_key_value_heads": 3, "num_attention_heads": 6},
    "one key head for each query head": {"num_key_value_heads": 4},
}
DECODER_DEPTH = {
    "decoder depth": {"num_decoder_layers": 5},
    "both depths": {"num_hidden_layers": 3, "num_decoder_layers": 4},
}
REFUSED = {("sub-norm", axis) for axis in ("heads 4 to 6", "head size x2", "head size 6 to 10", "ffn 40 to 67")}
REFUSED |= {("sub-norm", "all x2"), ("sub-norm", "all unevenly")}
CASES = [
    (name, axis, sizes)
    for name, values in FAMILIES.items()
    for axis, sizes in (
        AXES
        | (GROUPED if values.get("num_key_value_heads") == 2 else {})
        | (DECODER_DEPTH if values.get("architecture") == "encoder_decoder" else {})
    ).items()
    if (name, axis) not in REFUSED
]

_folder = TemporaryDirectory()


@cache
def small(name: str) -> tuple[Path, Transformer]:
    """Train a family's small model, save it at tensor parallel size 2."""
    model, optimizer = trained_model(family(name))
    path = Path(_folder.name) / name
    save(model, optimizer, path, parts=2)
    return path, model


@pytest.mark.parametrize(("name", "axis", "sizes"), CASES, ids=[f"{name}: {axis}" for name, axis, _ in CASES])
def test_the_grown_model_computes_the_same(name: str, axis: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """With kernel noise and uneven shares, which cost nothing."""
    path, model = small(name)
    large = load_model(grow(path, tmp_path / "large", sizes), torch.float64)
    assert all(getattr(large.config, key) == size for key, size in sizes.items())
    assert max(relative_errors(model, large, batch_of(model.config, 99))) <= 1e-12


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "roformer v2", "deepnorm"])
def test_a_dense_model_becomes_a_mixture(name: str, tmp_path: Path) -> None:
    """DeepSpeed computes gates in float32, so that the weights of two experts sum to one up to its rounding."""
    path, model = small(name)
    sizes = {"num_experts": 4, "hidden_size": 48, "intermediate_size": 80}
    large = load_model(grow(path, tmp_path / "large", sizes), torch.float64)
    assert max(relative_errors(model, large, batch_of(model.config, 99))) <= 1e-6
    up = dict(declared(large))[("encoder." if name == "t5" else "") + "layers.0.mlp.experts.up_weight"]
    assert not torch.allclose(up[0], up[1])  # each expert has noise of its own


def test_a_mixture_grows_like_a_dense_model(tmp_path: Path) -> None:
    model, optimizer = trained_model(model_config(**LLAMA, num_experts=3))
    save(model, optimizer, tmp_path / "small", parts=1)
    sizes = {"hidden_size": 36, "num_attention_heads": 8, "intermediate_size": 67, "num_hidden_layers": 4}
    large = load_model(grow(tmp_path / "small", tmp_path / "large", sizes), torch.float64)
    assert max(relative_errors(model, large, batch_of(model.config, 99))) <= 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_growing_twice_computes_the_same_as_once(name: str, tmp_path: Path) -> None:
    path, model = small(name)
    first = {"hidden_size": 36, "intermediate_size": 80, "num_hidden_layers": 4}
    last = {"hidden_size": 60, "num_attention_heads": 8, "intermediate_size": 160, "num_hidden_layers": 7}
    grow(path, tmp_path / "once", first)
    twice = load_model(grow(tmp_path / "once", tmp_path / "twice", last), torch.float64)
    direct = load_model(grow(path, tmp_path / "direct", last), torch.float64)
    for which in (twice, direct):
        assert max(relative_errors(model, which, batch_of(model.config, 99))) <= 1e-12


def expected_gradient(plan: Any, name: str, small_gradients: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Map a gradient by the chain rule: what is written changes by the share, what is read does not, and so on."""
    gradient = small_gradients[plan.rules[name].source] / plan.rules[name].factor
    for position, (dim, axis_map) in enumerate(zip(plan.specs[name].dims, plan.maps(name), strict=True)):
        factor = axis_map.gradient_factor(dim.role).reshape([-1 if p == position else 1 for p in range(gradient.ndim)])
        gradient = np.take(gradient, axis_map.source, axis=position) * factor
    return gradient


def possible(growths: dict[str, dict[str, int]], *unequal: str) -> dict[str, Any]:
    """Pair families and growths, but for those that sub-norm refuses: its inner norms need equal copies."""
    pairs = [(name, growth) for name in FAMILIES for growth in growths if name != "sub-norm" or growth not in unequal]
    return {"argvalues": [(name, growths[growth]) for name, growth in pairs], "ids": ["-".join(pair) for pair in pairs]}


WIDER: dict[str, dict[str, int]] = {
    "x2": {"hidden_size": 48, "num_attention_heads": 8, "intermediate_size": 80},
    "x1.5": {"hidden_size": 36},
    "head size": {"head_dim": 10},
    "uneven shares": {"intermediate_size": 67, "num_attention_heads": 8},
}


@pytest.mark.parametrize(("name", "sizes"), **possible(WIDER, "head size", "uneven shares"))
def test_gradients_are_the_mapped_gradients(name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """The moments' rule, checked by autograd."""
    path, model = small(name)
    uneven = "intermediate_size" in sizes and "hidden_size" not in sizes
    grouped = family(name).num_key_value_heads == 2  # a key head's gradient is a sum over query heads
    symmetry = Symmetry(noise_scale=0.0, share_scale=0.2 if uneven and not grouped else 0.0)
    plan = make_plan(model.config, sizes, symmetry)
    centred = any(axis_map.centre is not None for parameter in plan.specs for axis_map in plan.maps(parameter))
    large = load_model(grow(path, tmp_path / "large", sizes, symmetry=symmetry), torch.float64)
    batch = batch_of(model.config, 7)
    for which in (model, large):
        which.zero_grad()
        loss_of(which, batch).backward()
    gradients = {parameter: values.grad.numpy() for parameter, values in declared(model)}
    for parameter, values in declared(large):
        tied = (Role.WRITE, Role.SCALE_READ, Role.SHIFT_READ)
        writes = any(dim.axis == "hidden" and dim.role in tied for dim in plan.specs[parameter].dims)
        if centred and writes:  # what the stream's mean sees, which layer norms drop, is shared in another way
            continue
        if uneven and "relative_bias" in parameter:  # its gradient is a sum over layers, each with shares of its own
            continue
        expected = expected_gradient(plan, parameter, gradients)
        scale = np.abs(expected).max() + 1e-6  # some gradients are zero: softmax does not see key biases
        assert np.abs(values.grad.numpy() - expected).max() <= 1e-10 * scale, parameter


EVENLY: dict[str, dict[str, int]] = {
    "x2": {"hidden_size": 48, "num_attention_heads": 8, "intermediate_size": 80},
    "x3": {"hidden_size": 72, "num_attention_heads": 12, "intermediate_size": 120},
    "head size x2": {"head_dim": 12, "hidden_size": 48},
}


@pytest.mark.parametrize(("name", "sizes"), **possible(EVENLY, "head size x2"))
def test_adam_goes_on_in_lock_step_with_the_small_model(name: str, sizes: dict[str, int], tmp_path: Path) -> None:
    path, model = small(name)
    before, before_adam = adam_of(CheckpointReader(path))
    after, after_adam = adam_of(grow(path, tmp_path / "large", sizes, symmetry=EVEN))
    for number in range(5):
        for which in ((before, before_adam), (after, after_adam)):
            step(*which, batch_of(model.config, 20 + number))
    batch = batch_of(model.config, 50)
    assert max(relative_errors(model, before, batch)) > 1e-3  # five steps change the function
    assert max(relative_errors(before, after, batch)) <= 1e-10


def test_new_entries_have_second_moments(tmp_path: Path) -> None:
    """Without, the first steps of Adam on them would be three times as large as any."""
    sizes = {"hidden_size": 25, "vocab_size": 128, "num_hidden_layers": 4, "num_experts": 2}
    for name in ("gpt2", "bert"):
        reader = grow(small(name)[0], tmp_path / name, sizes)
        for parameter in reader.manifest.parameters:
            second = reader.read(parameter, "exp_avg_sq")
            if not parameter.endswith("key_value_bias"):  # softmax does not see key biases: their gradient is zero
                assert (second[: 24 if "position" in parameter else None] > 0).all(), parameter
        assert not reader.read("embeddings.word", "exp_avg")[101:].any()


@pytest.mark.parametrize(
    ("name", "sizes", "parts"),
    [
        ("bert", {"hidden_size": 12}, ["hidden_size=12", "smaller"]),
        ("bert", {"hiden_size": 48}, ["hiden_size", "hidden_size"]),
        ("bert", {"intermediate_size": "big"}, ["intermediate_size", "big"]),
        (
            "bert",
            {"hidden_size": 2_000_000_000, "intermediate_size": 2_000_000_000},
            ["hidden_size=2000000000", "parameters"],
        ),
        ("bert", {"num_hidden_layers": "many"}, ["num_hidden_layers", "many"]),
        ("gpt2", {"type_vocab_size": 2}, ["type_vocab_size=2", "no table"]),
        ("bert", {"activation": "relu"}, ["activation", "cannot be changed"]),
        ("llama", {"num_key_value_heads": 3, "num_attention_heads": 3}, ["num_attention_heads=3", "smaller"]),
        ("llama", {"head_dim": 9}, ["head_dim=9", "odd"]),
        ("llama", {"num_experts": 4, "num_experts_per_token": 1}, ["num_experts_per_token", "smaller"]),
        ("sub-norm", {"intermediate_size": 67}, ["intermediate_size=67", "80"]),
        ("sub-norm", {"head_dim": 12}, ["head_dim=12", "num_attention_heads"]),
    ],
)
def test_growth_that_would_change_the_function_is_refused(name: str, sizes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_plan(family(name), sizes, Symmetry())
    for part in parts:
        assert part in str(error.value)


def test_key_heads_whose_queries_do_not_fit_are_refused() -> None:
    model = model_config(**{**LLAMA, "num_attention_heads": 8, "head_dim": 6})
    with pytest.raises(ConfigError, match=r"num_key_value_heads=3 with num_attention_heads=9.*num_attention_heads=12"):
        make_plan(model, {"num_key_value_heads": 3, "num_attention_heads": 9}, Symmetry())


def test_experts_of_a_mixture_cannot_be_multiplied() -> None:
    with pytest.raises(ConfigError, match=r"num_experts=8.*copies"):
        make_plan(model_config(**LLAMA, num_experts=4), {"num_experts": 8}, Symmetry())
    with pytest.raises(ConfigError, match=r"num_experts_per_token=3.*keep 2"):
        make_plan(model_config(**LLAMA, num_experts=4), {"num_experts_per_token": 3}, Symmetry())


def test_unequal_copies_of_heads_under_an_inner_norm_are_refused(tmp_path: Path) -> None:
    """Three times the query heads, twice the key heads: each key head's copy would serve the same ones unequally."""
    model = model_config(**{**FAMILIES["sub-norm"], "num_key_value_heads": 2})
    with pytest.raises(ConfigError, match=r"num_attention_heads=12 with num_key_value_heads=4: .*nearest.*: 8, 16"):
        make_plan(model, {"num_attention_heads": 12, "num_key_value_heads": 4}, Symmetry())
    trained, optimizer = trained_model(model)
    save(trained, optimizer, tmp_path / "small", parts=1)
    for number, (heads, keys) in enumerate([(8, 4), (16, 4), (12, 2), (12, 6), (8, 8), (4, 4)]):
        sizes = {"num_attention_heads": heads, "num_key_value_heads": keys}
        large = load_model(grow(tmp_path / "small", tmp_path / str(number), sizes), torch.float64)
        assert max(relative_errors(trained, large, batch_of(model, 99))) <= 1e-12


@pytest.mark.parametrize("sizes", [{"hidden_size": 48}, {"hidden_size": 37}], ids=["even", "uneven"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_final_norm_that_a_pooler_reads_keeps_both_heads(norm: str, sizes: dict[str, int], tmp_path: Path) -> None:
    """A gain that makes up for the copies of a tied table would scale what the pooler reads."""
    model = model_config(residual="pre_norm", norm=norm, embedding_norm=False, lm_transform=False, norm_eps=1e-5)
    trained, optimizer = trained_model(model)
    save(trained, optimizer, tmp_path / "small", parts=1)
    large = load_model(grow(tmp_path / "small", tmp_path / "large", sizes), torch.float64)
    assert max(relative_errors(trained, large, batch_of(model, 99))) <= 1e-12


def test_layers_share_their_multipliers() -> None:
    """Or every layer would have optimizer groups of its own."""
    plan = make_plan(family("llama"), {"hidden_size": 36, "intermediate_size": 67, "head_dim": 10}, Symmetry())
    pairs = {(plan.learning_rate_multiplier(name), plan.adam_eps_multiplier(name)) for name in plan.specs}
    kinds = {name.split(".", 2)[-1] for name in plan.specs}
    assert len(pairs) <= len(kinds)


def test_a_lone_post_norm_layer_without_gains_cannot_be_followed() -> None:
    model = model_config(**{**FAMILIES["roformer v2"], "num_hidden_layers": 1})
    with pytest.raises(ConfigError, match="num_hidden_layers=3: a single post-norm layer without gains"):
        make_plan(model, {"num_hidden_layers": 3}, Symmetry())
