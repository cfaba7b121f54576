"""Real text for the measurements: the embedded corpus, through megacore's own pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.build import build_sentences, build_tokenizer
from data_pipeline.config import DataBuildConfig
from data_pipeline.embedded import write_embedded_corpus
from data_pipeline.instances import build_instances
from megacore.communicator import Alone
from megacore.settings import validated

VOCAB_SIZE = 30_000


def write_instances(folder: Path, objectives: list[str], sequence_length: int, corpus_mb: float) -> dict[str, Path]:
    """Write instances of each objective, with one tokenizer, and return where they are."""
    corpus = folder / "corpus.jsonl"
    write_embedded_corpus(corpus, corpus_mb)
    written = {}
    for objective in objectives:
        settings: dict[str, Any] = {
            "inputs": [str(corpus)],
            "output_dir": str(folder / "data"),
            "vocab_size": VOCAB_SIZE,
            "objective": objective,
            "sequence_length": sequence_length,
            "validation_fraction": 0.0,
        }
        config = validated(DataBuildConfig, settings)
        if not written:
            build_tokenizer(config)
            build_sentences(config, Alone())
        build_instances(config, "train", Alone())
        written[objective] = config.instances_path("train").rename(folder / objective)
    return written
