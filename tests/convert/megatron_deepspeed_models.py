"""GPTs in plain torch with Megatron-DeepSpeed's names, trained by DeepSpeed's real engine on real ranks.

Source of the names and of the order of fused matrices: https://github.com/deepspeedai/Megatron-DeepSpeed.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from megacore.config import ParallelConfig
from megacore.parallel.grid import DeepSpeedGrid, ParallelGrid
from megacore.training.distributed import join_world, leave_world

VOCABULARY, PADDED, POSITIONS, STEPS = 90, 96, 16, 3
LLAMA: dict[str, Any] = {
    "add_bias_linear": False,
    "normalization": "rmsnorm",
    "swiglu": True,
    "use_rotary_position_embeddings": True,
    "add_position_embedding": False,
    "rope_theta": 5000,
    "num_key_value_heads": 4,
    "untie_embeddings_and_output_weights": True,
}
SPLIT = {"ds_sequence_parallel_fpdt": False}
"""A setting of the versions that have all queries of a rank before its keys, and these before its values."""
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "gpt tp2 dp2 zero1": ({}, {"tensor_parallel_size": 2, "zero": 1}),
    "gpt dp4 zero3": ({}, {"zero": 3}),
    "gpt split tp2 dp2 zero2": (SPLIT, {"tensor_parallel_size": 2, "zero": 2}),
    "llama tp2 dp2 zero1": (LLAMA, {"tensor_parallel_size": 2, "zero": 1}),
    "llama tp2 dp2 zero3": (LLAMA, {"tensor_parallel_size": 2, "zero": 3}),
    "gpt tp2 pp2": ({}, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "zero": 1}),
    "llama tp2 pp2": (LLAMA, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "zero": 1}),
}
"""Settings that differ from a GPT's, and the layout."""


def settings(**changes: Any) -> argparse.Namespace:
    """Return what its command line makes of such a model."""
    values = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "kv_channels": 4,
        "max_position_embeddings": POSITIONS,
        "padded_vocab_size": PADDED,
        "vocab_size": None,
        "normalization": "layernorm",
        "layernorm_epsilon": 1e-5,
        "apply_layernorm_1p": False,
        "swiglu": False,
        "squared_relu": False,
        "openai_gelu": False,
        "bias_gelu_fusion": False,
        "add_bias_linear": True,
        "add_position_embedding": True,
        "use_rotary_position_embeddings": False,
        "rotary_percent": 1.0,
        "rope_theta": 10000,
        "untie_embeddings_and_output_weights": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.02,
        "num_experts": [1],
        "consumed_train_samples": 24,
        "params_dtype": torch.float32,
    }
    return argparse.Namespace(**{**values, **changes})


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
    def __init__(self, args: argparse.Namespace, grid: ParallelGrid) -> None:
        super().__init__()
        self.args, parts = args, grid.tensor_parallel_size
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
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
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
    def __init__(self, args: argparse.Namespace, grid: ParallelGrid) -> None:
        super().__init__()
        self.input_layernorm, self.self_attention = norm(args), Attention(args, grid)
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


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1, :VOCABULARY].flatten(0, 1), tokens[:, 1:].flatten())


def randomise(model: nn.Module, grid: ParallelGrid) -> None:
    """Draw a parameter's values by its name: the same to all ranks that share it, others for each part."""
    for name, parameter in model.named_parameters():
        part = grid.tensor_parallel_rank if getattr(parameter, "tensor_model_parallel", False) else 0
        generator = torch.Generator().manual_seed(100 * sum(name.encode()) + part)
        mean = float("norm" in name and name.endswith("weight"))
        parameter.data = mean + 0.3 * torch.randn(parameter.shape, generator=generator)


