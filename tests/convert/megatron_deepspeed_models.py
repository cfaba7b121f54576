"""GPTs and BERTs in plain torch with Megatron-DeepSpeed's names, in tensor-parallel parts and pipeline stages.

Source of the names and of the order of fused matrices: https://github.com/deepspeedai/Megatron-DeepSpeed.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from megacore.parallel.grid import ParallelGrid

VOCABULARY, PADDED, POSITIONS = 90, 96, 16


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, group: Any) -> Tensor:
        context.group = group
        return x

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient, group=context.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, group: Any) -> Tensor:
        context.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(dist.get_world_size(context.group), -1)[dist.get_rank(context.group)], None


class Linear(nn.Module):
    """A rank's part of a linear map that is cut along its outputs (``column``) or its inputs."""

    def __init__(self, inputs: int, outputs: int, bias: bool, column: bool, grid: ParallelGrid) -> None:
        super().__init__()
        self.column, self.group, parts = column, grid.tensor_parallel_group, grid.tensor_parallel_size
        shape = (outputs // parts, inputs) if column else (outputs, inputs // parts)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape[0])) if bias else None
        self.weight.tensor_model_parallel = True
        if bias and column:
            self.bias.tensor_model_parallel = True

    def forward(self, x: Tensor) -> Tensor:
        if self.column:
            return F.linear(_Copy.apply(x, self.group), self.weight, self.bias)
        y = _Sum.apply(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias


class Words(nn.Module):
    """A rank's rows of the word table."""

    def __init__(self, args: argparse.Namespace, grid: ParallelGrid) -> None:
        super().__init__()
        self.rank, self.group = grid.tensor_parallel_rank, grid.tensor_parallel_group
        self.weight = nn.Parameter(torch.empty(PADDED // grid.tensor_parallel_size, args.hidden_size))
        self.weight.tensor_model_parallel = True

    def forward(self, tokens: Tensor) -> Tensor:
        own = tokens - self.rank * len(self.weight)
        outside = (own < 0) | (own >= len(self.weight))
        return _Sum.apply(F.embedding(own.masked_fill(outside, 0), self.weight) * ~outside[..., None], self.group)

    def logits(self, x: Tensor) -> Tensor:
        return _Gather.apply(F.linear(_Copy.apply(x, self.group), self.weight), self.group)


class Embedding(nn.Module):
    def __init__(self, args: argparse.Namespace, grid: ParallelGrid) -> None:
        super().__init__()
        self.word_embeddings = Words(args, grid)
        self.position_embeddings = nn.Embedding(POSITIONS, args.hidden_size) if args.add_position_embedding else None

    @property
    def word_embeddings_weight(self) -> Tensor:
        return self.word_embeddings.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.word_embeddings(tokens)
        return x if self.position_embeddings is None else x + self.position_embeddings.weight[: tokens.shape[1]]


class Head(nn.Module):
    def __init__(self, args: argparse.Namespace, grid: ParallelGrid) -> None:
        super().__init__()
        self.lm_head = Words(args, grid)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head.logits(x)


def norm_class(args: argparse.Namespace) -> type[nn.Module]:
    return nn.LayerNorm if args.normalization == "layernorm" else nn.RMSNorm


def norm(args: argparse.Namespace) -> nn.Module:
    return norm_class(args)(args.hidden_size, eps=args.layernorm_epsilon)


def rotated(x: Tensor, theta: float) -> Tensor:
    """x: [batch, heads, seq, head_dim]; the first half of a head turns with the second."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] * theta ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), -1)


class Attention(nn.Module):
    def __init__(self, args: argparse.Namespace, grid: ParallelGrid, causal: bool) -> None:
        super().__init__()
        self.args, self.causal, parts = args, causal, grid.tensor_parallel_size
        self.groups, self.sharing = (
            args.num_key_value_heads // parts,
            args.num_attention_heads // args.num_key_value_heads,
        )
        width, hidden = args.num_attention_heads * args.kv_channels, args.hidden_size
        fused = width + 2 * args.num_key_value_heads * args.kv_channels
        self.query_key_value = Linear(hidden, fused, args.add_bias_linear, True, grid)
        self.dense = Linear(width, hidden, args.add_bias_linear, False, grid)

    def forward(self, x: Tensor) -> Tensor:
        fused, (batch, length, _), size = self.query_key_value(x), x.shape, self.args.kv_channels
        if hasattr(self.args, "ds_sequence_parallel_fpdt"):
            q, k, v = (part.reshape(batch, length, -1, size) for part in fused.chunk(3, -1))
        else:
            grouped = fused.view(batch, length, self.groups, self.sharing + 2, size)
            q = grouped[..., : self.sharing, :].reshape(batch, length, -1, size)
            k, v = grouped[..., self.sharing, :], grouped[..., self.sharing + 1, :]
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.args.use_rotary_position_embeddings:
            q, k = rotated(q, self.args.rope_theta), rotated(k, self.args.rope_theta)
        k, v = (part.repeat_interleave(self.sharing, 1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.dense(y.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, args: argparse.Namespace, grid: ParallelGrid) -> None:
        super().__init__()
        self.gated, inner = args.swiglu, args.ffn_hidden_size
        self.dense_h_to_4h = Linear(args.hidden_size, inner * (1 + args.swiglu), args.add_bias_linear, True, grid)
        self.dense_4h_to_h = Linear(inner, args.hidden_size, args.add_bias_linear, False, grid)

    def forward(self, x: Tensor) -> Tensor:
        up = self.dense_h_to_4h(x)
        if self.gated:
            gate, up = up.chunk(2, -1)
            return self.dense_4h_to_h(F.silu(gate) * up)
        return self.dense_4h_to_h(F.gelu(up))


class Layer(nn.Module):
    def __init__(self, args: argparse.Namespace, grid: ParallelGrid, causal: bool = True) -> None:
        super().__init__()
        self.input_layernorm, self.self_attention = norm(args), Attention(args, grid, causal)
        self.post_attention_layernorm, self.mlp = norm(args), MLP(args, grid)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class GPT(nn.Module):
    def __init__(self, args: argparse.Namespace, grid: ParallelGrid) -> None:
        super().__init__()
        layers = nn.ModuleList(Layer(args, grid) for _ in range(args.num_layers))
        encoder = nn.ModuleDict({"layers": layers, "final_layernorm": norm(args)})
        parts: dict[str, nn.Module] = {"embedding": Embedding(args, grid), "encoder": encoder}
        if args.untie_embeddings_and_output_weights:
            parts["output_layer"] = Words(args, grid)
        self.language_model = nn.ModuleDict(parts)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.language_model
        x = parts["embedding"](tokens)
        for layer in parts["encoder"]["layers"]:
            x = layer(x)
        table = parts["output_layer"] if "output_layer" in parts else parts["embedding"].word_embeddings
        return table.logits(parts["encoder"]["final_layernorm"](x))


class BERTHead(nn.Module):
    def __init__(self, args: argparse.Namespace, grid: ParallelGrid) -> None:
        super().__init__()
        self.group = grid.tensor_parallel_group
        self.dense, self.layernorm = nn.Linear(args.hidden_size, args.hidden_size), norm(args)
        self.bias = nn.Parameter(torch.empty(PADDED // grid.tensor_parallel_size))
        self.bias.tensor_model_parallel = True

    def forward(self, x: Tensor, words: Words) -> Tensor:
        x = self.layernorm(F.gelu(self.dense(x)))
        return words.logits(x) + _Gather.apply(self.bias, self.group)


class BERT(nn.Module):
    """Takes tokens and segments; all of a sequence is seen from everywhere in it."""

    def __init__(self, args: argparse.Namespace, grid: ParallelGrid) -> None:
        super().__init__()
        layers = nn.ModuleList(Layer(args, grid, causal=False) for _ in range(args.num_layers))
        embedding = Embedding(args, grid)
        embedding.tokentype_embeddings = nn.Embedding(2, args.hidden_size)
        self.language_model = nn.ModuleDict(
            {
                "embedding": embedding,
                "encoder": nn.ModuleDict({"layers": layers, "final_layernorm": norm(args)}),
                "pooler": nn.ModuleDict({"dense": nn.Linear(args.hidden_size, args.hidden_size)}),
            }
        )
        self.lm_head, self.binary_head = BERTHead(args, grid), nn.Linear(args.hidden_size, 2)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.language_model
        x = parts["embedding"](tokens) + parts["embedding"].tokentype_embeddings(segments_of(tokens))
        for layer in parts["encoder"]["layers"]:
            x = layer(x)
        x = parts["encoder"]["final_layernorm"](x)
        pairs = self.binary_head(parts["pooler"]["dense"](x[:, 0]).tanh())
        return self.lm_head(x, parts["embedding"].word_embeddings), pairs


def segments_of(tokens: Tensor) -> Tensor:
    """Return the segments of some sequences: of each half one."""
    return (torch.arange(tokens.shape[1]) >= tokens.shape[1] // 2).long().expand_as(tokens)


def pipeline(args: argparse.Namespace, grid: ParallelGrid) -> PipelineModule:
    """Make the list of layers that ``GPTModelPipe`` makes."""
    layers = [LayerSpec(Layer, args, grid) for _ in range(args.num_layers)]
    if args.untie_embeddings_and_output_weights:
        first, last = LayerSpec(Embedding, args, grid), LayerSpec(Head, args, grid)
    else:
        tied: dict[str, Any] = {"tied_weight_attr": "word_embeddings_weight"}
        first = TiedLayerSpec("embed", Embedding, args, grid, **tied)
        use = lambda embedding, x: embedding.word_embeddings.logits(x)  # noqa: E731
        last = TiedLayerSpec("embed", Embedding, args, grid, forward_fn=use, **tied)
    specs = [
        lambda tokens: tokens,
        first,
        *layers,
        LayerSpec(norm_class(args), args.hidden_size, eps=args.layernorm_epsilon),
        last,
    ]
    topology = PipeModelDataParallelTopology(
        num_pp=grid.pipeline_parallel_size, num_mp=grid.tensor_parallel_size, num_dp=grid.data_parallel_size
    )
    return PipelineModule(specs, topology=topology, loss_fn=loss_of, partition_method="parameters")


def loss_of(outputs: Tensor | tuple[Tensor, Tensor], tokens: Tensor) -> Tensor:
    """Return some loss that every parameter has a part in."""
    if isinstance(outputs, tuple):
        words, pairs = outputs
        return F.cross_entropy(words[..., :VOCABULARY].flatten(0, 1), tokens.flatten()) + F.cross_entropy(
            pairs, tokens[:, 0] % 2
        )
    logits = outputs
    return F.cross_entropy(logits[:, :-1, :VOCABULARY].flatten(0, 1), tokens[:, 1:].flatten())
