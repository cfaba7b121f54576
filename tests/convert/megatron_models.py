"""The real megatron-core's GPT and BERT on CPU ranks: what they save as Megatron-LM does, and what they compute."""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.overrides import TorchFunctionMode

VOCABULARY, PADDED, POSITIONS = 150, 256, 24
LAYOUT = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2 fused gelu": {"bias_gelu_fusion": True},
    "llama": {
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "swiglu": True,
        "position_embedding_type": "rope",
        "rotary_base": 5000,
        "group_query_attention": True,
        "num_query_groups": 2,
        "untie_embeddings_and_output_weights": True,
    },
    "qwen3": {
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "swiglu": True,
        "position_embedding_type": "rope",
        "rotary_interleaved": True,
        "group_query_attention": True,
        "num_query_groups": 4,
        "kv_channels": 6,
        "qk_layernorm": True,
        "add_qkv_bias": True,
    },
    "bert": {"bert": True, "bert_binary_head": True},
    "bert mlm untied": {"bert": True, "untie_embeddings_and_output_weights": True},
}


def arguments(**changes: Any) -> argparse.Namespace:
    """Return what Megatron-LM's command line makes of such a model."""
    values = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 8,
        "group_query_attention": False,
        "num_query_groups": 1,
        "kv_channels": 4,
        "max_position_embeddings": POSITIONS,
        "seq_length": POSITIONS,
        "vocab_size": VOCABULARY,
        "padded_vocab_size": PADDED,
        "position_embedding_type": "learned_absolute",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "normalization": "LayerNorm",
        "norm_epsilon": 1e-5,
        "apply_layernorm_1p": False,
        "swiglu": False,
        "squared_relu": False,
        "openai_gelu": False,
        "bias_gelu_fusion": False,
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "untie_embeddings_and_output_weights": False,
        "qk_layernorm": False,
        "bert": False,
        "bert_binary_head": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": 0.02,
        "num_experts": None,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "consumed_train_samples": 96,
        "params_dtype": torch.float32,
    }
    return argparse.Namespace(**{**values, **changes})


class OnCPU(TorchFunctionMode):
    """Megatron names CUDA as its device in a few places that no option changes: here it is the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


def start(tensor_parallel_size: int, pipeline_parallel_size: int) -> None:
    """Join the world and cut it into these ranks."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    OnCPU().__enter__()
    initialize_rng_tracker(inference_rng_tracker=True)  # the other one keeps states of CUDA's generator
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_parallel_size, pipeline_parallel_size)


def build(args: argparse.Namespace) -> Any:
    """Make this rank's part of the model, as ``pretrain_gpt.py`` and ``pretrain_bert.py`` do."""
    from megatron.core import parallel_state
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        kv_channels=args.kv_channels,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        add_bias_linear=args.add_bias_linear,
        add_qkv_bias=args.add_qkv_bias,
        gated_linear_unit=args.swiglu,
        activation_func=functional.silu if args.swiglu else functional.gelu,
        bias_activation_fusion=args.bias_gelu_fusion,
        rotary_interleaved=args.rotary_interleaved,
        qk_layernorm=args.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        pipeline_dtype=args.params_dtype,
        params_dtype=args.params_dtype,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    common: dict[str, Any] = {
        "config": config,
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
        "parallel_output": False,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
    }
    if args.bert:
        return BertModel(
            num_tokentypes=2 if args.bert_binary_head else 0,
            transformer_layer_spec=bert_layer_local_spec,
            add_binary_head=args.bert_binary_head,
            **common,
        ).eval()
    spec = get_gpt_layer_local_spec(qk_layernorm=args.qk_layernorm, normalization=args.normalization)
    return GPTModel(transformer_layer_spec=spec, rotary_base=args.rotary_base, **common).eval()


def randomise(model: Any) -> None:
    """Give every parameter random values: the same to all ranks that share it, others to the padding, too."""
    from megatron.core import parallel_state

    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if not getattr(parameter, "tensor_model_parallel", False):
                first = parallel_state.get_tensor_model_parallel_src_rank()
                dist.broadcast(parameter, first, parallel_state.get_tensor_model_parallel_group())
        if model.share_embeddings_and_output_weights and parallel_state.is_rank_in_embedding_group():
            group = parallel_state.get_embedding_group()
            dist.broadcast(model.shared_embedding_or_output_weight(), dist.get_process_group_ranks(group)[0], group)