def universal_info(args: argparse.Namespace, staged: bool) -> dict[str, Any]:
    """Return what it saves for DeepSpeed's ``ds_to_universal``."""
    layer = r"\d+\." if staged else r"language_model\.encoder\.layers\.\d+\."
    embedding = (
        (r"tied_modules\.embed\." if not args.untie_embeddings_and_output_weights else r"1\.")
        if staged
        else (r"language_model\.embedding\.")
    )
    final = r"\d+\." if staged else r"language_model\.encoder\.final_layernorm\."
    words = [f"{embedding}word_embeddings.weight"]
    if args.untie_embeddings_and_output_weights:
        words.append(r"\d+\.lm_head\.weight" if staged else r"language_model\.output_layer\.weight")
    kinds = ["weight", "bias"] if args.normalization == "layernorm" else ["weight"]
    whole = [f"{layer}{part}_layernorm.{kind}" for part in ("input", "post_attention") for kind in kinds]
    whole += [f"{final}{kind}$" for kind in kinds]
    if args.add_position_embedding:
        whole.append(f"{embedding}position_embeddings.weight")
    if args.add_bias_linear:
        whole += [f"{layer}self_attention.dense.bias", f"{layer}mlp.dense_4h_to_h.bias"]
    return {
        "universal_checkpoint_version": 0.2,
        "original_vocab_size": VOCABULARY,
        "padded_vocab_size": PADDED,
        "vocabulary_parameter_patterns": words,
        "tp_replicated_parameter_patterns": whole,
        "parameter_with_row_parallelism_patterns": [
            f"{layer}self_attention.dense.weight",
            f"{layer}mlp.dense_4h_to_h.weight",
        ],
        "parameter_with_2_sub_params_cat_dim_0": [f"{layer}mlp.dense_h_to_4h.weight"] if args.swiglu else [],
        "pipeline_replicated_parameter_patterns": [embedding] if staged and embedding.startswith("tied") else [],
    }


def whole_name(name: str, layers: int) -> str:
    """Return what a pipeline layer's parameter is called in the model without stages."""
    name = re.sub(r"^(tied_modules\.embed|1)\.", "language_model.embedding.", name)
    name = name.replace(f"{layers + 3}.lm_head.", "language_model.output_layer.")
    name = re.sub(rf"^{layers + 2}\.", "language_model.encoder.final_layernorm.", name)
    return re.sub(r"^(\d+)\.", lambda match: f"language_model.encoder.layers.{int(match[1]) - 2}.", name)


def train_all(folder: Path, names: list[str], tokens: Tensor) -> dict[str, dict[str, Any]]:
    """Train and save the models; return this rank's parts of their states by name, and the logits of ``tokens``."""
    join_world()
    results = {}
    for name in names:
        changes, layout = CASES[name]
        sizes = {key: value for key, value in layout.items() if key != "zero"}
        grid = ParallelGrid.create(ParallelConfig(**sizes))
        args = settings(**changes, tensor_model_parallel_size=grid.tensor_parallel_size)
        staged = grid.pipeline_parallel_size > 1
        model: Any = pipeline(args, grid) if staged else GPT(args, grid)
        randomise(model, grid)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-3),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 1,
                "zero_optimization": {"stage": layout["zero"]},
            },
            mpu=None if staged else DeepSpeedGrid(grid),
            dist_init_required=False,
        )
        generator = torch.Generator().manual_seed(grid.data_parallel_rank)
        for _ in range(STEPS):
            batch = torch.randint(VOCABULARY, (2, POSITIONS), generator=generator)
            if staged:
                engine.train_batch(iter([(batch, batch)]))
            else:
                engine.backward(loss_of(engine(batch), batch))
                engine.step()
        info = universal_info(args, staged)
        state = {"args": args, "iteration": STEPS, "checkpoint_version": 3.0, "universal_checkpoint_info": info}
        engine.save_checkpoint(str(folder / name), client_state=state)
        states = {
            whole_name(theirs, args.num_layers): {
                "weight": safe_get_full_fp32_param(parameter).clone(),
                **{key: safe_get_full_optimizer_state(parameter, key).clone() for key in ("exp_avg", "exp_avg_sq")},
            }
            for theirs, parameter in model.named_parameters()
        }
        engine.eval()
        with torch.no_grad():
            logits = engine.eval_batch(iter([(tokens, tokens)]), return_logits=True)[1] if staged else engine(tokens)
        place = grid.pipeline_parallel_rank, grid.tensor_parallel_rank, grid.data_parallel_rank
        results[name] = {"place": place, "states": states, "logits": logits}
    leave_world()
    return results
