"""A corpus of word-like text, the same on every machine, and its tokenizer."""

from __future__ import annotations

import json
import random
from pathlib import Path

from data_pipeline.build import SPLITS, build_sentences, build_tokenizer
from data_pipeline.config import DataBuildConfig
from data_pipeline.instances import build_instances
from megacore.communicator import Alone
from megacore.settings import load

_SYLLABLES = ["ba", "ke", "lo", "mi", "nu", "sa", "te", "vo", "ri", "da", "fu", "go", "ha", "ji", "po"]


def documents(count: int = 120, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(400)]

    def sentence() -> str:
        return " ".join(draw.choices(words, k=draw.randint(3, 14))).capitalize() + "."

    texts = [" ".join(sentence() for _ in range(draw.choice([1, 3, 8, 30]))) for _ in range(count)]
    return texts + texts[: count // 10]  # real corpora hold documents twice


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def write_config(folder: Path, corpus: Path, **changes: object) -> Path:
    values = {
        "inputs": [str(corpus)],
        "output_dir": str(folder / "data"),
        "vocab_size": 400,
        "sequence_length": 48,
        "validation_fraction": 0.2,
        "block_size_mb": 0.01,
        "duplicates": 2,
        **changes,
    }
    path = folder / "data.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return path


TEXTS = [*documents(150, seed=4), "Solo.", "x", "One sentence alone in its document"]


def build_all(folder: Path, **changes: object) -> DataBuildConfig:
    """Go all the way from `TEXTS` to instances, in this process."""
    config = load(DataBuildConfig, write_config(folder, write_jsonl(folder / "corpus.jsonl", TEXTS), **changes))
    build_tokenizer(config)
    build_sentences(config, Alone())
    for split in SPLITS:
        build_instances(config, split, Alone())
    return config
