"""Runs of Megatron-DeepSpeed's models by DeepSpeed's real engine on real ranks: settings, layouts, training."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from megacore.config import ParallelConfig
from megacore.parallel.grid import DeepSpeedGrid, ParallelGrid
from megacore.training.distributed import join_world, leave_world
from tests.convert.megatron_deepspeed_models import BERT, GPT, PADDED, POSITIONS, VOCABULARY, loss_of, pipeline

STEPS = 3
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
    "gpt dp4 zero3 in sub-groups": ({}, {"zero": 3, "sub_group_size": 5000}),
    "gpt split tp2 dp2 zero2": (SPLIT, {"tensor_parallel_size": 2, "zero": 2}),
    "llama tp2 dp2 zero1": (LLAMA, {"tensor_parallel_size": 2, "zero": 1}),
    "llama tp2 dp2 zero3": (LLAMA, {"tensor_parallel_size": 2, "zero": 3}),
    "bert tp2 dp2 zero1": ({"bert": True}, {"tensor_parallel_size": 2, "zero": 1}),
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
        "bert": False,
        "num_experts": [1],
        "consumed_train_samples": 24,
        "params_dtype": torch.float32,
    }
    return argparse.Namespace(**{**values, **changes})


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
    if args.bert:
        whole += [
            r"language_model\.embedding\.tokentype",
            r"language_model\.pooler",
            "lm_head.dense",
            "lm_head.layer",
            "bin",
        ]
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
    """Train and save the models; return this rank's parts of their states by name, and what they compute."""
    join_world()
    results = {}
    for name in names:
        changes, layout = CASES[name]
        sizes = {key: value for key, value in layout.items() if key.endswith("parallel_size")}
        zero = {"stage": layout["zero"], "sub_group_size": layout.get("sub_group_size", 10**9)}
        grid = ParallelGrid.create(ParallelConfig(**sizes))
        args = settings(**changes, tensor_model_parallel_size=grid.tensor_parallel_size)
        staged = grid.pipeline_parallel_size > 1
        model: Any = pipeline(args, grid) if staged else (BERT if args.bert else GPT)(args, grid)
        randomise(model, grid)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-3),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 1,
                "zero_optimization": zero,
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
            outputs = engine.eval_batch(iter([(tokens, tokens)]), return_logits=True)[1] if staged else engine(tokens)
        place = grid.pipeline_parallel_rank, grid.tensor_parallel_rank, grid.data_parallel_rank
        results[name] = {"place": place, "states": states, "outputs": outputs}
    leave_world()
    return results
