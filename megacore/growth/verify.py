"""Prove a checkpoint: is it whole and sane, and does it compute what another one computes?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from megacore.checkpoint.load import load_model
from megacore.checkpoint.manifest import Manifest
from megacore.checkpoint.reader import CheckpointReader
from megacore.errors import CheckpointError, ConfigError
from megacore.model_config import ModelConfig, token_head
from megacore.models.batch import ModelBatch
from megacore.models.layers import output_names
from megacore.models.loss import Loss
from megacore.parallel.grid import ParallelGrid
from megacore.random import random_bits, stream_key


def check_integrity(reader: CheckpointReader, on_progress: Callable[[int], None] = lambda size: None) -> int:
    """Check completeness, every checksum, and that all values are finite; return the number of bytes read.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    reader.specs()
    reader.check_coverage()
    total = 0
    for file, key, block in reader.scan():
        if not np.isfinite(block).all():
            raise CheckpointError(f"{reader.path / file}: {key} holds values that are not finite numbers")
        total += block.nbytes
        on_progress(block.nbytes)
    return total


@dataclass(frozen=True)
class Comparison:
    """How two models differ on the same input.

    Args:
        dtype: of the computation.
        samples: sequences compared.
        relative_errors: max|Δlogit| / max|logit| of each head (``mlm`` or ``lm``, and ``nsp`` where there is one).
        loss_before: mean over the labels, plus the mean over the sentence pairs where there are any.
        loss_after: the same of the other model.
    """

    dtype: str
    samples: int
    relative_errors: dict[str, float]
    loss_before: float
    loss_after: float

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        plain = asdict(self)
        errors: dict[str, float] = plain.pop("relative_errors")
        return plain | {f"{head}_relative_error": error for head, error in errors.items()}


def compare(
    before: CheckpointReader, after: CheckpointReader, batches: Iterable[ModelBatch], dtype: torch.dtype
) -> Comparison:
    """Compare the functions of two checkpoints on batches of text.

    Raises:
        ConfigError: the two take different input.
        CheckpointError: one of them computes what is not finite.
    """
    _check_same_input(before.manifest, after.manifest)
    models = [load_model(before, dtype), load_model(after, dtype)]
    names = [name for name in output_names(models[0].config) if name.endswith("logits")]
    heads = [{"pair_logits": "nsp"}.get(name, token_head(models[0].config.objective)) for name in names]
    loss = Loss(models[0].config, ParallelGrid())
    difference, largest = np.zeros(len(names)), np.zeros(len(names))
    losses = np.zeros((2, 2))
    samples = labels = 0
    with torch.inference_mode():
        for batch in batches:
            outputs = []
            for position, model in enumerate(models):
                logits = model(batch)
                sums = loss.sums(logits, loss.label_values(batch))
                losses[position] += float(sums.token_loss), float(sums.pair_loss)
                outputs.append(logits)
            for column, (a, b) in enumerate(zip(*(output[: len(names)] for output in outputs), strict=True)):
                # np.maximum, because Python's max would let "not a number" pass.
                difference[column] = np.maximum(difference[column], float((a - b).abs().max()))
                largest[column] = np.maximum(largest[column], float(a.abs().max()))
            samples += batch.num_samples
            labels += len(batch.labels)
    if not (np.isfinite(difference).all() and np.isfinite(losses).all()):
        raise CheckpointError(f"{after.path} or {before.path} computes values that are not finite numbers")
    relative = difference / np.maximum(largest, np.finfo(np.float64).tiny)  # 0 where both give zeros alone
    means = losses[:, 0] / labels + losses[:, 1] / samples
    return Comparison(
        dtype=str(dtype).removeprefix("torch."),
        samples=samples,
        relative_errors=dict(zip(heads, relative.tolist(), strict=True)),
        loss_before=float(means[0]),
        loss_after=float(means[1]),
    )


def _check_same_input(before: Manifest, after: Manifest) -> None:
    for key in ("architecture", "objective", "vocab_size", "max_position_embeddings", "type_vocab_size"):
        first, second = getattr(before.model, key), getattr(after.model, key)
        if first != second:
            raise ConfigError(f"the checkpoints cannot be compared: {key} is {first} in one and {second} in the other")


def random_batch(config: ModelConfig, samples: int = 8, seed: int = 0) -> ModelBatch:
    """Draw samples of random tokens and different lengths, with every seventh position labelled."""
    longest = min(config.max_position_embeddings, 128)

    def draw(name: str, count: int, below: int) -> torch.Tensor:
        bits = random_bits(stream_key(seed, "batch", name), np.arange(count)) >> np.uint64(1)
        return torch.from_numpy(bits.astype(np.int64) % below)

    def stream(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = longest - draw(f"{name} lengths", samples, max(1, longest // 2))
        total = int(lengths.sum())
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        positions = torch.arange(total) - starts
        second = positions >= lengths.repeat_interleave(lengths) // 2
        segments = second.long() % max(1, config.type_vocab_size)
        tokens = torch.stack([draw(f"{name} ids", total, config.vocab_size), segments, positions])
        prefixes = lengths // 2 if config.objective == "prefix_lm" else torch.zeros_like(lengths)
        return tokens, torch.stack([lengths, prefixes, torch.arange(samples)])

    tokens, sequences = stream("source")
    target = stream("target") if config.architecture == "encoder_decoder" else (None, None)
    positions = (tokens if target[0] is None else target[0])[2]
    labelled = (positions % 7 == 3).nonzero().flatten()
    pairs = draw("next", samples, 2) if config.objective == "mlm_nsp" else None
    return ModelBatch(
        tokens, sequences, labelled, draw("labels", len(labelled), config.vocab_size), pairs, target[0], target[1]
    )
