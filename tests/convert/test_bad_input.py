"""Values that cannot be, in other programs' files: refused by the file's name, or said; never lost without a word."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from launcher.cli import app
from launcher.inspect_command import _event, _parameters
from megacore.checkpoint.files import plan_files
from megacore.checkpoint.manifest import STATES, Layout, ParameterRecord
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import write_checkpoint
from megacore.communicator import Alone
from megacore.config import ParallelConfig
from megacore.convert.deepspeed import DeepSpeedSource
from megacore.convert.deepspeed_files import open_deepspeed
from megacore.convert.huggingface import HuggingFaceSource
from megacore.convert.imports import fresh_manifest
from megacore.convert.megatron import MegatronSource
from megacore.convert.megatron_export import export_megatron
from megacore.convert.stored_tensor import number_in
from megacore.convert.torch_files import load_torch_file
from megacore.convert.universal import export_universal
from megacore.errors import MegacoreError
from megacore.model_config import ModelConfig, divisors_near
from tests.convert.test_huggingface import imported, saved
from tests.models import MODEL, model_config

QUERY = "model.layers.0.self_attn.q_proj.weight"
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in each format."""
    folder = tmp_path_factory.mktemp("formats")
    saved("llama", folder / "hf")
    reader = imported(folder / "hf", folder / "megacore")
    export_megatron(reader, folder / "megatron", ParallelConfig(), "float32", Alone())
    trained(folder / "trained", model_config())
    export_universal(CheckpointReader(folder / "trained"), folder / "universal", ParallelConfig(), Alone())
    return folder


def trained(path: Path, model: ModelConfig, dtype: str = "float32", **multipliers: float) -> Path:
    """Write a checkpoint of zeros, with the optimizer's state."""
    manifest = fresh_manifest(model)
    name = "embeddings.word"
    scaled = ParameterRecord(**{**manifest.parameters[name].model_dump(), **multipliers})
    manifest = manifest.model_copy(update={"parameters": {**manifest.parameters, name: scaled}})

    def zeros(name: str, state: str, region: Any) -> Any:
        return np.zeros([stop - start for start, stop in region], dtype)

    write_checkpoint(path, Alone(), plan_files(manifest.tensors(), STATES, Layout(), lambda *_: dtype, zeros), manifest)
    return path


def copied(folder: Path, kind: str, tmp_path: Path) -> Path:
    shutil.copytree(folder / kind, tmp_path / kind)
    return tmp_path / kind


def quantized(tensors: dict[str, Any], name: str, dtype: torch.dtype) -> None:
    tensors[name] = (100 * tensors[name]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64])
