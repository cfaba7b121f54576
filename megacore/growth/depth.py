"""Deeper models that compute the same: which layer each layer copies, and what makes a new one do nothing.

Where sublayers are normalised before (pre-norm), a copied layer does nothing if what writes the stream is zero; with
ReZero, if its gates are. Behind a post-norm a layer that adds nothing still normalises twice (three times, if it reads
an encoder). Normalising with small constants again and again is one normalisation with another constant: with u the
centred z, s² its variance and e the constant of each of N norms in a row,

    LN(...LN(z)) = u / sqrt((1 + e + ... + e^(N-1)) s² + e^N).

So the N norms compute what one did with ``eps``, if e^N = eps (1 + e + ... + e^(N-1)) and the last gain is multiplied
by the root of that sum. DeepNorm's factor alpha of the stream cancels if the constants behind it are e alpha².
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megacore.errors import ConfigError
from megacore.growth.maps import copied
from megacore.model_config import ModelConfig, Stack
from megacore.nn.residual import stream_scale

STACKS: dict[Stack, str] = {"encoder": "num_hidden_layers", "decoder": "num_decoder_layers"}
_LAYER = re.compile(r"((?:encoder\.|decoder\.)?layers\.)(\d+)\.(.+)")


@dataclass(frozen=True)
class DepthChange:
    """How the layers of a model grow.

    Args:
        sources: by the prefix of a stack's layers: for each layer of the grown model, the one that it copies.
        constants: parameters that become a constant.
        factors: of parameters that are multiplied.
        config: what changes in the configuration.
    """

    sources: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, float]
    factors: Mapping[str, float]
    config: Mapping[str, Any]

    def source_of(self, parameter: str) -> tuple[str, bool]:
        """Return the parameter of the small model that one of the grown model copies, and whether its layer is new."""
        match = _LAYER.fullmatch(parameter)
        if match is None or match[1] not in self.sources:
            return parameter, False
        prefix, number, rest = match[1], int(match[2]), match[3]
        sources = self.sources[prefix]
        return f"{prefix}{sources[number]}.{rest}", _is_new(sources, number)


def _is_new(sources: tuple[int, ...], number: int) -> bool:
    """Tell a layer's copies from itself: the first of them."""
    return number > 0 and sources[number - 1] == sources[number]


def depth_change(source: ModelConfig, target: ModelConfig) -> DepthChange:
    """Plan the growth of all stacks to the numbers of layers of ``target``.

    Raises:
        ConfigError: the function cannot be kept.
    """
    sources: dict[str, tuple[int, ...]] = {}
    constants: dict[str, float] = {}
    factors: dict[str, float] = {}
    eps = dict(source.norm_eps_of)
    scales: dict[Stack, float] = dict(source.stream_scales)
    stacks: list[Stack] = [stack for stack in STACKS if source.layers_of(stack)]
    for stack in stacks:
        key = STACKS[stack] if source.architecture == "encoder_decoder" else STACKS["encoder"]
        old, new = source.layers_of(stack), target.layers_of(stack)
        if new == old:
            continue
        prefix = f"{stack}.layers." if source.architecture == "encoder_decoder" else "layers."
        sources[prefix] = _placed(source, key, old, new)
        if source.residual in ("post_norm", "deep_norm"):
            chain = _Chain(source, stack, prefix, sources[prefix])
            eps = {name: value for name, value in eps.items() if not name.startswith(prefix)} | chain.eps
            constants |= chain.constants
            factors |= chain.factors
    if sources and source.residual == "deep_norm":  # its formula depends on all the numbers of layers
        scales = {stack: stream_scale(source, stack) for stack in stacks}
    return DepthChange(sources, constants, factors, {"norm_eps_of": eps, "stream_scales": scales})


def _placed(source: ModelConfig, key: str, old: int, new: int) -> tuple[int, ...]:
    """Put copies behind their layers, evenly."""
    if source.residual not in ("post_norm", "deep_norm") or source.norm_affine:
        return tuple(copied(old, new).tolist())
    # Without gains the next layer must undo what the chain of norms leaves: the last layer has none behind it.
    if old == 1:
        raise ConfigError(
            f"{key}={new}: a single post-norm layer without gains (norm_affine=false) cannot be followed by others; "
            "grow the other sizes, or train with two layers"
        )
    return (*copied(old - 1, new - 1).tolist(), old - 1)


class _Chain:
    """The norms of a post-norm stack with new layers."""

    def __init__(self, source: ModelConfig, stack: Stack, prefix: str, sources: tuple[int, ...]) -> None:
        self.eps: dict[str, float] = {}
        self.constants: dict[str, float] = {}
        self.factors: dict[str, float] = {}
        self._source, self._alpha = source, stream_scale(source, stack)
        sublayers = ["attention", "mlp"]
        if source.architecture == "encoder_decoder" and stack == "decoder":
            sublayers.insert(1, "cross_attention")
        left = 1.0  # what the layers before have left the stream divided by
        for number, old in enumerate(sources):
            if _is_new(sources, number):
                continue
            for sublayer in sublayers:
                known = source.norm_eps_of.get(_norm(prefix, old, sublayer))
                if known is not None:
                    self.eps[_norm(prefix, number, sublayer)] = known
            if left != 1.0:
                self._undo(prefix, number, old, left)
            copies = sources.count(old)
            left = 1.0
            if copies > 1:
                last = _norm(prefix, number, "mlp")
                added = [_norm(prefix, number + n, sublayer) for n in range(1, copies) for sublayer in sublayers]
                left = self._link(last, _norm(prefix, old, "mlp"), added)

    def _link(self, first: str, old: str, added: list[str]) -> float:
        """Make a norm and those that new layers add behind it one; return what the stream is divided by then."""
        eps = self._source.norm_eps_of.get(old, self._source.norm_eps)
        small, total = _root(eps, len(added) + 1)
        self.eps[first] = small
        self.eps |= dict.fromkeys(added, small * self._alpha**2)
        if not self._source.norm_affine:
            return math.sqrt(total)
        for norm in (first, *added[:-1]):
            self.constants[f"{norm}.weight"] = 1.0
            self.constants[f"{norm}.bias"] = 0.0
        self.factors[f"{added[-1]}.weight"] = math.sqrt(total)
        return 1.0

    def _undo(self, prefix: str, number: int, old: int, left: float) -> None:
        """Let a layer take a stream that is divided by ``left``."""
        attention = f"{prefix}{number}.attention."
        for name in ("query_weight", "key_value_weight"):
            self.factors[attention + name] = left
        for name in ("output_weight", "output_bias"):
            self.factors[attention + name] = 1.0 / left
        eps = self._source.norm_eps_of.get(_norm(prefix, old, "attention"), self._source.norm_eps)
        self.eps[_norm(prefix, number, "attention")] = eps / left**2


def _norm(prefix: str, number: int, sublayer: str) -> str:
    return f"{prefix}{number}.{sublayer}_residual.norm"


def _root(eps: float, norms: int) -> tuple[float, float]:
    """Return e with e^N = eps (1 + e + ... + e^(N-1)), and that sum."""
    low, high = 0.0, 2.0 + eps
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(middle**power for power in range(norms))
        low, high = (middle, high) if middle**norms < eps * total else (low, middle)
    return low, sum(low**power for power in range(norms))
