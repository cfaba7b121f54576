"""Prove a checkpoint: is it whole and sane, and does it compute what another one computes?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from megacore.checkpoint.load import Readable, load_model
from megacore.checkpoint.manifest import Manifest
from megacore.checkpoint.reader import CheckpointReader
from megacore.errors import CheckpointError, ConfigError
from megacore.growth.source import GrowthSource, origin
from megacore.model_config import ModelConfig, token_head
from megacore.models.batch import ModelBatch
from megacore.models.layers import output_names
from megacore.models.loss import Loss
from megacore.parallel.grid import ParallelGrid
from megacore.parallel.vocabulary import whole_logits
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
        relative_errors: max|Δlogit| / max|logit| of each head (``mlm`` or ``lm``, and ``nsp`` where there is one), over
            the tokens that both models have.
        loss_before: mean over the labels, plus the mean over the sentence pairs where there are any.
        loss_after: the same of the other model.
        loss_after_old_tokens: the same again, if no other tokens than the first model's could be predicted.
    """

    dtype: str
    samples: int
    relative_errors: dict[str, float]
    loss_before: float
    loss_after: float
    loss_after_old_tokens: float

    @property
    def worst(self) -> float:
        """The largest relative error of a head."""
        return max(self.relative_errors.values())

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        plain = asdict(self)
        errors: dict[str, float] = plain.pop("relative_errors")
        return plain | {f"{head}_relative_error": error for head, error in errors.items()}

    def event(self, before: GrowthSource, limit: float) -> dict[str, Any]:
        """Return what a lineage says of the comparison."""
        figures = self.as_dict() | {"tolerance": limit, "passed": self.worst <= limit}
        return {"event": "verify", "against": origin(before), **figures}


def compare(
    before: Readable, after: Readable, batches: Iterable[ModelBatch], dtype: str, grid: ParallelGrid | None = None
) -> Comparison:
    """Compare the functions of two checkpoints on batches of text that the first one takes.

    Args:
        before: the first one.
        after: the second one, which may know more tokens and positions.
        batches: the text.
        dtype: of the computation.
        grid: tensor-parallel ranks that share both models; every one of them calls this. ``None`` for one process.

    Raises:
        ConfigError: the second one does not take all input that the first one does.
        CheckpointError: one of them computes what is not finite.
    """
    _check_same_input(before.manifest, after.manifest)
    grid = grid or ParallelGrid()
    models = [load_model(which, getattr(torch, dtype), grid) for which in (before, after)]
    config = models[0].config
    names = [name for name in output_names(config) if name.endswith("logits")]
    heads = [{"pair_logits": "nsp"}.get(name, token_head(config.objective)) for name in names]
    tokens = names.index("logits")
    losses = [Loss(model.config, ParallelGrid()) for model in models]
    difference, largest = np.zeros(len(names)), np.zeros(len(names))
    sums = np.zeros((3, 2))  # of the first model, the second, and the second on the first one's tokens
    samples = labels = 0
    with torch.inference_mode():
        for batch in batches:
            first, second = ([*model(batch)] for model in models)
            for model, outputs in zip(models, (first, second), strict=True):
                outputs[tokens] = whole_logits(outputs[tokens], model.config.vocab_size, grid)
            same = list(second)
            same[tokens] = second[tokens][..., : config.vocab_size]
            cases = (losses[0], first), (losses[1], second), (losses[1], same)
            for row, (loss, outputs) in enumerate(cases):
                found = loss.sums(tuple(outputs), loss.label_values(batch))
                sums[row] += float(found.token_loss), float(found.pair_loss)
            for column, (a, b) in enumerate(zip(first[: len(names)], same[: len(names)], strict=True)):
                # np.maximum, because Python's max would let "not a number" pass.
                difference[column] = np.maximum(difference[column], float((a - b).abs().max()))
                largest[column] = np.maximum(largest[column], float(a.abs().max()))
            samples += batch.num_samples
            labels += len(batch.labels)
    if not (np.isfinite(difference).all() and np.isfinite(sums).all()):
        raise CheckpointError(f"{after.path} or {before.path} computes values that are not finite numbers")
    relative = difference / np.maximum(largest, np.finfo(np.float64).tiny)  # 0 where both give zeros alone
    means = sums[:, 0] / labels + sums[:, 1] / samples
    return Comparison(dtype, samples, dict(zip(heads, relative.tolist(), strict=True)), *means.tolist())


def _check_same_input(before: Manifest, after: Manifest) -> None:
    for key in ("architecture", "objective", "vocab_size", "max_position_embeddings", "type_vocab_size"):
        if key == "max_position_embeddings" and before.model.position_embedding != "learned":
            continue  # there is no table
        first, second = getattr(before.model, key), getattr(after.model, key)
        if first != second and not (isinstance(first, int) and 0 < first < second):  # tables that have grown
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
