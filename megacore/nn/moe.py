"""The feed-forward network as a mixture of experts, through DeepSpeed's MoE layer.

Every token goes to its ``num_experts_per_token`` best experts, none is dropped, and nothing is drawn at random: with
two or more, the chosen experts' softmax weights are renormalised to one (GShard, Lepikhin et al. 2021; Mixtral); with
one, its output is multiplied by its probability (Switch Transformer, Fedus et al. 2022).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megacore.model_config import Stack
from megacore.nn.kit import Kit
from megacore.nn.mlp import MLP, activation_of
from megacore.nn.residual import branch_gain, output_gain
from megacore.params import read, write


def feed_forward(kit: Kit, stack: Stack) -> MLP | MixtureOfExperts:
    """Return a layer's feed-forward network: dense, or a mixture."""
    return MixtureOfExperts(kit, stack) if kit.config.num_experts else MLP(kit, stack)


class Experts(nn.Module):
    """This rank's experts, their matrices stacked along the first dim.

    Forward: [expert-parallel size, experts of this rank, slots, hidden] -> the same.
    """

    def __init__(self, kit: Kit, stack: Stack) -> None:
        super().__init__()
        config, declare = kit.config, kit.declare
        each = write("experts")
        inner = (write("gate_up"), write("ffn")) if config.gated_mlp else (write("ffn"),)
        gain = branch_gain(config, stack)
        self.up_weight = declare(each, *inner, read("hidden"), initial="normal", gain=gain)
        self.down_weight = declare(
            each, write("hidden"), read("ffn"), initial="normal", gain=output_gain(config, stack)
        )
        self.up_bias = declare(each, *inner, initial="zeros") if config.linear_bias else None
        self.down_bias = declare(each, write("hidden"), initial="zeros") if config.linear_bias else None
        self._activate = activation_of(config, kit.compile)
        for parameter in self.parameters():
            # DeepSpeed's marks: averaged over the ranks that hold the same experts, not over all replicas.
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = kit.grid.expert_group_name  # type: ignore[attr-defined]

    def forward(self, slots: Tensor) -> Tensor:
        """Apply expert e to the slots [:, e]."""
        ranks, experts, _, hidden = slots.shape
        x = slots.transpose(0, 1).reshape(experts, -1, hidden)
        inner = x @ self.up_weight.flatten(1, -2).transpose(1, 2)
        if self.up_bias is not None:
            inner = inner + self.up_bias.flatten(1).unsqueeze(1)
        output = self._activate(inner) @ self.down_weight.transpose(1, 2)
        if self.down_bias is not None:
            output = output + self.down_bias.unsqueeze(1)
        return output.view(experts, ranks, -1, hidden).transpose(0, 1)


class MixtureOfExperts(nn.Module):
    """A router and its experts, which expert-parallel ranks share."""

    def __init__(self, kit: Kit, stack: Stack) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE  # here, so that what only reads checkpoints starts quickly

        config = kit.config
        self.router_weight = kit.declare(write("routes"), read("hidden"), initial="normal")
        self.experts = Experts(kit, stack)
        self._layer = MoE(
            config.hidden_size,
            nn.Identity(),
            num_experts=config.num_experts,
            ep_size=kit.grid.expert_parallel_size,
            k=config.num_experts_per_token,
            min_capacity=0,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        # DeepSpeed's parts are made with parameters of their own; these ones are declared.
        self._layer.deepspeed_moe.gate.wg.weight = self.router_weight
        self._layer.deepspeed_moe.experts = self.experts

    def forward(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden] -> [tokens, hidden]."""
        output: Tensor = self._layer.deepspeed_moe(x, None)
        return output

    @property
    def balance_loss(self) -> Tensor:
        """The load-balancing loss of the last micro-batch (GShard, equation 4); 1 where all experts are used alike."""
        loss: Tensor = self._layer.deepspeed_moe.l_aux
        return loss


def with_balance(x: Tensor, mlp: nn.Module, balance: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """Let the sum of the balancing losses travel with the stream: ``balance`` is that of the layers before."""
    if not isinstance(mlp, MixtureOfExperts):
        return x
    return x, mlp.balance_loss if balance is None else torch.add(balance, mlp.balance_loss)
