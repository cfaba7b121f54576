"""Prove a checkpoint: is it whole and sane, and does it compute what another one computes?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from megacore.checkpoint.load import load_model
from megacore.checkpoint.manifest import Manifest
from megacore.checkpoint.reader import CheckpointReader
from megacore.config import ModelConfig
from megacore.errors import CheckpointError, ConfigError
from megacore.models.bert import BertInput
from megacore.random import random_bits, stream_key


def check_integrity(reader: CheckpointReader, on_progress: Callable[[int], None] = lambda size: None) -> int:
    """Check completeness, every checksum, and that all values are finite; return the number of bytes read.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    reader.check_coverage()
    total = 0
    for file, key, block in reader.scan():
        if not np.isfinite(block).all():
            raise CheckpointError(f"{reader.path / file}: {key} holds values that are not finite numbers")
        total += block.nbytes
        on_progress(block.nbytes)
    return total


@dataclass(frozen=True)
class LabelledBatch:
    """Model input with its labels: masked_labels [masked], next_sentence_labels [batch]."""

    inputs: BertInput
    masked_labels: torch.Tensor
    next_sentence_labels: torch.Tensor


@dataclass(frozen=True)
class Comparison:
    """How two models differ on the same input: errors are max|Δlogit| / max|logit|; losses are MLM + NSP."""

    dtype: str
    samples: int
    mlm_relative_error: float
    nsp_relative_error: float
    loss_before: float
    loss_after: float

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return asdict(self)


def compare(
    before: CheckpointReader, after: CheckpointReader, batches: Iterable[LabelledBatch], dtype: torch.dtype
) -> Comparison:
    """Compare the functions of two checkpoints on batches of text.

    Raises:
        ConfigError: the two take different input.
        CheckpointError: one of them computes what is not finite.
    """
    _check_same_input(before.manifest, after.manifest)
    models = [load_model(before, dtype), load_model(after, dtype)]
    difference, largest = np.zeros(2), np.zeros(2)
    losses = np.zeros((2, 2))
    samples = masked = 0
    with torch.inference_mode():
        for batch in batches:
            outputs = []
            for position, model in enumerate(models):
                logits = model(batch.inputs)
                sums = model.sums(logits, batch.masked_labels, batch.next_sentence_labels)
                losses[position] += float(sums.mlm_loss), float(sums.nsp_loss)
                outputs.append(logits)
            small, large = outputs
            for column, (a, b) in enumerate(((small.mlm, large.mlm), (small.nsp, large.nsp))):
                # np.maximum, because Python's max would let "not a number" pass.
                difference[column] = np.maximum(difference[column], float((a - b).abs().max()))
                largest[column] = np.maximum(largest[column], float(a.abs().max()))
            samples += len(batch.next_sentence_labels)
            masked += len(batch.masked_labels)
    if not (np.isfinite(difference).all() and np.isfinite(losses).all()):
        raise CheckpointError(f"{after.path} or {before.path} computes values that are not finite numbers")
    relative = difference / largest
    means = losses[:, 0] / masked + losses[:, 1] / samples
    return Comparison(
        dtype=str(dtype).removeprefix("torch."),
        samples=samples,
        mlm_relative_error=float(relative[0]),
        nsp_relative_error=float(relative[1]),
        loss_before=float(means[0]),
        loss_after=float(means[1]),
    )


def _check_same_input(before: Manifest, after: Manifest) -> None:
    for key in ("family", "vocab_size", "max_position_embeddings", "type_vocab_size"):
        first, second = getattr(before.model, key), getattr(after.model, key)
        if first != second:
            raise ConfigError(f"the checkpoints cannot be compared: {key} is {first} in one and {second} in the other")


def random_batch(config: ModelConfig, samples: int = 8, seed: int = 0) -> LabelledBatch:
    """Draw samples of random tokens and different lengths, with every seventh position masked."""
    seq = min(config.max_position_embeddings, 128)

    def draw(name: str, count: int, below: int) -> torch.Tensor:
        bits = random_bits(stream_key(seed, "batch", name), np.arange(count)) >> np.uint64(1)
        return torch.from_numpy(bits.astype(np.int64) % below)

    lengths = seq - draw("lengths", samples, max(1, seq // 2))
    position = torch.arange(seq)
    masked = ((position % 7 == 3) & (position < lengths.unsqueeze(1))).flatten().nonzero().flatten()
    inputs = BertInput(
        input_ids=draw("ids", samples * seq, config.vocab_size).view(samples, seq),
        token_type_ids=(position >= lengths.unsqueeze(1) // 2).long() % config.type_vocab_size,
        lengths=lengths,
        masked_positions=masked,
    )
    return LabelledBatch(inputs, draw("labels", len(masked), config.vocab_size), draw("next", samples, 2))
