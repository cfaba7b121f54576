"""What can go wrong with files and commands: damage, full disks, killed jobs, other configurations, misspelt keys."""

from __future__ import annotations

import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.build import build_sentences, build_tokenizer
from data_pipeline.config import DataBuildConfig
from data_pipeline.instances import build_instances
from data_pipeline.loader import InstanceDataset
from data_pipeline.shards import MANIFEST, read_dataset, write_dataset
from data_pipeline.tokenizer import SEP, SPECIAL_TOKENS
from launcher.start import megacore_command, mpi_command
from megacore.communicator import Alone
from megacore.errors import DataError
from megacore.settings import load
from tests.data.corpora import build_all, write_config, write_jsonl
from tests.data.corpora import documents as word_like
from tests.data.test_text_to_instances import assert_one_error, call, digests


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataBuildConfig:
    return build_all(tmp_path_factory.mktemp("built"))


# Instances.


@pytest.mark.parametrize("masking", ["token", "whole_word"])
def test_counts_in_the_manifest_are_those_of_the_files(config: DataBuildConfig, tmp_path: Path, masking: str) -> None:
    if masking == "whole_word":
        config = config.model_copy(update={"masking": masking, "duplicates": 1, "output_dir": tmp_path})
        for name in ("tokenizer.model", "sentences"):
            (tmp_path / name).symlink_to(load_path(config, name))
        build_instances(config, "train", Alone())
    manifest = read_dataset(config.instances_path("train"), "instances").manifest
    dataset = InstanceDataset(config.instances_path("train"))
    instances = [dataset[number] for number in range(len(dataset))]
    assert manifest.total("instances") == len(instances)
    assert manifest.total("tokens") == sum(len(instance["input_ids"]) for instance in instances)
    assert manifest.total("masked") == sum(len(instance["masked_labels"]) for instance in instances)
    assert manifest.total("random_next") == sum(instance["next_sentence_label"] for instance in instances)
    for instance in instances:
        assert 3 < len(instance["input_ids"]) <= config.sequence_length
        assert len(instance["masked_positions"]) and instance["masked_positions"].max() < len(instance["input_ids"])
        assert instance["masked_labels"].min() >= len(SPECIAL_TOKENS)
        assert np.flatnonzero(instance["input_ids"] == SEP).tolist() == [
            instance["segment_b_start"] - 1,
            len(instance["input_ids"]) - 1,
        ]


def load_path(config: DataBuildConfig, name: str) -> Path:
    return config.inputs[0].parent / "data" / name


# Files.


def damage(folder: Path, what: str) -> None:
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    if what == "header length":
        content[7] = 0x7F
    elif what == "header":
        content[8:10] = b"[["
    elif what == "header value":
        content[8:10] = b"3 "
        content[10 : 8 + int.from_bytes(content[:8], "little")] = b" " * (int.from_bytes(content[:8], "little") - 2)
    elif what == "type":
        content = bytearray(bytes(content).replace(b'"I64"', b'"F99"').replace(b'"U16"', b'"Q16"'))
    file.write_bytes(content)


@pytest.mark.parametrize("what", ["header length", "header", "header value", "type"])
def test_a_damaged_header_is_named(config: DataBuildConfig, tmp_path: Path, what: str) -> None:
    shutil.copytree(config.instances_path("validation"), tmp_path / "copy")
    damage(tmp_path / "copy", what)
    with pytest.raises(DataError, match=r"\.safetensors: damaged"):
        InstanceDataset(tmp_path / "copy")


def test_other_kinds_and_damaged_manifests_are_refused(config: DataBuildConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds sentences, not instances"):
        InstanceDataset(config.sentences_path)
    for content in (b"", b"{}", b"\xff", b'{"kind": '):
        (tmp_path / MANIFEST).write_bytes(content)
        with pytest.raises(DataError, match=r"manifest\.json: damaged"):
            InstanceDataset(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"validation_fraction": 0.5}, "validation_fraction=0.2"),
        ({"seed": 7}, "seed=1234"),
        ({"block_size_mb": 1.0}, "block_size_mb=0.01"),
    ],
)
def test_sentences_of_another_configuration_are_not_taken_for_these(
    config: DataBuildConfig, changes: dict[str, Any], named: str
) -> None:
    before = digests(config.output_dir)
    assert build_sentences(config, Alone()) is None
    with pytest.raises(DataError, match=named):
        build_sentences(config.model_copy(update=changes), Alone())
    assert digests(config.output_dir) == before


def test_another_text_or_order_of_files_is_not_taken_for_the_same(tmp_path: Path) -> None:
    inputs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        inputs.append(write_jsonl(tmp_path / name / "part.jsonl", word_like(40, seed=len(name + name[0]) + ord(name))))
    config = load(DataBuildConfig, write_config(tmp_path, inputs[0]))
    config = config.model_copy(update={"inputs": tuple(inputs)})
    build_tokenizer(config)
    build_sentences(config, Alone())
    with pytest.raises(DataError, match="inputs="):
        build_sentences(config.model_copy(update={"inputs": tuple(inputs[::-1])}), Alone())
    inputs[0].write_text(inputs[0].read_text() + '{"text": "More."}\n')  # the first of two files of one name
    with pytest.raises(DataError, match="inputs="):
        build_sentences(config, Alone())


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def shards() -> Any:
        yield "one", {"x": np.arange(3)}, {}
        assert (tmp_path / "set.incomplete" / "one.safetensors").exists()
        raise DataError("the second one cannot be made")

    with pytest.raises(DataError, match="cannot be made"):
        write_dataset(tmp_path / "set", Alone(), "sentences", {}, shards())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_error_and_leaves_nothing(config: DataBuildConfig, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    path = write_config(tmp_path, config.inputs[0])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.model").write_bytes(config.tokenizer_path.read_bytes())
    command = megacore_command("data", "build", path)
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=30,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert_one_error(result, "sentences.incomplete: cannot be written: File too large")
    assert "Traceback" not in result.stderr
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["tokenizer.model"]


def test_what_a_killed_job_left_is_in_nobodys_way(config: DataBuildConfig, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(config.tokenizer_path.read_bytes())
    (tmp_path / "sentences.incomplete").mkdir()
    (tmp_path / "sentences.incomplete" / "train-000000.safetensors").write_bytes(b"half")
    (tmp_path / "sentences.incomplete" / ".being-written").touch()
    build_sentences(config.model_copy(update={"output_dir": tmp_path}), Alone())
    assert digests(tmp_path / "sentences") == digests(config.sentences_path)
    assert not (tmp_path / "sentences.incomplete").exists()


def test_files_can_be_read_by_colleagues(config: DataBuildConfig) -> None:
    """The permissions are those of the user's umask, as for any other file."""
    plain = config.output_dir / "plain"
    plain.touch()
    modes = {file.stat().st_mode for file in config.output_dir.rglob("*") if file.is_file()}
    plain.unlink()
    assert len(modes) == 1


# Commands.


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["vocab_siz=300"], ["vocab_siz", "did you mean vocab_size?"]),
        (["vocab_size=4"], ["vocab_size=4", "262"]),
        (["inputs=nothing.txt"], ["nothing.txt: no such file"]),
    ],
)
def test_a_misspelt_command_ends_the_job_with_one_error(
    config: DataBuildConfig, tmp_path: Path, words: list[str], parts: list[str]
) -> None:
    path = write_config(tmp_path, config.inputs[0])
    command = "build" if "inputs" not in words[0] else "tokenizer"
    result = call(mpi_command(2, "data", command, path, *words))
    assert_one_error(result, *parts)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["data.yaml"]