@pytest.mark.parametrize("kind", ["hf", "hf torch", "megatron", "universal"])
def test_what_is_no_floating_point_number_is_no_weight(
    folder: Path, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    path = copied(folder, kind.split()[0], tmp_path)
    refused: Callable[[Path], Any]
    if kind.startswith("hf"):
        file, name, refused = path / "model.safetensors", QUERY, HuggingFaceSource
        tensors = load_file(file)
        quantized(tensors, name, dtype)
        if kind == "hf torch" or dtype == torch.complex64:
            file.unlink()
            file = path / "pytorch_model.bin"
            torch.save(tensors, file)
        else:
            save_file(tensors, file)
    elif kind == "megatron":
        file, name, refused = megatron_file(path), FC1, MegatronSource
        change(file, lambda content: quantized(content["model"], name, dtype))
    else:
        file = next(path.glob("*/zero/*/fp32.pt"))
        name, refused = "its tensor", DeepSpeedSource
        change(file, lambda content: quantized(content, "param", dtype))
    with pytest.raises(MegacoreError) as error:
        refused(path)
    kind_of = str(dtype).removeprefix("torch.")
    assert f"{file}: {name} is of {kind_of}" in str(error.value)


def megatron_file(path: Path) -> Path:
    return next(path.glob("*/mp_rank_00/model_optim_rng.pt"))


def change(file: Path, edit: Callable[[Any], Any]) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(file, weights_only=True)
    edit(content)
    torch.save(content, file)


def test_float64_is_rounded_with_a_word(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, "hf", tmp_path)
    tensors = load_file(path / "model.safetensors")
    save_file(tensors | {QUERY: tensors[QUERY].double()}, path / "model.safetensors")
    assert "rounded to fp32: 1 tensors of float64" in convert(path, tmp_path / "imported")
    assert "rounded to" not in convert(folder / "hf", tmp_path / "narrow")
    path = copied(folder, "megatron", tmp_path)
    change(megatron_file(path), lambda content: content["model"].update({FC1: content["model"][FC1].double()}))
    assert MegatronSource(path).float64 == 1


def convert(*words: Any) -> str:
    result = CliRunner().invoke(app, ["convert", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_an_export_says_what_it_leaves_out(tmp_path: Path) -> None:
    path = trained(tmp_path / "scaled", model_config(), learning_rate_multiplier=0.5)
    said = convert(path, tmp_path / "hf", "--to", "hf")
    assert "left out: the optimizer's state, the multipliers of learning rate and eps of 1 parameters" in said
    said = convert(path, tmp_path / "universal", "--to", "deepspeed-universal")
    assert "left out: the multipliers of learning rate and eps of 1 parameters" in said
    gpt = {"architecture": "decoder", "residual": "pre_norm", "embedding_norm": False, "type_vocab_size": 0}
    path = trained(tmp_path / "gpt", model_config(**gpt, lm_transform=False, lm_bias=False), adam_eps_multiplier=2.0)
    said = convert(path, tmp_path / "megatron", "--to", "megatron")
    assert "left out: the optimizer's state, the multipliers of learning rate and eps of 1 parameters" in said
    model = model_config()
    path = trained(tmp_path / "float64", model, "float64")
    count = len(fresh_manifest(model).parameters)
    assert f"rounded to fp32: {count} tensors" in convert(path, tmp_path / "wide", "--to", "hf")
    assert f"rounded to fp32: {3 * count} tensors" in convert(path, tmp_path / "all", "--to", "deepspeed-universal")


def test_files_beside_the_weights_come_along_or_are_named(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, "hf", tmp_path)
    for name in ("chat_template.jinja", "README.md", "LICENSE", "flax_model.msgpack", "adapter_model.safetensors"):
        (path / name).write_text(name)
    source = HuggingFaceSource(path)
    assert source.left_out == ("adapter_model.safetensors",)
    convert(path, tmp_path / "imported")
    convert(tmp_path / "imported", tmp_path / "back", "--to", "hf")
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "chat_template.jinja"
    assert (tmp_path / "back" / "generation_config.json").exists()


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -1, 2.5, 1 << 64, True, "7", None, [1]])
def test_a_counter_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(MegacoreError, match=r"^a file: step is .* instead of a count$"):
        number_in(value, "a file: step")


@pytest.mark.parametrize("value", [float("inf"), float("nan"), -5.0])
def test_deepspeeds_step_that_is_none_is_refused(folder: Path, tmp_path: Path, value: float) -> None:
    path = copied(folder, "universal", tmp_path)
    for file in path.glob("*/zero/*/step.pt"):
        torch.save(torch.tensor(value), file)
    with pytest.raises(MegacoreError, match=r"step\.pt is .* instead of a count"):
        DeepSpeedSource(path)


@pytest.mark.parametrize("tag", ["..", ".", "", "a/b", "gone"])
def test_a_tag_that_is_no_directory_of_the_checkpoint_is_refused(folder: Path, tmp_path: Path, tag: str) -> None:
    path = copied(folder, "universal", tmp_path)
    (path / "latest_universal").write_text(tag)
    with pytest.raises(MegacoreError, match="latest_universal names"):
        open_deepspeed(path)


@pytest.mark.parametrize("weight_map", [["a"], {QUERY: 5}, {QUERY: ["a"]}, None, {QUERY: "../model.safetensors"}])
def test_an_index_that_names_no_files_is_refused(folder: Path, tmp_path: Path, weight_map: Any) -> None:
    path = copied(folder, "hf", tmp_path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(MegacoreError, match=r"model\.safetensors\.index\.json"):
        HuggingFaceSource(path)


def test_a_tensor_whose_name_is_a_number_is_refused(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, "hf", tmp_path)
    torch.save({**load_file(path / "model.safetensors"), 5: torch.zeros(3)}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(MegacoreError, match=r"pytorch_model\.bin: .*5 is no tensor's name"):
        HuggingFaceSource(path)


def test_lists_that_share_or_hold_themselves_do_not_explode(tmp_path: Path) -> None:
    shared: list[Any] = [torch.arange(3)]
    for _ in range(60):
        shared = [shared, shared]
    torch.save(shared, tmp_path / "shared.pt")
    loaded = load_torch_file(tmp_path / "shared.pt")
    for _ in range(60):
        assert loaded[0] is loaded[1]
        loaded = loaded[0]
    assert loaded[0].read().tolist() == [0, 1, 2]
    cycle: list[Any] = []
    cycle.append({"cycle": cycle})
    torch.save(cycle, tmp_path / "cycle.pt")
    with pytest.raises(MegacoreError, match=r"cycle\.pt: a list in it contains itself"):
        load_torch_file(tmp_path / "cycle.pt")


EDITS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "iteration": (lambda content: content.update(iteration=10**600), "iteration is 1000"),
    "version": (lambda content: content.update(checkpoint_version=float("nan")), "checkpoint_version=nan"),
    "samples": (lambda content: setattr(content["args"], "consumed_train_samples", -3), "consumed_train_samples is -3"),
    "hidden": (lambda content: setattr(content["args"], "hidden_size", 1 << 62), "hidden_size="),
    "layers": (lambda content: setattr(content["args"], "num_layers", 10**7), "num_hidden_layers=10000000"),
    "digits": (lambda content: setattr(content["args"], "num_layers", 10**600), "num_hidden_layers=1000"),
    "padding": (lambda content: setattr(content["args"], "padded_vocab_size", -5), "padded_vocab_size=-5"),
    "shared": (
        lambda content: content["model"].update(a={"b": (part := {"c": torch.zeros(1)}), "d": part}),
        "a.d is the same",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_megatrons_values_that_cannot_be_are_refused_by_file(folder: Path, tmp_path: Path, name: str) -> None:
    path = copied(folder, "megatron", tmp_path)
    edit, part = EDITS[name]
    change(megatron_file(path), edit)
    with pytest.raises(MegacoreError) as error:
        MegatronSource(path)
    assert str(megatron_file(path)) in str(error.value) and part in str(error.value)


def test_an_iteration_of_many_digits_is_refused(folder: Path, tmp_path: Path) -> None:
    path = copied(folder, "megatron", tmp_path)
    (path / "latest_checkpointed_iteration.txt").write_text("9" * 5000)
    with pytest.raises(MegacoreError, match=r"latest_checkpointed_iteration\.txt names '9{40}'"):
        MegatronSource(path)


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("num_hidden_layers", 10**7, "num_hidden_layers=10000000"),
        ("vocab_size", 1 << 62, "vocab_size="),
        ("hidden_size", "wide", "hidden_size='wide'"),
        ("hidden_act", ["silu"], "hidden_act="),
        ("rope_parameters", [1], "rope_parameters=[1]"),
        ("rms_norm_eps", None, "rms_norm_eps is missing"),
    ],
)
def test_hugging_faces_values_that_cannot_be_are_refused_by_file(
    folder: Path, tmp_path: Path, key: str, value: Any, part: str
) -> None:
    path = copied(folder, "hf", tmp_path)
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(MegacoreError) as error:
        HuggingFaceSource(path)
    assert str(error.value).startswith(f"{file}: ") and part in str(error.value)


@pytest.mark.parametrize("key", sorted(MODEL.keys() - {"initializer_range"}))
def test_every_size_of_a_model_has_a_bound(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}\n.*less than or equal to"):
        model_config(**{key: 1 << 62})


def test_divisors_of_a_large_size_are_found_at_once() -> None:
    assert divisors_near((1 << 31) - 1, 5) == "1, 2147483647"  # a prime
    assert divisors_near(24, 5) == "2, 3, 4, 6"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["ulysses_parallel_size=2"], "ulysses_parallel_size=2: "),
        (["sequence_parallel=true"], "sequence_parallel=True: "),
    ],
)
def test_a_layout_of_files_has_two_keys(folder: Path, tmp_path: Path, words: list[str], part: str) -> None:
    result = CliRunner().invoke(app, ["convert", str(folder / "megacore"), str(tmp_path / "out"), *words])
    assert str(result.exception).startswith(part)
    assert "tensor_parallel_size and pipeline_parallel_size" in str(result.exception)


def test_a_file_is_no_source(folder: Path, tmp_path: Path) -> None:
    file = folder / "hf" / "model.safetensors"
    result = CliRunner().invoke(app, ["convert", str(file), str(tmp_path / "out")])
    assert str(result.exception) == f"{file} is a file; give its directory"


@pytest.mark.parametrize(
    "event",
    [
        {"event": "grow", "from": [1], "to": {}, "step": 1, "optimizer": "keep"},
        {"event": "grow", "from": {"a": 1}, "to": {}, "step": 1, "optimizer": "keep"},
        {"event": "grow", "from": {}, "to": {}, "step": "one", "optimizer": "keep"},
        {"event": "import", "format": "hf", "new": [1]},
    ],
)
def test_an_event_that_is_not_as_ours_is_shown_as_it_is(event: dict[str, Any]) -> None:
    assert json.loads(_event(event)) == event


def test_no_parameters_are_shown_as_none() -> None:
    assert _parameters({}, every=False).label == "parameters: none"
