"""Megatron in and out: the real megatron-core loads what is written, and computes what megacore computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.start import megacore_command, mpi_command
from megacore.checkpoint.files import plan_files
from megacore.checkpoint.load import load_model
from megacore.checkpoint.manifest import Layout
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import write_checkpoint
from megacore.communicator import Alone
from megacore.config import ParallelConfig
from megacore.convert.imports import fresh_manifest, import_checkpoint
from megacore.convert.megatron import MegatronSource
from megacore.convert.megatron_export import export_megatron
from megacore.errors import CheckpointError, ConfigError, MegacoreError
from megacore.models.batch import ModelBatch
from megacore.specs import Region
from tests.convert import megatron_models
from tests.convert.megatron_models import CASES, PADDED, VOCABULARY, load_all, save_all
from tests.convert.test_convert_command import run
from tests.models import model_config, whole_model
from tests.ranks import run_ranks

pytest.importorskip("megatron.core", reason="megatron-core is not installed")

TWO_BY_TWO = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (3, 17)))
SEGMENTS = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (3, 17)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[torch.Tensor]]]:
    """Megatron's checkpoints at TP 2 × PP 2, and what its models compute."""
    folder = tmp_path_factory.mktemp("megatron")
    return folder, run_ranks(save_all, 4, folder, list(CASES), 2, 2, TOKENS, SEGMENTS, timeout=240)[-1]


@pytest.fixture(scope="module")
def imported(saved: tuple[Path, dict[str, list[torch.Tensor]]]) -> dict[str, CheckpointReader]:
    readers = {}
    for name in CASES:
        target, parallel = saved[0] / "imported" / name, ParallelConfig(tensor_parallel_size=2)
        import_checkpoint(lambda name=name: MegatronSource(saved[0] / name), target, parallel, Alone())  # type: ignore[misc]
        readers[name] = CheckpointReader(target)
    return readers


