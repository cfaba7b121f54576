"""What a plan is said to keep is what the proofs of growth find: see the tests named in each case."""

from __future__ import annotations

from typing import Any

import pytest

from megacore.growth.describe import Dtypes, exactness, notes, parameter_notes, rounded_to, steps
from megacore.growth.plan import GrowthPlan, Symmetry, make_plan
from tests.growth.small import EVEN, FAMILIES, family
from tests.growth.test_every_family import EVENLY


def stored(source: str, written: str) -> Dtypes:
    return Dtypes(lambda name, state: source, lambda name, state: written)


SAME = stored("float32", "float32")


def found(plan: GrowthPlan, dtypes: Dtypes = SAME) -> set[str]:
    return {note.name for note in notes(plan, dtypes, keep_optimizer=True, moments=True)}


@pytest.mark.parametrize("sizes", EVENLY.values(), ids=list(EVENLY))
@pytest.mark.parametrize("name", FAMILIES)
def test_what_goes_on_in_lock_step_is_called_exact(name: str, sizes: dict[str, int]) -> None:
    """`test_adam_goes_on_in_lock_step_with_the_small_model` finds that it does."""
    if name == "sub-norm" and "head_dim" in sizes:
        return
    plan = make_plan(family(name), sizes, EVEN)
    assert exactness(notes(plan, SAME, True, True), "optimizer") == "exact"
    # With copies that differ, it is not, and the notes say that it is on purpose.
    reasons = notes(make_plan(family(name), sizes, Symmetry()), SAME, True, True)
    assert exactness(reasons, "optimizer") != "exact"
    assert all("wanted" in note.reason for note in reasons if note.about == "optimizer")


CASES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("gpt2", {"hidden_size": 36}, {"uneven copies", "stream's mean"}),
    ("llama", {"hidden_size": 36}, {"uneven copies"}),
    ("bert", {"hidden_size": 36}, {"uneven copies"}),
    ("bert", {"intermediate_size": 67}, {"uneven copies"}),
    ("llama", {"num_key_value_heads": 4}, {"smaller key groups"}),
    ("llama", {"num_key_value_heads": 4, "num_attention_heads": 8}, set()),
    ("gpt2", {"num_hidden_layers": 4}, {"new layer"}),
    ("bert", {"vocab_size": 128}, {"new tokens", "new rows"}),
    ("bert", {"max_position_embeddings": 64}, {"new rows"}),
    ("llama", {"num_experts": 4}, {"gates in float32", "experts share tokens", "new router"}),
]


@pytest.mark.parametrize(("name", "sizes", "expected"), CASES)
def test_each_limit_is_named_and_no_other(name: str, sizes: dict[str, Any], expected: set[str]) -> None:
    names = found(make_plan(family(name), sizes, EVEN)) - {"dropout", "rounding to float32"}
    assert names == expected


def test_rounding_is_known_before_anything_is_rounded() -> None:
    """`test_doubled_bfloat16_models_give_the_same_bits`, and the parts of bfloat16 weights that sum up exactly."""
    double = {"hidden_size": 48, "num_attention_heads": 8, "intermediate_size": 80}
    bf16 = stored("bfloat16", "bfloat16")
    even = make_plan(family("llama"), double, EVEN)
    assert rounded_to(even, bf16) is None and rounded_to(even, stored("float32", "float64")) is None
    assert rounded_to(even, stored("float32", "bfloat16")) == "bfloat16"
    assert rounded_to(make_plan(family("llama"), double, Symmetry()), bf16) == "bfloat16"
    parts = make_plan(family("llama"), {"intermediate_size": 67}, Symmetry(noise_scale=0.0))
    assert rounded_to(parts, bf16) is None and rounded_to(parts, SAME) == "float32"
    assert rounded_to(make_plan(family("llama"), {"hidden_size": 36}, EVEN), bf16) == "bfloat16"


def test_a_parameter_that_nothing_happens_to_is_exact() -> None:
    plan = make_plan(family("bert"), {"num_attention_heads": 8}, Symmetry())
    assert steps(plan, "embeddings.word") == () and parameter_notes(plan, "embeddings.word", SAME, True) == ()
    assert steps(plan, "layers.0.attention.output_weight") == ("heads 4→8: shared unevenly",)


def test_biases_that_layers_with_shares_of_their_own_share_are_not_exact() -> None:
    """`test_gradients_are_the_mapped_gradients` leaves them out."""
    plan = make_plan(family("t5"), {"num_attention_heads": 8}, Symmetry(noise_scale=0.0))
    (note,) = parameter_notes(plan, "encoder.relative_bias.weight", SAME, True)
    assert (note.about, note.name) == ("optimizer", "shares of many layers")
    even = make_plan(family("t5"), {"num_attention_heads": 8}, EVEN)
    assert parameter_notes(even, "encoder.relative_bias.weight", SAME, True) == ()


def test_dropout_is_said_where_there_is_some() -> None:
    names = {note.about: note.reason for note in notes(make_plan(family("bert"), {}, EVEN), SAME, True, True)}
    assert "attention_dropout=0.1" in names["training"]
    still = family("bert").model_copy(update={"hidden_dropout": 0.0, "attention_dropout": 0.0})
    assert found(make_plan(still, {}, EVEN)) == set()
