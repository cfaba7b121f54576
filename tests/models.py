"""Small models, instances and an independent trainer for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_pipeline.loader import InstanceDataset, PretrainingBatches
from data_pipeline.shards import write_dataset
from megacore.communicator import Alone
from megacore.config import ParallelConfig, RunConfig
from megacore.model_config import ModelConfig
from megacore.models.batch import ModelBatch
from megacore.models.transformer import Transformer
from megacore.nn.kit import Kit
from megacore.parallel.grid import ParallelGrid
from megacore.params import Declare, initialise
from megacore.settings import validated
from megacore.training.batches import model_batch

MODEL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}


def model_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{**MODEL, **changes})


def whole_model(config: ModelConfig, seed: int = 1, dtype: torch.dtype = torch.float32) -> Transformer:
    """Build a model on this process alone; ``seed`` is of its weights and of its dropout."""
    model = Transformer(Kit(config, Declare(config, dtype=dtype), ParallelGrid(), seed))
    initialise(model, config, seed)
    return model


def write_instances(path: Path, count: int = 96, vocab_size: int = 101, sequence_length: int = 32) -> Path:
    """Write instances with a structure to be learnt: tokens count upwards, a random second segment does not."""
    rng = np.random.default_rng(0)
    ids, offsets, middles, labels, places, originals, masked_offsets = [], [0], [], [], [], [], [0]
    for _ in range(count):
        length = int(rng.integers(12, sequence_length + 1))
        middle = length // 2
        tokens = 5 + (rng.integers(0, vocab_size) + np.arange(length)) % (vocab_size - 5)
        label = int(rng.integers(0, 2))
        if label:
            tokens[middle:] = 5 + (tokens[middle:] + 31) % (vocab_size - 5)
        tokens[0], tokens[middle - 1], tokens[-1] = 2, 3, 3
        place = np.sort(rng.choice(np.flatnonzero(tokens > 4), 2, replace=False))
        originals += tokens[place].tolist()
        tokens[place] = 4
        ids += tokens.tolist()
        offsets.append(len(ids))
        middles.append(middle)
        labels.append(label)
        places += place.tolist()
        masked_offsets.append(len(places))
    columns = {
        "input_ids": np.array(ids, np.uint16),
        "offsets": np.array(offsets, np.int64),
        "segment_b_start": np.array(middles, np.uint16),
        "next_sentence_label": np.array(labels, np.uint8),
        "masked_positions": np.array(places, np.uint16),
        "masked_labels": np.array(originals, np.uint16),
        "masked_offsets": np.array(masked_offsets, np.int64),
    }
    about = {"vocab_size": vocab_size, "sequence_length": sequence_length}
    write_dataset(path, Alone(), "instances", about, [("all", columns, {"instances": count})])
    return path


def run_config(folder: Path, data: Path, **changes: Any) -> RunConfig:
    """Return a run of 10 steps; clipping is always active and Adam is not scale-free, so that any error shows."""
    training: dict[str, Any] = {
        "output_dir": str(folder),
        "deepspeed_config": str(Path(__file__).parents[1] / "ds_configs" / "zero1.json"),
        "train_steps": 10,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "learning_rate": 1e-2,
        "adam_eps": 1e-3,
        "gradient_clipping": 0.1,
        "log_interval": 1,
        "save_interval": 5,
        "eval_interval": 5,
        "eval_samples": 13,  # not a multiple of anything
    }
    model, parallel = dict(MODEL), {}
    for key, value in changes.items():
        section = (
            model if key in ModelConfig.model_fields else parallel if key in ParallelConfig.model_fields else training
        )
        section[key] = value
    data_section = {"train_data": str(data), "validation_data": str(data)}
    return validated(RunConfig, {"model": model, "parallel": parallel, "training": training, "data": data_section})


def reference_losses(config: RunConfig, steps: int) -> tuple[list[float], list[float]]:
    """Train with plain torch in this process: one batch a step, AdamW, clipping; return losses and norms.

    A mixture of experts is balanced over micro-batches: then the step's micro-batches are run one by one.
    """
    training = config.training
    model = whole_model(config.model, training.seed)
    decayed = [p for p in model.parameters() if p.spec.is_matrix]  # type: ignore[union-attr]
    others = [p for p in model.parameters() if not p.spec.is_matrix]  # type: ignore[union-attr]
    groups = [{"params": decayed, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=training.learning_rate, betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_eps
    )
    size = training.global_batch_size
    micro = training.micro_batch_size if config.model.num_experts else size
    data = InstanceDataset(config.data.train_data)
    batches = PretrainingBatches(data, training.seed, size, micro, objective=config.model.objective)
    losses, norms = [], []
    for step in range(steps):
        made = [model_batch(batch, torch.device("cpu")) for batch in batches.step_batches(step * size)]
        optimizer.zero_grad()
        labels = sum(len(batch.labels) for batch in made)
        loss = torch.zeros(())
        for batch in made:
            outputs = model.train()(batch)
            share = plain_loss(outputs, batch) * len(batch.labels) / labels
            balance = config.model.router_aux_loss_coefficient * outputs[-1] if config.model.num_experts else 0.0
            (share + balance / len(made)).backward()
            loss += share.detach()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clipping)))
        optimizer.step()
        losses.append(float(loss))
    return losses, norms


def plain_loss(outputs: tuple[torch.Tensor, ...], batch: ModelBatch) -> torch.Tensor:
    """Compute the mean losses with torch's own cross-entropy."""
    loss = nn.functional.cross_entropy(outputs[0], batch.labels)
    if batch.pair_labels is None:
        return loss
    return loss + nn.functional.cross_entropy(outputs[1], batch.pair_labels)
