"""Packed batches: what they hold, for each objective, against a plain reading of the files, sample by sample."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from safetensors.numpy import load_file

from data_pipeline.config import DataBuildConfig
from data_pipeline.loader import OBJECTIVES, Batch, InstanceDataset, Objective, PretrainingBatches, check_objective
from data_pipeline.sampler import sample_order
from data_pipeline.shards import read_dataset, write_dataset
from data_pipeline.tokenizer import MASK, PAD, SEP
from megacore.communicator import Alone
from megacore.errors import ConfigError, DataError
from tests.data.corpora import build_all

SEED = 9
SENTINELS = {"num_sentinels": 6, "vocab_size": 406}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataBuildConfig]:
    folder = tmp_path_factory.mktemp
    return {built: build_all(folder(built), objective=built, **SENTINELS) for built in OBJECTIVES}


@pytest.fixture(scope="module")
def datasets(configs: dict[str, DataBuildConfig]) -> dict[str, InstanceDataset]:
    return {built: InstanceDataset(config.instances_path("train")) for built, config in configs.items()}


def built_for(objective: str) -> str:
    return next(built for built, served in OBJECTIVES.items() if objective in served)


def stored(dataset: InstanceDataset) -> list[dict[str, Any]]:
    """Read all instances with safetensors alone."""
    instances = []
    for file in sorted(dataset.path.glob("*.safetensors")):
        columns = load_file(file)
        offsets = {name: columns.pop(name) for name in list(columns) if name.endswith("offsets")}
        for number in range(len(offsets["offsets"]) - 1):
            instance = {}
            for name, column in columns.items():
                prefix = name.split("_")[0] + "_"
                own = offsets.get(prefix + "offsets", offsets["offsets"])
                flat = len(column) == own[-1] and name.endswith(("ids", "positions", "labels"))
                instance[name] = column[own[number] : own[number + 1]].tolist() if flat else int(column[number])
            instances.append(instance)
    return instances


def unpacked(tokens: np.ndarray, sequences: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield where each sequence begins, and its part of the tokens."""
    assert tokens.dtype == sequences.dtype == np.int64
    assert tokens.shape == (3, sequences[0].sum())
    start = 0
    for length in sequences[0]:
        yield start, tokens[:, start : start + length]
        start += length


@pytest.mark.parametrize("objective", get_args(Objective))
def test_batches_hold_the_stored_instances_and_the_labels_of_the_objective(datasets: Any, objective: Objective) -> None:
    dataset = datasets[built_for(objective)]
    instances, size = stored(dataset), 24
    assert len(instances) == len(dataset)
    (batch,) = PretrainingBatches(dataset, SEED, size, size, objective=objective).step_batches(48)
    chosen = [instances[number] for number in sample_order(np.arange(48, 48 + size), len(dataset), SEED)]
    assert batch.sequences.shape == (3, size)
    assert np.array_equal(batch.sequences[2], np.arange(48, 48 + size))
    assert batch.label_positions.dtype == batch.labels.dtype == np.int64
    labels: list[tuple[int, int]] = []
    target_start = 0
    for number, ((start, (ids, segments, positions)), instance) in enumerate(
        zip(unpacked(batch.tokens, batch.sequences), chosen, strict=True)
    ):
        sequence = instance["input_ids"]
        assert ids.tolist() == sequence and positions.tolist() == list(range(len(sequence)))
        prefix = 0
        second = len(sequence)
        if objective in ("mlm", "mlm_nsp"):
            second = instance["segment_b_start"]
            labels += [
                (start + place, label)
                for place, label in zip(instance["masked_positions"], instance["masked_labels"], strict=True)
            ]
        elif objective == "span_corruption":
            labels += [(target_start + place, label) for place, label in enumerate(instance["target_ids"])]
            target_start += len(instance["target_ids"])
        else:
            prefix = instance["prefix_length"] if objective == "prefix_lm" else 0
            output = range(max(prefix, 1), len(sequence))  # the first token is given in any case
            assert len(output)
            labels += [(start + place - 1, sequence[place]) for place in output]
        assert segments.tolist() == [int(place >= second) for place in range(len(sequence))]
        assert batch.sequences[1, number] == prefix
    assert list(zip(batch.label_positions.tolist(), batch.labels.tolist(), strict=True)) == labels
    if objective == "mlm_nsp":
        assert batch.next_sentence_labels is not None
        assert batch.next_sentence_labels.tolist() == [instance["next_sentence_label"] for instance in chosen]
    else:
        assert batch.next_sentence_labels is None
    assert (batch.target_tokens is None) == (batch.target_sequences is None) == (objective != "span_corruption")


