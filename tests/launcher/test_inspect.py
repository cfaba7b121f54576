"""What ``megacore inspect`` says, against transformers' models and sizes counted by hand."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from typer.testing import CliRunner

from launcher.cli import app
from launcher.inspect_command import _alike
from launcher.start import megacore_command
from megacore.communicator import Alone
from megacore.config import ParallelConfig
from megacore.convert.huggingface import HuggingFaceSource
from megacore.convert.imports import import_checkpoint

LAYERS = 12
SIZES = {"vocab_size": 101, "hidden_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
T5 = {"vocab_size": 101, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
MODELS: dict[str, Any] = {
    "bert": lambda: hf.BertForPreTraining(hf.BertConfig(**SIZES, intermediate_size=40)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, intermediate_size=40, num_key_value_heads=2)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    for name, make in MODELS.items():
        make().save_pretrained(folder / f"hf-{name}")
        layout = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
        source = folder / f"hf-{name}"
        import_checkpoint(lambda source=source: HuggingFaceSource(source), folder / name, layout, Alone())
    return folder


def megacore(*words: str | Path) -> str:
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def inspect(*words: str | Path) -> str:
    shown = megacore("inspect", *words)
    assert max(len(line) for line in shown.splitlines()) <= 100 or "--json" in words
    return shown


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_are_those_of_transformers(folder: Path, name: str) -> None:
    facts = json.loads(inspect(folder / name, "--json"))
    assert facts["num_parameters"] == sum(parameter.numel() for parameter in MODELS[name]().parameters())
    stored = sum(file.stat().st_size for file in (folder / name).glob("*.safetensors"))
    assert facts["bytes"] == stored and facts["bytes"] > 4 * facts["num_parameters"]
    assert facts["files"] == len(list((folder / name).glob("*.safetensors"))) == 4
    assert facts["layout"] == {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 1}


def test_shapes_and_axes_are_those_of_the_model(folder: Path) -> None:
    parameters = json.loads(inspect(folder / "llama", "--json"))["parameters"]
    last = LAYERS - 1
    # 4 query heads and 2 key-value heads of 24 / 4 = 6; keys and values, gate and up are stacked.
    shapes = {
        "embeddings.word": [101, 24],
        f"layers.{last}.attention.query_weight": [4, 6, 24],
        f"layers.{last}.attention.key_value_weight": [2, 2, 6, 24],
        f"layers.{last}.attention.output_weight": [24, 4, 6],
        f"layers.{last}.mlp.down_weight": [24, 40],
    }
    assert {name: parameters[name]["shape"] for name in shapes} == shapes
    assert [axis["name"] for axis in parameters["embeddings.word"]["axes"]] == ["vocab", "hidden"]
    assert [axis["role"] for axis in parameters["embeddings.word"]["axes"]] == ["index", "write"]
    assert all(record["states"] == {"weight": "float32"} for record in parameters.values())


def test_layers_that_are_alike_are_one_branch(folder: Path) -> None:
    folded, every = inspect(folder / "llama"), inspect(folder / "llama", "--all")
    assert f"layers.0 … layers.{LAYERS - 1} × {LAYERS}" in folded
    assert folded.count("query_weight [heads 4, head_dim 6, hidden 24 (read)]") == 1
    assert every.count("query_weight [heads 4, head_dim 6, hidden 24 (read)]") == LAYERS
    assert "×" not in every


def test_each_stack_and_each_kind_of_layer_is_a_branch(folder: Path) -> None:
    shown = inspect(folder / "t5")
    assert "layers.0 … layers.1 × 2" in shown and "layers.0 … layers.2 × 3" in shown  # encoder and decoder
    dense, experts = {"up": "[ffn 40]"}, {"up": "[experts 4, ffn 40]"}
    kinds = [dense, dense, experts, dense, dense]
    branches = _alike({f"layers.{number}": kind for number, kind in enumerate(kinds)} | {"norm": dense}, every=False)
    assert [names for names, _ in branches] == [
        ["layers.0", "layers.1"],
        ["layers.2"],
        ["layers.3", "layers.4"],
        ["norm"],
    ]


def test_the_lineage_is_told_from_source_to_size(folder: Path, tmp_path: Path) -> None:
    megacore("grow", folder / "bert", tmp_path / "grown", "intermediate_size=80")
    shown = inspect(tmp_path / "grown").splitlines()
    start = shown.index("lineage")
    assert "import hf-bert from" in shown[start + 1]
    assert "grow bert at step 0: intermediate_size 40 → 80" in shown[start + 2]


def test_a_link_is_named_by_its_target(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bert", tmp_path / "step-00000007")
    (tmp_path / "latest").symlink_to("step-00000007")
    assert inspect(tmp_path / "latest").splitlines()[0] == str(tmp_path / "step-00000007")
    megacore("grow", tmp_path / "latest", tmp_path / "grown", "intermediate_size=80")
    *_, growth, proof = json.loads(inspect(tmp_path / "grown", "--json"))["lineage"]
    assert growth["source"]["name"] == proof["against"]["name"] == "step-00000007"
    megacore("convert", tmp_path / "latest", tmp_path / "cut", "tensor_parallel_size=4")
    assert json.loads(inspect(tmp_path / "cut", "--json"))["layout"]["tensor_parallel_size"] == 4


def test_a_directory_of_checkpoints_is_not_taken_for_deepspeeds(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkpoints"
    source.mkdir()
    (source / "latest").symlink_to(folder / "bert")
    result = subprocess.run(megacore_command("convert", source, tmp_path / "out"), capture_output=True, text=True)
    assert result.returncode == 2 and "neither a checkpoint (manifest.json)" in result.stderr
