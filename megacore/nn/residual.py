"""How a layer's branches join the residual stream, and the constants that keep deep stacks stable."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn

from megacore.model_config import ModelConfig, Stack
from megacore.nn.kit import Kit
from megacore.nn.norm import Norm
from megacore.nn.packed import Packed
from megacore.parallel.collectives import on_stream
from megacore.params import write


def stream_scale(config: ModelConfig, stack: Stack) -> float:
    """Return DeepNorm's alpha, the factor of the stream (Wang et al. 2022, DeepNet, table 2); 1 for other schemes."""
    if config.residual != "deep_norm":
        return 1.0
    if stack in config.stream_scales:
        return config.stream_scales[stack]
    own = config.layers_of(stack)
    if config.architecture != "encoder_decoder":
        return float((2 * own) ** 0.25)
    if stack == "decoder":
        return float((3 * own) ** 0.25)
    return float(0.81 * (own**4 * config.layers_of("decoder")) ** (1 / 16))


def branch_gain(config: ModelConfig, stack: Stack) -> float:
    """Return the factor of the initial values, output projection and feed-forward matrices.

    DeepNorm's beta (DeepNet, table 2); Sub-LN's gamma (Wang et al. 2022, Foundation Transformers, table 2); 1 for
    other schemes.
    """
    own = config.layers_of(stack)
    both = config.architecture == "encoder_decoder"
    encoder, decoder = config.layers_of("encoder"), config.layers_of("decoder")
    if config.residual == "deep_norm":
        if not both:
            return float((8 * own) ** -0.25)
        return float((12 * own) ** -0.25 if stack == "decoder" else 0.87 * (own**4 * decoder) ** (-1 / 16))
    if config.residual == "sub_norm":
        if not both:
            return math.sqrt(math.log(2 * own))
        inside = math.log(3 * decoder)
        return math.sqrt(inside if stack == "decoder" else inside * math.log(2 * encoder) / 3)
    return 1.0


def output_gain(config: ModelConfig, stack: Stack) -> float:
    """Return the factor of the initial values of the matrices that write the stream."""
    gain = branch_gain(config, stack)
    if config.initialization == "depth_scaled":
        gain /= math.sqrt(2 * config.layers_of(stack))
    return gain


class Residual(nn.Module):
    """One sublayer's place on the stream: norm, branch, dropout and sum in the order of the residual scheme.

    post_norm: N(x + F(x)); deep_norm: N(αx + F(x)); pre_norm, sub_norm: x + F(N(x)); rezero: x + aF(x), where a is
    trained from zero and there is no norm (Bachlechner et al. 2020).
    """

    def __init__(self, kit: Kit, site: str, stack: Stack) -> None:
        super().__init__()
        config = kit.config
        eps = config.norm_eps_of.get(f"{site}_residual.norm")
        self.norm = Norm(kit, eps=eps) if config.residual != "rezero" else None
        self.gate = kit.declare(write("scalar"), initial="zeros") if config.residual == "rezero" else None
        self._before, self._scale = config.norms_inputs, stream_scale(config, stack)
        self._dropout, self._grid = kit.hidden_dropout(site), kit.grid

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], sequences: Packed) -> Tensor:
        """x: [tokens, hidden] -> [tokens, hidden]."""
        if self.norm is not None and self._before:
            return x + self._dropped(branch(self.norm(x)), sequences)
        change = self._dropped(branch(x), sequences)
        if self.gate is not None:
            return x + on_stream(self.gate, self._grid) * change
        assert self.norm is not None
        result: Tensor = self.norm((x if self._scale == 1.0 else self._scale * x) + change)
        return result

    def _dropped(self, x: Tensor, sequences: Packed) -> Tensor:
        if not self.training or not self._dropout.rate:
            return x
        return self._dropout.stream(x, sequences.stream.samples, sequences.stream.positions)