def test_the_decoder_reads_what_it_was_to_write_one_place_later(datasets: Any) -> None:
    (batch,) = PretrainingBatches(datasets["span_corruption"], SEED, 24, 24).step_batches(0)
    assert batch.target_tokens is not None and batch.target_sequences is not None
    assert np.array_equal(batch.target_sequences[1:], batch.sequences[1:])
    for start, (ids, segments, positions) in unpacked(batch.target_tokens, batch.target_sequences):
        labels = batch.labels[start : start + len(ids)]
        assert ids.tolist() == [PAD, *labels[:-1].tolist()] and labels[-1] == SEP
        assert not segments.any() and positions.tolist() == list(range(len(ids)))


def test_packed_and_padded_batches_say_the_same(datasets: Any) -> None:
    """Rows of equal length, filled up with [PAD], and their masked positions, are the same without the padding."""
    dataset = datasets["mlm_nsp"]
    chosen = [stored(dataset)[number] for number in sample_order(np.arange(16), len(dataset), SEED)]
    rows = np.full((16, 48), PAD)
    types, targets = np.zeros_like(rows), np.full_like(rows, -100)
    for row, kind, target, instance in zip(rows, types, targets, chosen, strict=True):
        length = len(instance["input_ids"])
        row[:length] = instance["input_ids"]
        kind[instance["segment_b_start"] : length] = 1
        target[instance["masked_positions"]] = instance["masked_labels"]
    real = rows != PAD
    (batch,) = PretrainingBatches(dataset, SEED, 16, 16).step_batches(0)
    packed = np.full(batch.tokens.shape[1], -100)
    packed[batch.label_positions] = batch.labels
    assert np.array_equal(batch.tokens, [rows[real], types[real], np.nonzero(real)[1]])
    assert np.array_equal(packed, targets[real]) and (targets >= 0).sum() == len(batch.labels)
    # Most chosen tokens are hidden (80 % on average, and the batch has more than 50).
    assert (batch.tokens[0][batch.label_positions] == MASK).mean() > 0.6


