"""A micro-batch on the model's device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacore.errors import ConfigError
from megacore.model_config import ModelConfig


@dataclass(frozen=True)
class ModelBatch:
    """What a model takes, and the labels; sequences are laid end to end without padding.

    Args:
        tokens: [3, total] int64: token ids, segments, positions in the sequence.
        sequences: [3, n] int64: lengths, prefix lengths, global sample numbers.
        label_positions: [labels] int64, places in the stream that the token head reads (the target's, if any).
        labels: [labels] int64, token ids.
        pair_labels: [n] int64, 0: the second segment follows the first; or none.
        target_tokens: [3, total] of the decoder of an encoder-decoder, or none.
        target_sequences: [3, n] of the decoder.
    """

    tokens: Tensor
    sequences: Tensor
    label_positions: Tensor
    labels: Tensor
    pair_labels: Tensor | None = None
    target_tokens: Tensor | None = None
    target_sequences: Tensor | None = None

    @property
    def pair_positions(self) -> Tensor:
        """[n] int64, the first token of each sequence that has a pair label."""
        assert self.pair_labels is not None
        lengths = self.sequences[0, : len(self.pair_labels)]
        return lengths.cumsum(0) - lengths

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, of the source and the target."""
        return sum(
            int(rows[0][rows[2] >= 0].sum()) for rows in (self.sequences, self.target_sequences) if rows is not None
        )

    @property
    def num_samples(self) -> int:
        """Sequences, without the fillers of `filled`."""
        return int((self.sequences[2] >= 0).sum())

    def inputs(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """Return the values that a model's layers start from (`megacore.models.layers.input_names`)."""
        values = tuple(getattr(self, name) for name in names)
        if any(value is None for value in values):
            missing = [name for name, value in zip(names, values, strict=True) if value is None]
            raise ConfigError(f"the batch has no {', '.join(missing)}, which the model's objective needs")
        return values

    def filled(self, parts: int) -> ModelBatch:
        """Return the batch with a filler sequence at the end, so that ``parts`` ranks can share the tokens evenly."""
        tokens, sequences, target_tokens, target_sequences = (
            self.tokens,
            self.sequences,
            self.target_tokens,
            self.target_sequences,
        )
        missing = -tokens.shape[1] % parts
        if target_tokens is None or target_sequences is None:
            tokens, sequences = _filled(tokens, sequences, missing)
        else:  # sequence k of the target reads sequence k of the source: both get a filler, or none
            target_missing = -target_tokens.shape[1] % parts
            if missing or target_missing:
                tokens, sequences = _filled(tokens, sequences, missing or parts)
                target_tokens, target_sequences = _filled(target_tokens, target_sequences, target_missing or parts)
        return ModelBatch(
            tokens, sequences, self.label_positions, self.labels, self.pair_labels, target_tokens, target_sequences
        )

    def to(self, device: torch.device) -> ModelBatch:
        """Return the batch on a device."""
        moved: dict[str, Any] = {
            name: None if value is None else value.to(device, non_blocking=True) for name, value in vars(self).items()
        }
        return ModelBatch(**moved)

    def check(self, config: ModelConfig) -> None:
        """Refuse what the model would look up out of its tables.

        Raises:
            ConfigError: naming the key of the configuration.
        """
        limits = [("vocab_size", 0, config.vocab_size), ("max_position_embeddings", 2, config.max_position_embeddings)]
        for rows in (self.tokens, self.target_tokens):
            for key, row, limit in limits:
                if rows is not None and rows.numel() and int(rows[row].max()) >= limit:
                    raise ConfigError(f"{key}={limit} is too small: the batch has {int(rows[row].max())}")


def _filled(tokens: Tensor, sequences: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if not count:
        return tokens, sequences
    filler = torch.zeros(3, count, dtype=tokens.dtype, device=tokens.device)
    filler[2] = torch.arange(count, device=tokens.device)
    sequence = sequences.new_tensor([[count], [0], [-1]])
    return torch.cat([tokens, filler], 1), torch.cat([sequences, sequence], 1)
