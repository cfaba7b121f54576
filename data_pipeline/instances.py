"""From tokenised sentences to the instances of an objective, in parallel over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from data_pipeline.config import DataBuildConfig
from data_pipeline.masked_pairs import masked_pairs
from data_pipeline.pairs import Corpus
from data_pipeline.pieces import corrupted_pieces, language_model_pieces
from data_pipeline.shards import Columns, DatasetManifest, already_built, read_dataset, write_dataset
from data_pipeline.tokenizer import Tokenizer
from megacore.communicator import Communicator, together
from megacore.errors import DataError

Progress = Callable[[int], None]


class _Recipe(NamedTuple):
    """How the instances of an objective are made."""

    make: Callable[[DataBuildConfig, Corpus, Tokenizer, int, int, Progress], tuple[Columns, dict[str, int]]]
    """(config, corpus, tokenizer, copy, file, on_progress) -> columns and counts of one sentence file in one copy."""
    keys: tuple[str, ...]
    """Keys of the configuration that decide about the instances, besides those of every objective."""
    min_documents: int = 1


_COMMON_KEYS = ("objective", "sequence_length", "duplicates", "seed")
_RECIPES = {
    "mlm_nsp": _Recipe(masked_pairs, ("short_sequence_probability", "masking", "masking_rate"), 2),
    "lm": _Recipe(language_model_pieces, ()),
    "span_corruption": _Recipe(corrupted_pieces, ("noise_density", "mean_noise_span_length")),
}


def build_instances(
    config: DataBuildConfig, split: str, group: Communicator, on_progress: Progress = lambda count: None
) -> DatasetManifest | None:
    """Write the instances of a split; return ``None`` if this was done before.

    A file holds the instances of one sentence file in one copy of the corpus; for its columns see `masked_pairs`,
    `language_model_pieces` and `corrupted_pieces`.

    Raises:
        DataError: on every rank, if any rank failed.
    """
    path, recipe = config.instances_path(split), _RECIPES[config.objective]
    with together(group):
        tokenizer = Tokenizer(config.tokenizer_path, config.vocab_size, config.num_sentinels)
        sentences = read_dataset(config.sentences_path, "sentences")
        about = _about(config, split, tokenizer, sentences.manifest)
        done = already_built(path, "instances", about)
        corpus = Corpus(sentences, split)
        if len(corpus) < recipe.min_documents:
            raise DataError(
                f"{config.sentences_path}: the {split} split has {len(corpus)} documents; "
                f"objective={config.objective} needs {recipe.min_documents} "
                "(documents are separated by blank lines in .txt; see also validation_fraction)"
            )
    if done:
        return None
    written: list[DatasetManifest] = []
    jobs = [(copy, file) for copy in range(config.duplicates) for file in range(len(corpus.files))]
    own = (job for number, job in enumerate(jobs) if number % group.size == group.rank)
    shards = _shards(config, corpus, tokenizer, own, on_progress)
    write_dataset(path, group, "instances", about, shards, written.append)
    return written[0]


def _about(config: DataBuildConfig, split: str, tokenizer: Tokenizer, sentences: DatasetManifest) -> dict[str, Any]:
    if sentences.about["tokenizer_sha256"] != tokenizer.sha256:
        raise DataError(f"{config.sentences_path} was built with another tokenizer than {config.tokenizer_path}")
    for key in ("seed", "validation_fraction"):
        before, now = sentences.about[key], getattr(config, key)
        if before != now:
            raise DataError(f"{config.sentences_path} was built with {key}={before}, now it is {now}; build it again")
    return {
        "split": split,
        "sentences": sentences.digest,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        **{key: getattr(config, key) for key in (*_COMMON_KEYS, *_RECIPES[config.objective].keys)},
    }


def _shards(
    config: DataBuildConfig,
    corpus: Corpus,
    tokenizer: Tokenizer,
    jobs: Iterable[tuple[int, int]],
    on_progress: Progress,
) -> Iterator[tuple[str, Columns, dict[str, int]]]:
    make = _RECIPES[config.objective].make
    for copy, file in jobs:
        name = f"copy{copy:03d}-{corpus.files[file].removesuffix('.safetensors')}"
        yield name, *make(config, corpus, tokenizer, copy, file, on_progress)