@pytest.mark.parametrize(("replicas", "micro"), [(1, 4), (2, 4), (2, 2), (4, 2), (1, 8)])
@pytest.mark.parametrize("built", OBJECTIVES)
def test_replicas_and_micro_batches_share_one_global_order(
    datasets: Any, built: str, replicas: int, micro: int
) -> None:
    dataset = datasets[built]
    (whole,) = PretrainingBatches(dataset, SEED, 8, 8).step_batches(16)
    parts = []
    for rank in range(replicas):
        batches = PretrainingBatches(dataset, SEED, 8, micro, rank, replicas).step_batches(16)
        assert [batch.sequences.shape[1] for batch in batches] == [micro] * (8 // replicas // micro)
        parts += batches
    for name in ("tokens", "sequences", "labels", "next_sentence_labels", "target_tokens", "target_sequences"):
        pieces = [getattr(batch, name) for batch in parts]
        if getattr(whole, name) is None:
            assert pieces == [None] * len(parts)
        else:
            assert np.array_equal(np.concatenate(pieces, axis=-1), getattr(whole, name))
    assert [label for batch in parts for label in labelled(batch)] == labelled(whole)


def labelled(batch: Batch) -> list[tuple[int, int]]:
    """Return (sample, position in it) of each label."""
    tokens, sequences = batch.tokens, batch.sequences
    if batch.target_tokens is not None and batch.target_sequences is not None:
        tokens, sequences = batch.target_tokens, batch.target_sequences
    sample = np.repeat(sequences[2], sequences[0])[batch.label_positions]
    return list(zip(sample.tolist(), tokens[2][batch.label_positions].tolist(), strict=True))


def test_a_resumed_order_goes_on_where_it_stopped(datasets: Any) -> None:
    dataset = datasets["mlm_nsp"]
    whole = PretrainingBatches(dataset, 5, 8, 4)
    rest = PretrainingBatches(dataset, 5, 8, 4)  # as a new process would make it
    consumed = 8 * (len(dataset) // 8)  # the step that crosses into the second epoch
    expected = [whole.step_batches(start) for start in range(0, consumed + 17, 8)][-3:]
    for start, step in zip(range(consumed, consumed + 17, 8), expected, strict=True):
        for batch, again in zip(step, rest.step_batches(start), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(vars(batch).values(), vars(again).values(), strict=True))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_evaluation_takes_every_sample_once_in_as_many_batches_on_every_replica(datasets: Any, kind: str) -> None:
    for replicas in (1, 2, 3):
        made = [
            PretrainingBatches(datasets[kind], 9, 4 * replicas, 4, rank, replicas).evaluation_batches(25)
            for rank in range(replicas)
        ]
        assert len({len(batches) for batches in made}) == 1
        everything = [batch for batches in made for batch in batches]
        samples = np.concatenate([batch.sequences[2] for batch in everything])
        assert sorted(samples[samples >= 0]) == list(range(25))
        blank = [batch for batch in everything if batch.sequences[2].tolist() == [-1]]
        assert len(blank) == {1: 0, 2: 1, 3: 2}[replicas]  # of 13 and 12, of 9, 8 and 8 samples
        assert all(len(batch.labels) == len(batch.label_positions) == 0 for batch in blank)


@pytest.mark.parametrize("objective", get_args(Objective))
@pytest.mark.parametrize("built", OBJECTIVES)
def test_data_built_for_something_else_is_refused_with_what_to_build(
    datasets: Any, built: str, objective: Objective
) -> None:
    if objective in OBJECTIVES[built]:
        check_objective(datasets[built], objective)
        return
    wanted = f"objective={objective}: .* built with objective={built}, .*objective={built_for(objective)}'"
    with pytest.raises(ConfigError, match=wanted):
        PretrainingBatches(datasets[built], 0, 8, 8, objective=objective)


def test_a_data_set_without_an_objective_is_for_mlm_and_an_unknown_one_is_refused(
    datasets: Any, tmp_path: Path
) -> None:
    source = read_dataset(datasets["mlm_nsp"].path, "instances")
    about = {"vocab_size": 406, "sequence_length": 48}
    for name, extra in (("old", {}), ("new", {"objective": "telepathy"})):
        shards = [(shard.removesuffix(".safetensors"), source.columns(shard), {}) for shard in source.manifest.shards]
        write_dataset(tmp_path / name, Alone(), "instances", about | extra, shards)
    old = InstanceDataset(tmp_path / "old")
    assert old.objective == "mlm_nsp" and len(old) == len(datasets["mlm_nsp"])
    (batch,) = PretrainingBatches(old, 0, 8, 8).step_batches(0)
    assert batch.next_sentence_labels is not None
    with pytest.raises(DataError, match="unknown objective=telepathy; known: mlm_nsp, lm"):
        InstanceDataset(tmp_path / "new")


def test_a_damaged_instance_file_is_named(datasets: Any, tmp_path: Path) -> None:
    path = shutil.copytree(datasets["lm"].path, tmp_path / "i")
    file = min(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{file.name} was altered"):
        read_dataset(path, "instances").verify()
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=rf"{file.name} has .* instead of"):
        InstanceDataset(path)
    file.unlink()
    with pytest.raises(DataError, match=rf"{file.name} is missing"):
        InstanceDataset(path)
    with pytest.raises(DataError, match="no data set"):
        InstanceDataset(tmp_path / "nothing")
