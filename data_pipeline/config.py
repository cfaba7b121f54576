"""The configuration of the way from text to pretraining instances; one file serves all its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from data_pipeline.span_corruption import piece_length, sentinels_needed
from megacore.settings import Settings

_MIN_PIECES = 262
"""The special tokens, the 256 bytes and one piece."""


class DataBuildConfig(Settings):
    """From text to instances: ``tokenizer``, ``build`` and ``instances`` read what they need of this."""

    inputs: tuple[Path, ...] = Field(min_length=1)
    """Text files: .txt (blank lines between documents) or .jsonl (an object with a ``text`` field per line)."""
    output_dir: Path
    """Holds ``tokenizer.model``, ``sentences`` and ``instances/{train,validation}``."""
    seed: NonNegativeInt = 1234
    vocab_size: int = Field(8192, ge=_MIN_PIECES)
    """All ids: special tokens, bytes, pieces of text and sentinels."""
    num_sentinels: NonNegativeInt = 0
    """The last ids of the vocabulary, which stand for the spans that span corruption takes out."""
    tokenizer_sentences: PositiveInt = 200_000
    """The tokenizer is trained on at most so many sentences, sampled from all documents."""
    block_size_mb: PositiveFloat = 4.0
    """Unit of work: ranks take blocks of about this size of the input files."""
    validation_fraction: float = Field(0.02, ge=0, lt=1)
    """Share of the documents that is held out."""
    objective: Literal["mlm_nsp", "lm", "span_corruption"] = "mlm_nsp"
    """What the instances are for: MLM with or without NSP; causal and prefix LM; span corruption (T5)."""
    sequence_length: int = Field(128, ge=8, le=65535)
    duplicates: PositiveInt = 1
    """Copies of the corpus, each with pairs and masks, prefixes or spans of its own."""
    short_sequence_probability: float = Field(0.1, ge=0, le=1)
    masking: Literal["token", "whole_word"] = "token"
    masking_rate: float = Field(0.15, gt=0, lt=1)
    noise_density: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens that span corruption takes out."""
    mean_noise_span_length: float = Field(3.0, ge=1)

    @field_validator("inputs", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _enough_ids(self) -> DataBuildConfig:
        if self.vocab_size - self.num_sentinels < _MIN_PIECES:
            raise ValueError(
                f"vocab_size={self.vocab_size} is too few with num_sentinels={self.num_sentinels}; "
                f"at least {_MIN_PIECES + self.num_sentinels}"
            )
        if self.objective == "span_corruption":
            longest = piece_length(self.sequence_length, self.noise_density, self.mean_noise_span_length)
            needed = sentinels_needed(longest, self.noise_density, self.mean_noise_span_length)
            if self.num_sentinels < needed:
                raise ValueError(
                    f"num_sentinels={self.num_sentinels} is too few: objective=span_corruption needs {needed} for "
                    f"sequence_length={self.sequence_length} (set it before the tokenizer is trained)"
                )
        return self

    @property
    def tokenizer_path(self) -> Path:
        """Where the tokenizer is."""
        return self.output_dir / "tokenizer.model"

    @property
    def sentences_path(self) -> Path:
        """Where the tokenised sentences are."""
        return self.output_dir / "sentences"

    def instances_path(self, split: str) -> Path:
        """Where the instances of ``train`` or ``validation`` are."""
        return self.output_dir / "instances" / split