def assert_same_logits(reader: CheckpointReader, expected: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    count, length = TOKENS.shape
    tokens = torch.stack([TOKENS.flatten(), SEGMENTS.flatten(), torch.arange(length).repeat(count)])
    sequences = torch.tensor([[length] * count, [0] * count, list(range(count))])
    batch = ModelBatch(tokens, sequences, torch.arange(count * length), TOKENS.flatten(), torch.zeros(count).long())
    with torch.no_grad():
        logits = load_model(reader, torch.float32)(batch)
    wanted = [expected[0][..., :VOCABULARY].flatten(0, 1), *expected[1:]]
    for mine, theirs in zip(logits, wanted, strict=True):
        assert float((mine - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


def files_of(folder: Path) -> dict[str, Any]:
    return {
        str(file.parent.name): torch.load(file, weights_only=False) for file in sorted(folder.glob("iter_*/*/*.pt"))
    }


@pytest.mark.parametrize("name", CASES)
def test_an_imported_model_computes_what_megatron_computes(
    name: str, saved: tuple[Path, dict[str, list[torch.Tensor]]], imported: dict[str, CheckpointReader]
) -> None:
    imported[name].check_coverage()
    assert_same_logits(imported[name], saved[1][name])
    manifest = imported[name].manifest
    assert (manifest.progress.step, manifest.progress.consumed_samples) == (12, 96)
    assert manifest.lineage[0]["left_out"] == [f"rows {VOCABULARY} to {PADDED - 1} of the vocabulary (padding)"]


@pytest.mark.parametrize("name", CASES)
def test_the_same_layout_comes_back_bit_for_bit(
    name: str, saved: tuple[Path, Any], imported: dict[str, CheckpointReader], tmp_path: Path
) -> None:
    export_megatron(imported[name], tmp_path / "back", TWO_BY_TWO, "float32", Alone())
    first, second = files_of(saved[0] / name), files_of(tmp_path / "back")
    assert first.keys() == second.keys() == {f"mp_rank_{rank:02d}_{stage:03d}" for rank in (0, 1) for stage in (0, 1)}
    for place, content in first.items():
        model = {key: value for key, value in content["model"].items() if "_extra_state" not in key}
        assert model.keys() == second[place]["model"].keys()
        for key, value in model.items():
            if key.startswith(("embedding.word_embeddings.", "output_layer.")) and "_01_" in place:
                value[VOCABULARY - PADDED // 2 :] = 0  # the padding
            assert torch.equal(second[place]["model"][key], value), key
        theirs, mine = vars(content["args"]), vars(second[place]["args"])
        ours_to_say = {
            "bert",
            "num_query_groups",
            "add_qkv_bias",
        }  # the last two mean nothing without, and with, another
        assert not {key for key in theirs if key not in ours_to_say and mine[key] != theirs[key]}


def test_megatron_loads_what_is_written_for_another_layout(
    saved: tuple[Path, dict[str, list[torch.Tensor]]], imported: dict[str, CheckpointReader], tmp_path: Path
) -> None:
    for name in CASES:
        words = ("--to", "megatron", "pipeline_parallel_size=2")
        if name == "llama":
            said = run(mpi_command(2, "convert", imported[name].path, tmp_path / name, *words))
            assert "megacore → megatron" in said
        else:
            export_megatron(
                imported[name], tmp_path / name, ParallelConfig(pipeline_parallel_size=2), "float32", Alone()
            )
    computed = run_ranks(load_all, 2, tmp_path, list(CASES), 1, 2, TOKENS, SEGMENTS, timeout=240)[-1]
    for name, logits in saved[1].items():
        for mine, theirs in zip(computed[name], logits, strict=True):
            mine, theirs = mine[..., :VOCABULARY], theirs[..., :VOCABULARY]
            assert float((mine - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


def test_one_rank_s_file_is_read_by_the_command_and_adam_s_state_comes_along(tmp_path: Path) -> None:
    (moments,) = run_ranks(megatron_models.save_trained, 1, tmp_path / "gpt2", timeout=240)
    for kind, precision in (("fp32", 0.0), ("bf16", 0.0)):
        said = run(megacore_command("convert", tmp_path / "gpt2" / kind, tmp_path / kind, "tensor_parallel_size=2"))
        assert "megatron → megacore" in said
        reader = CheckpointReader(tmp_path / kind)
        assert reader.manifest.states == ("weight", "exp_avg", "exp_avg_sq")
        assert reader.manifest.progress.optimizer_step == 2
        for ours, (theirs, rows) in {
            "layers.1.mlp.down_weight": ("decoder.layers.1.mlp.linear_fc2.weight", slice(None)),
            "layers.2.attention_residual.norm.bias": ("decoder.layers.2.input_layernorm.bias", slice(None)),
            "embeddings.word": ("embedding.word_embeddings.weight", slice(VOCABULARY)),
            "layers.3.mlp.up_bias": ("decoder.layers.3.mlp.linear_fc1.bias", slice(None)),
        }.items():
            for state in reader.manifest.states:
                expected = moments[kind][theirs][state][rows].numpy()
                assert np.abs(reader.read(ours, state) - expected).max() <= precision, (ours, state)
        query = moments[kind]["decoder.layers.0.self_attention.linear_qkv.weight"]["exp_avg"].reshape(8, 3, 4, 32)
        assert np.array_equal(reader.read("layers.0.attention.query_weight", "exp_avg"), query[:, 0])
        assert np.array_equal(
            reader.read("layers.0.attention.key_value_weight", "exp_avg"), query[:, 1:].transpose(0, 1)
        )


def written(path: Path, **changes: Any) -> CheckpointReader:
    """Write a checkpoint of a new model."""
    model = whole_model(model_config(**changes))
    values = {parameter.global_name: parameter.detach().numpy() for parameter in model.parameters()}  # type: ignore[union-attr]
    manifest = fresh_manifest(model.config)
    slices = {name: values[name] for name in manifest.parameters}

    def box(name: str, state: str, region: Region) -> Any:
        return slices[name][tuple(slice(*bounds) for bounds in region)]

    files = plan_files(manifest.specs(), ("weight",), Layout(), lambda name, state: "float32", box)
    write_checkpoint(path, Alone(), files, manifest)
    return CheckpointReader(path)


def rewritten(source: Path, target: Path, **changes: Any) -> Path:
    """Copy a checkpoint with changed arguments."""
    for place, content in files_of(source).items():
        for key, value in changes.items():
            setattr(content["args"], key, value)
        (target / "iter_0000012" / place).mkdir(parents=True)
        torch.save(content, target / "iter_0000012" / place / "model_optim_rng.pt")
    return target / "iter_0000012"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("gpt2", "checkpoint_version", 2.0),
        ("gpt2", "num_experts", 4),
        ("gpt2", "apply_layernorm_1p", True),
        ("gpt2", "squared_relu", True),
        ("gpt2", "qk_layernorm", True),
        ("gpt2", "position_embedding_type", "relative"),
        ("gpt2", "ffn_hidden_size", None),
        ("gpt2", "bias_gelu_fusion", None),
        ("gpt2", "tensor_model_parallel_size", 4),
        ("llama", "num_attention_heads", 9),
        ("llama", "rotary_percent", 0.5),
        ("llama", "use_rope_scaling", True),
        ("bert", "normalization", "RMSNorm"),
    ],
)
def test_a_model_that_megacore_does_not_compute_is_refused_by_its_key(
    name: str, key: str, value: Any, saved: tuple[Path, Any], tmp_path: Path
) -> None:
    source = rewritten(saved[0] / name, tmp_path, **{key: value})
    if key == "checkpoint_version":
        for file in source.glob("*/*.pt"):
            torch.save(torch.load(file, weights_only=False) | {key: value}, file)
    with pytest.raises(MegacoreError, match=key):
        MegatronSource(source)


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "untied", "cut", "rank", "latest"])
def test_what_is_missing_or_damaged_is_named(damage: str, saved: tuple[Path, Any], tmp_path: Path) -> None:
    source = rewritten(saved[0] / "gpt2", tmp_path)
    file = source / "mp_rank_01_001" / "model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    model, name = content["model"], "decoder.layers.1.mlp.linear_fc1.weight"
    if damage == "missing":
        del model[name]
    elif damage == "unknown":
        for rank in (0, 1):
            other = torch.load(source / f"mp_rank_{rank:02d}_001" / file.name, weights_only=False)
            other["model"]["decoder.layers.1.mlp.router.weight"] = torch.zeros(4, 32)
            torch.save(other, source / f"mp_rank_{rank:02d}_001" / file.name)
        model["decoder.layers.1.mlp.router.weight"], name = torch.zeros(4, 32), "decoder.layers.3.mlp.router.weight"
    elif damage == "shape":
        model[name], name = model[name].T.contiguous(), name.replace("layers.1", "layers.3")
    elif damage == "untied":
        name = "output_layer.weight"
        model[name] = model[name] + 1
    torch.save(content, file)
    if damage == "cut":
        name = "mp_rank_01_001/model_optim_rng.pt"
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "rank":
        name = "mp_rank_01_001/model_optim_rng.pt is missing"
        file.unlink()
    elif damage == "latest":
        name = "latest_checkpointed_iteration.txt names '13'"
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("13")
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        MegatronSource(tmp_path if damage == "latest" else source)


def test_files_without_arguments_need_a_configuration_which_must_agree_where_there_are_some(
    saved: tuple[Path, Any], imported: dict[str, CheckpointReader], tmp_path: Path
) -> None:
    source = rewritten(saved[0] / "llama", tmp_path)
    model = imported["llama"].manifest.model
    assert MegatronSource(source, model).manifest.model == model
    other = model.model_copy(update={"rope_theta": 10000.0})
    with pytest.raises(ConfigError, match=r"rotary_base|rope_theta=5000"):
        MegatronSource(source, other)
    for file in source.glob("*/*.pt"):
        content = torch.load(file, weights_only=False)
        del content["args"]
        torch.save(content, file)
    with pytest.raises(ConfigError, match="--config"):
        MegatronSource(source)
    (tmp_path / "run.yaml").write_text(json.dumps({"model": model.model_dump(mode="json")}))
    run(megacore_command("convert", source, tmp_path / "again", "--config", tmp_path / "run.yaml"))
    again = CheckpointReader(tmp_path / "again")
    for name in again.manifest.parameters:
        assert np.array_equal(again.read(name, "weight"), imported["llama"].read(name, "weight"))


@pytest.mark.parametrize(
    ("changes", "layout", "parts"),
    [
        ({}, {}, ["residual=post_norm instead of pre_norm", "embedding_norm=True"]),
        ({"residual": "pre_norm", "embedding_norm": False, "activation": "relu"}, {}, ["activation=relu"]),
        (
            {"residual": "pre_norm", "embedding_norm": False, "num_hidden_layers": 3},
            {"pipeline_parallel_size": 2},
            ["pipeline_parallel_size=2", "num_hidden_layers=3"],
        ),
        (
            {"residual": "pre_norm", "embedding_norm": False},
            {"tensor_parallel_size": 3},
            ["tensor_parallel_size=3", "num_attention_heads=4"],
        ),
    ],
)
def test_a_model_that_megatron_does_not_have_is_refused_by_its_keys(
    changes: dict[str, Any], layout: dict[str, int], parts: list[str], tmp_path: Path
) -> None:
    reader = written(tmp_path / "source", **changes)
    with pytest.raises(ConfigError) as refused:
        export_megatron(reader, tmp_path / "out", ParallelConfig(**layout), "float32", Alone())
    assert all(part in str(refused.value) for part in parts)
    assert not (tmp_path / "out").exists()


def test_bf16_is_rounded_as_torch_rounds_and_read_again(imported: dict[str, CheckpointReader], tmp_path: Path) -> None:
    reader = imported["bert"]
    export_megatron(reader, tmp_path / "bf16", ParallelConfig(tensor_parallel_size=2), "bfloat16", Alone())
    files = files_of(tmp_path / "bf16")
    assert files.keys() == {"mp_rank_00", "mp_rank_01"} and files["mp_rank_00"]["args"].bf16
    parts = [content["model"]["encoder.layers.1.mlp.linear_fc2.weight"] for content in files.values()]
    expected = torch.from_numpy(reader.read("layers.1.mlp.down_weight", "weight")).bfloat16()
    assert torch.equal(torch.cat(parts, dim=1), expected)
    again = MegatronSource(tmp_path / "bf16")
    for name, spec in again.specs.items():
        region = tuple((0, size) for size in spec.shape)
        rounded = torch.from_numpy(reader.read(name, "weight")).bfloat16().float()
        assert torch.equal(torch.from_numpy(again.box(name, "weight", region)), rounded), name
