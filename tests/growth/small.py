"""Small trained models of every family, their checkpoints, and what is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megacore.checkpoint.load import load_model
from megacore.checkpoint.manifest import MOMENTS, Layout, Manifest, Progress, parameter_records
from megacore.checkpoint.pieces import Piece
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import PieceToWrite, write_checkpoint
from megacore.communicator import Alone
from megacore.config import ParallelConfig
from megacore.growth.execute import GrowthOutput, grow_checkpoint
from megacore.growth.plan import Symmetry, make_plan
from megacore.growth.verify import random_batch
from megacore.model_config import ModelConfig
from megacore.models.batch import ModelBatch
from megacore.models.transformer import Transformer
from megacore.params import declared
from megacore.specs import Shard
from tests.models import model_config, plain_loss, whole_model

DECODER: dict[str, Any] = {
    "architecture": "decoder",
    "objective": "causal_lm",
    "residual": "pre_norm",
    "embedding_norm": False,
    "type_vocab_size": 0,
    "lm_transform": False,
    "lm_bias": False,
    "norm_eps": 1e-5,
}
LLAMA: dict[str, Any] = {
    **DECODER,
    "position_embedding": "rotary",
    "norm": "rms_norm",
    "activation": "silu",
    "gated_mlp": True,
    "attention_bias": False,
    "linear_bias": False,
    "num_key_value_heads": 2,
}
T5: dict[str, Any] = {
    **LLAMA,
    "architecture": "encoder_decoder",
    "objective": "span_corruption",
    "position_embedding": "relative",
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "num_key_value_heads": 4,
    "attention_scale": 1.0,
    "activation": "gelu_tanh",
}
ROFORMER_V2: dict[str, Any] = {
    "objective": "mlm",
    "position_embedding": "rotary_interleaved",
    "norm": "rms_norm",
    "norm_eps": 1e-7,
    "norm_affine": False,
    "activation": "relu",
    "attention_bias": False,
    "linear_bias": False,
    "lm_transform": False,
    "lm_bias": False,
    "num_hidden_layers": 3,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {},
    "gpt2": {**DECODER, "activation": "gelu_tanh"},
    "llama": {**LLAMA, "tie_word_embeddings": False},
    "llama tied": LLAMA,
    "qwen3": {**LLAMA, "qk_norm": True},
    "t5": {**T5, "tie_word_embeddings": False},
    "t5 tied": T5,
    "roformer v2": ROFORMER_V2,
    "deepnorm": {"residual": "deep_norm", "norm_eps": 1e-5},
    "deepnorm encoder-decoder": {
        **DECODER,
        "architecture": "encoder_decoder",
        "objective": "span_corruption",
        "residual": "deep_norm",
    },
    "unilm": {**DECODER, "objective": "prefix_lm", "residual": "post_norm", "embedding_norm": True},
    "rezero": {**DECODER, "residual": "rezero"},
    "sub-norm": {**DECODER, "residual": "sub_norm"},
}
EVEN = Symmetry(noise_scale=0.0, share_scale=0.0)
TRAINED_STEPS = 8


def family(name: str) -> ModelConfig:
    return model_config(**FAMILIES[name])


def batch_of(config: ModelConfig, seed: int) -> ModelBatch:
    """Draw samples; no token is above the vocabulary of the small models."""
    return random_batch(config, samples=8, seed=seed)


def loss_of(model: Transformer, batch: ModelBatch) -> torch.Tensor:
    return plain_loss(model.eval()(batch), batch)


def adam(model: Transformer, multipliers: dict[str, tuple[float, float]] | None = None) -> torch.optim.AdamW:
    """AdamW with a group per parameter, by the rules of growth: lr × a, eps × b, decay lr × wd as it was."""
    groups = []
    for name, parameter in declared(model):
        rate, eps = multipliers[name] if multipliers else (1.0, 1.0)
        decay = 0.1 / rate if parameter.spec.is_matrix else 0.0
        groups.append({"params": [parameter], "lr": 3e-3 * rate, "eps": 1e-4 * eps, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


def step(model: Transformer, optimizer: torch.optim.AdamW, batch: ModelBatch) -> None:
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def save(model: Transformer, optimizer: torch.optim.AdamW, path: Path, parts: int) -> None:
    """Write a checkpoint as ``parts`` tensor-parallel ranks would, in float64."""
    files = []
    for rank in range(parts):
        pieces = []
        for name, parameter in declared(model):
            if parameter.spec.sharded_dim is None and rank:
                continue
            region = parameter.spec.local_region(Shard(rank, parts))
            box = tuple(slice(start, stop) for start, stop in region)
            state = optimizer.state[parameter]
            for key, values in (("weight", parameter.detach()), *((k, state[k]) for k in MOMENTS)):
                block = values[box].numpy()
                pieces.append(PieceToWrite(Piece(name, key, region, None, "float64"), lambda block=block: [block]))
        files.append((f"rank{rank}.safetensors", pieces))
    specs = {name: parameter.spec for name, parameter in declared(model)}
    manifest = Manifest(
        model=model.config,
        layout=Layout(tensor_parallel_size=parts),
        progress=Progress(step=TRAINED_STEPS, optimizer_step=TRAINED_STEPS, consumed_samples=96),
        parameters=parameter_records(specs, dict.fromkeys(specs, (1.0, 1.0))),
        files={},
    )
    write_checkpoint(path, Alone(), files, manifest)


def trained_model(config: ModelConfig) -> tuple[Transformer, torch.optim.AdamW]:
    """Train a small model for some steps in float64, with gains, biases and gates away from where they start."""
    model = whole_model(config, dtype=torch.float64)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    optimizer = adam(model)
    for number in range(TRAINED_STEPS):
        step(model, optimizer, batch_of(config, number))
    return model, optimizer


def grow(source: Path, target: Path, sizes: dict[str, Any], parts: int = 1, **options: Any) -> CheckpointReader:
    symmetry = options.pop("symmetry", Symmetry())
    reader = CheckpointReader(source)
    plan = make_plan(reader.manifest.model, sizes, symmetry)
    output = GrowthOutput(ParallelConfig(tensor_parallel_size=parts), **options)
    grow_checkpoint(reader, plan, target, output, Alone())
    return CheckpointReader(target)


def relative_errors(small: Transformer, large: Transformer, batch: ModelBatch) -> list[float]:
    """Return max|Δ| / max|value| of each head's logits on the small model's vocabulary."""
    with torch.inference_mode():
        outputs = small.eval()(batch), large.eval()(batch)
    pairs = list(zip(*outputs, strict=False))[: 2 if small.config.objective == "mlm_nsp" else 1]
    return [float((a - b[..., : a.shape[-1]]).abs().max() / a.abs().max()) for a, b in pairs]


def adam_of(reader: CheckpointReader) -> tuple[Transformer, torch.optim.AdamW]:
    """Make the model of a checkpoint and go on with its optimizer state."""
    model = load_model(reader, torch.float64)
    records = reader.manifest.parameters
    optimizer = adam(model, {name: (r.learning_rate_multiplier, r.adam_eps_multiplier) for name, r in records.items()})
    for name, parameter in declared(model):
        moments = {key: torch.from_numpy(reader.read(name, key)) for key in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(float(reader.manifest.progress.optimizer_step)), **moments}
    return model, optimizer
