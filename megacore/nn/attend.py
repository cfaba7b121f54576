"""Attention over packed sequences: each token sees tokens of its own sequence only, and nothing is padded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megacore.nn.packed import Packed
from megacore.parallel.dropout import Dropout

Pattern = Literal["bidirectional", "causal", "prefix"]
"""Which keys a query may see: all, those not after it, or those too that belong to the sequence's prefix."""


@dataclass(frozen=True)
class Scores:
    """How the scores of an attention layer are made.

    Args:
        pattern: which keys a query may see.
        scale: factor of the scores.
        bias: of a sequence's length, gives what is added to the scores: [heads, length, length]; or nothing.
        dropout: of the probabilities; ``None`` in evaluation.
        first_head: number of the first of this rank's heads.
    """

    pattern: Pattern
    scale: float
    bias: Callable[[int], Tensor] | None = None
    dropout: Dropout | None = None
    first_head: int = 0


def attend(query: Tensor, key: Tensor, value: Tensor, queries: Packed, keys: Packed, scores: Scores) -> Tensor:
    """Attend within each sequence.

    Args:
        query: [tokens, heads, head_dim].
        key: [key tokens, kv_heads, head_dim]; a key head serves heads / kv_heads query heads.
        value: like ``key``.
        queries: the sequences of the queries.
        keys: the sequences of the keys (others than the queries' in cross-attention).
        scores: how scores are made.

    Returns:
        [tokens, heads, head_dim].
    """
    if _has_kernel(query, scores):
        return _variable_length_kernel(query, key, value, queries, keys, scores)
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if len(set(queries.lengths)) == 1 and len(set(keys.lengths)) == 1:  # equal lengths: one call for all
        count = len(queries.lengths)
        q, k, v = (x.view(count, -1, *x.shape[1:]) for x in (query, key, value))
        return _attend_alike(q, k, v, queries.samples, queries.prefixes, scores).flatten(0, 1)
    outputs = []
    rows = zip(
        *(torch.split(x, list(w.lengths)) for x, w in ((query, queries), (key, keys), (value, keys))), strict=True
    )
    for number, (q, k, v) in enumerate(rows):
        sample, prefix = queries.samples[number : number + 1], queries.prefixes[number : number + 1]
        outputs.append(_attend_alike(q[None], k[None], v[None], sample, prefix, scores)[0])
    return torch.cat(outputs)


def _has_kernel(query: Tensor, scores: Scores) -> bool:
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and scores.pattern != "prefix"
        and scores.bias is None
        and scores.dropout is None
    )


def _variable_length_kernel(
    query: Tensor, key: Tensor, value: Tensor, queries: Packed, keys: Packed, scores: Scores
) -> Tensor:
    """Call FlashAttention's kernel for packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    output = varlen_attn(
        query,
        key,
        value,
        queries.cumulative,
        keys.cumulative,
        max(queries.lengths),
        max(keys.lengths),
        scale=scores.scale,
        window_size=(-1, 0) if scores.pattern == "causal" else (-1, -1),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, torch.Tensor)  # it returns more only if asked
    return output


def _attend_alike(
    query: Tensor, key: Tensor, value: Tensor, samples: Tensor, prefixes: tuple[int, ...], scores: Scores
) -> Tensor:
    """Attend in sequences of one length. query: [n, length, heads, head_dim] -> the same."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    length, device = query.shape[2], query.device
    allowed: Tensor | None = None
    if scores.pattern != "bidirectional":
        allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if allowed is not None and scores.pattern == "prefix":
        in_prefix = torch.arange(length, device=device) < torch.tensor(prefixes, device=device).unsqueeze(1)
        allowed = allowed | in_prefix[:, None, None, :]
    bias = None if scores.bias is None else scores.bias(length)
    if bias is not None and allowed is not None:
        bias = bias.masked_fill(~allowed, float("-inf"))
    if scores.dropout is not None and scores.dropout.rate:
        return _with_dropout(query, key, value, samples, allowed, bias, scores).transpose(1, 2)
    causal = scores.pattern == "causal" and bias is None
    mask = None if causal else bias if bias is not None else allowed
    output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scores.scale)
    return output.transpose(1, 2)


def _with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    samples: Tensor,
    allowed: Tensor | None,
    bias: Tensor | None,
    scores: Scores,
) -> Tensor:
    """Attend explicitly: fused kernels draw their masks from the device's state, which depends on the layout."""
    assert scores.dropout is not None
    logits = query @ key.transpose(-1, -2) * scores.scale
    if bias is not None:
        logits = logits + bias
    elif allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    probabilities = logits.float().softmax(-1) if logits.dtype != torch.float64 else logits.softmax(-1)
    return scores.dropout.probabilities(probabilities.to(value.dtype), samples, scores.first_head) @ value
