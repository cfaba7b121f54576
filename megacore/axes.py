"""The named axes: everything that is known of a dimension by its name.

A parameter is declared once with named axes (`megacore.params`); which configuration key gives an axis its size,
how tensor-parallel ranks share it and how it grows is looked up here, and nowhere else.

Words: an *axis* is a named axis of a parameter, a *dim* its position in a torch tensor, *grid* and *group* are
about processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Sharding(Enum):
    """How the ranks of a replica share an axis: tensor parallel, but for experts."""

    REPLICATED = "replicated"
    """Every rank holds the whole axis."""
    EVEN = "even"
    """Equal parts; the size must be divisible by the tensor-parallel size."""
    BALANCED = "balanced"
    """Parts that differ by at most one entry: no padding is ever needed."""
    EXPERT = "expert"
    """Equal parts over the expert-parallel ranks, not over the tensor-parallel ones."""


class GrowthRule(Enum):
    """How the entries of a grown axis are made (`megacore.growth.plan`)."""

    STREAM = "stream"
    """The residual stream: copies that its norms do not notice, kernel noise in what reads it."""
    SPLIT = "split"
    """Hidden units between two linear maps: any number of copies, uneven shares on the reading side."""
    HEADS = "heads"
    """Query heads: as hidden units, in step with the key heads that they read."""
    KEY_HEADS = "key_heads"
    """Key and value heads: copies, shared as the query heads are that read them."""
    HEAD_DIM = "head_dim"
    """Numbers of a head: copies, in pairs where pairs are rotated, that keep the scores."""
    ROWS = "rows"
    """Rows of a table: new ones are added."""
    EXPERTS = "experts"
    """Experts: copies of a dense network."""
    FIXED = "fixed"
    """Does not grow."""


@dataclass(frozen=True)
class Axis:
    """A named axis: the model configuration key that gives its size, its sharding and its growth rule."""

    key: str
    sharding: Sharding = Sharding.REPLICATED
    growth: GrowthRule = GrowthRule.FIXED
    stacks: bool = False
    """Stacks several matrices in one parameter (keys and values, gate and up): no fan of any of them."""


AXES: dict[str, Axis] = {
    "hidden": Axis("hidden_size", growth=GrowthRule.STREAM),
    # The output of the token head's dense layer: read by the word table, so it grows as the stream does.
    "transform": Axis("hidden_size", growth=GrowthRule.STREAM),
    "pooled": Axis("hidden_size", growth=GrowthRule.SPLIT),
    "heads": Axis("num_attention_heads", Sharding.EVEN, GrowthRule.HEADS),
    "kv_heads": Axis("num_key_value_heads", Sharding.EVEN, GrowthRule.KEY_HEADS),
    "head_dim": Axis("head_dim", growth=GrowthRule.HEAD_DIM),
    "key_value": Axis("key_value", stacks=True),
    "ffn": Axis("intermediate_size", Sharding.EVEN, GrowthRule.SPLIT),
    "gate_up": Axis("gate_up", stacks=True),
    "experts": Axis("num_experts", Sharding.EXPERT, GrowthRule.EXPERTS, stacks=True),
    "routes": Axis("num_experts", growth=GrowthRule.EXPERTS),
    "vocab": Axis("vocab_size", Sharding.BALANCED, GrowthRule.ROWS),
    "positions": Axis("max_position_embeddings", growth=GrowthRule.ROWS),
    "relative_buckets": Axis("relative_attention_num_buckets"),
    "segments": Axis("type_vocab_size", growth=GrowthRule.ROWS),
    "nsp_classes": Axis("nsp_classes"),
    "scalar": Axis("scalar"),
}


def shard_bounds(size: int, rank: int, parts: int) -> tuple[int, int]:
    """Return [start, stop) of part ``rank`` of an axis cut into ``parts``; equal parts where the size allows."""
    return size * rank // parts, size * (rank + 1) // parts
