"""``megacore convert`` as a user runs it: alone and under mpirun, between layouts and formats."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from launcher.start import megacore_command, mpi_command
from megacore.checkpoint.reader import CheckpointReader
from tests.checkpoint.test_reader_and_writer import SPECS, values, write
from tests.convert.test_huggingface import saved


def run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_checkpoint_is_cut_for_another_layout_by_any_number_of_ranks(tmp_path: Path) -> None:
    source = write(tmp_path / "source", parts=2, replicas=2)
    words = ("convert", source)
    said = run(mpi_command(2, *words, tmp_path / "two", "tensor_parallel_size=4"))
    assert "megacore → megacore" in said
    run(megacore_command(*words, tmp_path / "one", "tensor_parallel_size=4"))
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    reader = CheckpointReader(tmp_path / "two")
    reader.check_coverage()
    assert reader.manifest.layout.tensor_parallel_size == 4
    assert reader.manifest.progress == CheckpointReader(source).manifest.progress
    for name in SPECS:
        assert np.array_equal(reader.read(name, "weight"), values(name))


def test_bf16_weights_are_rounded_once_and_cut_without_loss(tmp_path: Path) -> None:
    source = write(tmp_path / "source", parts=1)
    run(megacore_command("convert", source, tmp_path / "bf16", "--dtype", "bf16", "--weights-only"))
    run(megacore_command("convert", tmp_path / "bf16", tmp_path / "tp2", "tensor_parallel_size=2"))
    reader = CheckpointReader(tmp_path / "tp2")
    for name in SPECS:
        expected = torch.from_numpy(values(name)).bfloat16()
        assert reader.dtype(name, "weight") == "bfloat16"
        assert torch.equal(torch.from_numpy(reader.read(name, "weight")), expected.float())


def test_hugging_face_in_and_out_under_mpirun(tmp_path: Path) -> None:
    saved("qwen3", tmp_path / "hf")
    run(mpi_command(2, "convert", tmp_path / "hf", tmp_path / "imported", "tensor_parallel_size=2"))
    run(mpi_command(2, "convert", tmp_path / "imported", tmp_path / "back", "--to", "hf"))
    first, second = (digests(tmp_path / folder) for folder in ("hf", "back"))
    assert set(second) >= {"config.json", "model.safetensors"}
    saved_again = CheckpointReader(tmp_path / "imported").manifest
    assert saved_again.lineage[0]["format"] == "hf"
    assert first.keys() - second.keys() <= {"generation_config.json"}


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nowhere", "out"], ["nowhere", "config.json"]),
        (["source", "out", "--to", "onnx"], ["--to onnx", "deepspeed-universal"]),
        (["source", "out", "--to", "hf", "tensor_parallel_size=2"], ["tensor_parallel_size=2"]),
        (["source", "out", "--dtype", "bf16"], ["--dtype bf16", "--weights-only"]),
        (["source", "out", "--dtype", "fp8"], ["--dtype fp8", "fp32 or bf16"]),
        (["source", "out", "--config", "run.yaml"], ["--config run.yaml", "megacore"]),
        (["source", "out", "--to", "deepspeed-universal", "--weights-only"], ["deepspeed-universal", "--weights-only"]),
        (["source", "source"], ["source", "exists already"]),
        (["source", "source/inside"], ["source/inside", "lies in source"]),
        (["source", "."], ["exists already"]),
        (["source", "out", "tensor_parallel_size=3"], ["tensor_parallel_size=3", "num_attention_heads=4"]),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(tmp_path: Path, words: list[str], parts: list[str]) -> None:
    write(tmp_path / "source")
    result = subprocess.run(
        megacore_command("convert", *words), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert line.startswith("error: ") and all(part in line for part in parts)
    assert not (tmp_path / "out").exists()
