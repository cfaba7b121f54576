"""The feed-forward network whose inner neurons tensor-parallel ranks share."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megacore.model_config import ModelConfig, Stack
from megacore.nn.compiled import maybe_compiled
from megacore.nn.kit import Kit
from megacore.nn.norm import InnerNorm
from megacore.nn.residual import branch_gain, output_gain
from megacore.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel, on_stream
from megacore.params import read, write


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation (GPT-2, T5 v1.1)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
}


def gated(x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Multiply the activated first half of the last dim by the second half (Shazeer 2020). x: [..., 2 * ffn]."""
    gate, up = x.chunk(2, dim=-1)
    return activation(gate) * up


class MLP(nn.Module):
    """Linear, activation (gated or not), linear; two all-reduces of [tokens, hidden], as in Megatron-LM."""

    def __init__(self, kit: Kit, stack: Stack) -> None:
        super().__init__()
        config, declare = kit.config, kit.declare
        inner = (write("gate_up"), write("ffn")) if config.gated_mlp else (write("ffn"),)
        self.up_weight = declare(*inner, read("hidden"), initial="normal", gain=branch_gain(config, stack))
        self.down_weight = declare(write("hidden"), read("ffn"), initial="normal", gain=output_gain(config, stack))
        self.up_bias = declare(*inner, initial="zeros") if config.linear_bias else None
        self.down_bias = declare(write("hidden"), initial="zeros") if config.linear_bias else None
        self.inner_norm = InnerNorm(kit, "ffn") if config.residual == "sub_norm" else None
        self._grid, self._activate = kit.grid, activation_of(config, kit.compile)

    def forward(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden] -> [tokens, hidden]."""
        x = enter_tensor_parallel(x, self._grid)
        bias = None if self.up_bias is None else self.up_bias.flatten()
        inner = self._activate(F.linear(x, self.up_weight.view(-1, x.shape[-1]), bias))
        if self.inner_norm is not None:
            inner = self.inner_norm(inner)
        output = leave_tensor_parallel(F.linear(inner, self.down_weight), self._grid)
        return output if self.down_bias is None else output + on_stream(self.down_bias, self._grid)


def activation_of(config: ModelConfig, compile: bool = False) -> Callable[[Tensor], Tensor]:
    """Return what happens between the linear maps. [..., ffn or 2 * ffn] -> [..., ffn]."""
    activation = ACTIVATIONS[config.activation]
    if not config.gated_mlp:
        return activation
    combine = maybe_compiled(gated, compile)
    return lambda x: combine(x, activation)
