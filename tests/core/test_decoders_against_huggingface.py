"""Decoders compute what Hugging Face's do: LLaMA (grouped queries, tied or not), Qwen2 and 3, Mixtral, GPT-2.

A prefix LM computes what GPT-2 does with a mask that lets every token see the prefix.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megacore.model_config import ModelConfig
from megacore.models.batch import ModelBatch
from megacore.models.transformer import Transformer
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, declared
from tests.models import model_config

LENGTHS, PREFIXES = (24, 9, 17), (7, 0, 17)
DECODER: dict[str, Any] = {
    "architecture": "decoder",
    "objective": "causal_lm",
    "num_attention_heads": 6,
    "residual": "pre_norm",
    "type_vocab_size": 0,
    "embedding_norm": False,
    "lm_transform": False,
    "lm_bias": False,
    "norm_eps": 1e-5,
}
LLAMA: dict[str, Any] = {
    **DECODER,
    "num_key_value_heads": 2,
    "norm": "rms_norm",
    "position_embedding": "rotary",
    "activation": "silu",
    "gated_mlp": True,
    "attention_bias": False,
    "linear_bias": False,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "tie_word_embeddings": False},
    "llama tied": LLAMA,
    "qwen3": {**LLAMA, "qk_norm": True, "rope_theta": 1e6, "head_dim": 8},
    "qwen2": {**LLAMA, "attention_bias": True},
    "mixtral": {**LLAMA, "num_experts": 4},
    "mixtral of three": {**LLAMA, "num_experts": 5, "num_experts_per_token": 3},
    "gpt2": {**DECODER, "activation": "gelu_tanh"},
    "gpt2 as prefix lm": {**DECODER, "activation": "gelu_tanh", "objective": "prefix_lm"},
}


def hugging_face(name: str, config: ModelConfig, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    if name.startswith("gpt2"):
        sizes = {
            "n_embd": config.hidden_size,
            "n_layer": config.num_hidden_layers,
            "n_head": config.num_attention_heads,
        }
        limits = {"n_positions": config.max_position_embeddings, "n_inner": config.intermediate_size}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=config.vocab_size, **sizes, **limits))
    else:
        same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        same += ("head_dim", "intermediate_size", "max_position_embeddings", "tie_word_embeddings", "rope_theta")
        values = {key: getattr(config, key) for key in same} | {"rms_norm_eps": config.norm_eps}
        if config.num_experts:
            values |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_token}
            values["experts_implementation"] = "eager"
        kinds: dict[str, tuple[Any, Any]] = {
            "qwen2": (Qwen2ForCausalLM, Qwen2Config),
            "qwen3": (Qwen3ForCausalLM, Qwen3Config),
            "mixtral": (MixtralForCausalLM, MixtralConfig),
            "llama": (LlamaForCausalLM, LlamaConfig),
        }
        kind, configured = kinds[name.split()[0]]
        model = kind(configured(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2).add_(0.2 * torch.randn_like(parameter)) if parameter.dim() == 1 else parameter.mul_(2)
    return model.to(dtype).eval()


def llama_weights(source: Any, config: ModelConfig, of: Any) -> dict[str, torch.Tensor]:
    """Name Hugging Face's tensors (weights or gradients, as ``of`` picks them) as megacore's, written down by hand."""
    theirs = {name: of(parameter) for name, parameter in source.named_parameters()}
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    size, hidden = config.head_dim, config.hidden_size
    result = {"embeddings.word": theirs["model.embed_tokens.weight"], "final_norm.weight": theirs["model.norm.weight"]}
    if not config.tie_word_embeddings:
        result["lm_head.weight"] = theirs["lm_head.weight"]
    for number in range(config.num_hidden_layers):
        a, b = f"model.layers.{number}.", f"layers.{number}."
        pair = [theirs[f"{a}self_attn.{k}_proj.weight"].view(kv, size, hidden) for k in "kv"]
        result |= {
            f"{b}attention.query_weight": theirs[f"{a}self_attn.q_proj.weight"].view(heads, size, hidden),
            f"{b}attention.key_value_weight": torch.stack(pair),
            f"{b}attention.output_weight": theirs[f"{a}self_attn.o_proj.weight"].view(hidden, heads, size),
            f"{b}attention_residual.norm.weight": theirs[f"{a}input_layernorm.weight"],
            f"{b}mlp_residual.norm.weight": theirs[f"{a}post_attention_layernorm.weight"],
        }
        if config.num_experts:
            experts = f"{a}mlp.experts."
            result |= {
                f"{b}mlp.router_weight": theirs[f"{a}mlp.gate.weight"],
                f"{b}mlp.experts.up_weight": theirs[f"{experts}gate_up_proj"].unflatten(1, (2, -1)),
                f"{b}mlp.experts.down_weight": theirs[f"{experts}down_proj"],
            }
        else:
            inner = [theirs[f"{a}mlp.{k}_proj.weight"] for k in ("gate", "up")]
            result[f"{b}mlp.up_weight"] = torch.stack(inner)
            result[f"{b}mlp.down_weight"] = theirs[f"{a}mlp.down_proj.weight"]
        if config.attention_bias:
            biases = [theirs[f"{a}self_attn.{k}_proj.bias"] for k in "kv"]
            result[f"{b}attention.query_bias"] = theirs[f"{a}self_attn.q_proj.bias"].view(heads, size)
            result[f"{b}attention.key_value_bias"] = torch.stack(biases).view(2, kv, size)
        if config.qk_norm:
            result |= {
                f"{b}attention.{long}_norm.weight": theirs[f"{a}self_attn.{k}_norm.weight"]
                for k, long in (("q", "query"), ("k", "key"))
            }
    return result


def gpt2_weights(source: Any, config: ModelConfig, of: Any) -> dict[str, torch.Tensor]:
    theirs = {name: of(parameter) for name, parameter in source.named_parameters()}
    heads, size, hidden = config.num_attention_heads, config.head_dim, config.hidden_size
    result = {
        "embeddings.word": theirs["transformer.wte.weight"],
        "embeddings.position": theirs["transformer.wpe.weight"],
        "final_norm.weight": theirs["transformer.ln_f.weight"],
        "final_norm.bias": theirs["transformer.ln_f.bias"],
    }
    for number in range(config.num_hidden_layers):
        a, b = f"transformer.h.{number}.", f"layers.{number}."
        weight = theirs[f"{a}attn.c_attn.weight"].T.reshape(3, heads, size, hidden)
        bias = theirs[f"{a}attn.c_attn.bias"].view(3, heads, size)
        result |= {
            f"{b}attention.query_weight": weight[0],
            f"{b}attention.key_value_weight": weight[1:],
            f"{b}attention.query_bias": bias[0],
            f"{b}attention.key_value_bias": bias[1:],
            f"{b}attention.output_weight": theirs[f"{a}attn.c_proj.weight"].T.reshape(hidden, heads, size),
            f"{b}attention.output_bias": theirs[f"{a}attn.c_proj.bias"],
            f"{b}mlp.up_weight": theirs[f"{a}mlp.c_fc.weight"].T,
            f"{b}mlp.up_bias": theirs[f"{a}mlp.c_fc.bias"],
            f"{b}mlp.down_weight": theirs[f"{a}mlp.c_proj.weight"].T,
            f"{b}mlp.down_bias": theirs[f"{a}mlp.c_proj.bias"],
        }
        for ours, norm in (("attention_residual", "ln_1"), ("mlp_residual", "ln_2")):
            result |= {f"{b}{ours}.norm.{k}": theirs[f"{a}{norm}.{k}"] for k in ("weight", "bias")}
    return result


def seen(length: int, prefix: int) -> torch.Tensor:
    """Return which keys (columns) a query (row) may see: those not after it, and the prefix."""
    query, key = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    return (key <= query) | (key < prefix)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-5)])
def test_logits_and_gradients_equal_hugging_face(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """In float64 too Hugging Face computes norms and angles in float32: that bounds the comparison."""
    config = model_config(**CASES[name])
    source = hugging_face(name, config, dtype)
    carry = gpt2_weights if name.startswith("gpt2") else llama_weights
    model = Transformer(Kit(config, Declare(config, dtype=dtype), ParallelGrid())).eval()
    weights = carry(source, config, lambda parameter: parameter.detach())
    assert weights.keys() == dict(declared(model)).keys()
    with torch.no_grad():
        for key, parameter in declared(model):
            parameter.copy_(weights[key])
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    ids = torch.randint(0, config.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    everywhere = torch.arange(sum(LENGTHS))
    prefixes = PREFIXES if config.objective == "prefix_lm" else (0,) * len(LENGTHS)
    sequences = torch.tensor([LENGTHS, prefixes, range(len(LENGTHS))])
    tokens = torch.stack([ids, torch.zeros_like(ids), positions])
    logits, *_ = model(ModelBatch(tokens, sequences, everywhere, ids))
    expected = torch.cat(
        [
            source(input_ids=row[None], attention_mask=seen(len(row), prefix)[None, None]).logits[0]
            for row, prefix in zip(ids.split(LENGTHS), prefixes, strict=True)
        ]
    )
    scale = float(expected.detach().abs().max())
    assert scale > 0.3  # not all alike
    assert float((logits - expected).detach().abs().max()) <= tolerance
    for outputs in (logits, expected):
        torch.nn.functional.cross_entropy(outputs, ids.roll(1)).backward()
    gradients = carry(source, config, lambda parameter: parameter.grad)
    for key, parameter in declared(model):
        assert parameter.grad is not None
        largest = float(gradients[key].abs().max())
        assert float((parameter.grad - gradients[key]).abs().max()) <= 10 * tolerance * largest + 1e-9, key