def compute(model: Any, args: argparse.Namespace, tokens: torch.Tensor, segments: torch.Tensor) -> list[torch.Tensor]:
    """Return the last stage's logits (of the tokens, of the pairs): [batch, seq, padded vocabulary], [batch, 2]."""
    from megatron.core import parallel_state

    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    if not first:
        hidden = torch.empty(tokens.shape[1], tokens.shape[0], args.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    with torch.no_grad():
        if args.bert:
            outputs = model(tokens, torch.ones_like(tokens), segments if args.bert_binary_head else None)
        else:
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1]).triu(1).bool()
            outputs = model(tokens, positions, mask)
    if not last:
        dist.send(outputs.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return []
    return [value for value in (outputs if args.bert else (outputs,)) if value is not None]


def rank_file(folder: Path) -> Path:
    """Return where Megatron-LM puts this rank's file."""
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    return folder / name / "model_optim_rng.pt"


def save(model: Any, args: argparse.Namespace, path: Path, **more: Any) -> None:
    """Save as Megatron-LM's ``--ckpt-format torch`` does, at iteration 12."""
    file = rank_file(path / "iter_0000012")
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 12, "model": model.state_dict_for_save_checkpoint()}
    torch.save({**state, **more}, file)
    (path / "latest_checkpointed_iteration.txt").write_text("12")


Computed = dict[str, list[torch.Tensor]]
Held = dict[str, dict[str, dict[str, torch.Tensor]]]


def save_all(folder: Path, tokens: torch.Tensor, segments: torch.Tensor) -> tuple[Computed, Held, dict[str, str]]:
    """Save models with random weights at TP 2 × PP 2.

    Returns what they compute; what `save_trained` returns; norms' names -> those that Transformer Engine's layers have.
    """
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec

    start(2, 2)
    computed = {}
    for name, changes in CASES.items():
        args = arguments(**changes, **LAYOUT)
        model = build(args)
        randomise(model)
        save(model, args, folder / name)
        computed[name] = compute(model, args, tokens, segments)
    names = bert_layer_local_spec.submodules.sharded_state_dict_keys_map
    return computed, save_trained(folder / "trained"), names


def load_all(
    folder: Path, names: list[str], tensor: int, pipeline: int, tokens: torch.Tensor, segments: torch.Tensor
) -> Computed:
    """Load files of this layout into fresh models; return what they compute."""
    start(tensor, pipeline)
    computed = {}
    for name in names:
        latest = (folder / name / "latest_checkpointed_iteration.txt").read_text()
        assert latest == "12"
        content = torch.load(rank_file(folder / name / "iter_0000012"), weights_only=False)
        assert content["checkpoint_version"] == 3.0 and content["iteration"] == 12
        args = content["args"]
        args.bert = CASES[name].get("bert", False)
        model = build(args)
        model.load_state_dict(content["model"], strict=True)
        computed[name] = compute(model, args, tokens, segments)
    return computed


def save_trained(folder: Path) -> Held:
    """Take two steps of Adam in fp32 and in bf16, and save model and optimizer; return this rank's state by name."""
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    moments = {}
    for kind in ("fp32", "bf16"):
        half = kind == "bf16"
        args = arguments(params_dtype=torch.bfloat16 if half else torch.float32, **LAYOUT)
        model = build(args)
        randomise(model)
        config = OptimizerConfig(
            optimizer="adam", lr=1e-2, bf16=half, params_dtype=args.params_dtype, clip_grad=0.0, weight_decay=0.1
        )
        model.ddp_config = DistributedDataParallelConfig()
        optimizer = get_megatron_optimizer(config, [model])
        for _ in range(2):
            for name, parameter in model.named_parameters():
                own = dist.get_rank() % 2 if getattr(parameter, "tensor_model_parallel", False) else 0
                tied = "embedding.word_embeddings.weight" if name == "output_layer.weight" else name
                generator = torch.Generator().manual_seed(2 * zlib.crc32(tied.encode()) + own)
                parameter.main_grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        save(model, args, folder / kind, optimizer=optimizer.state_dict())
        (inner,) = optimizer.chained_optimizers
        names = {id(getattr(value, "main_param", value)): name for name, value in model.named_parameters()}
        moments[kind] = {
            names[id(main)]: {"weight": main.detach(), "exp_avg": s["exp_avg"], "exp_avg_sq": s["exp_avg_sq"]}
            for main, s in inner.optimizer.state.items()
        }
    return moments
