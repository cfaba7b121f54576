"""Megatron in and out: the real megatron-core loads what is written, and computes what megacore computes."""

from __future__ import annotations

import importlib.util
import io
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
from tests.convert.megatron_models import CASES, PADDED, VOCABULARY, load_all, save_all
from tests.convert.test_convert_command import run
from tests.models import model_config, whole_model
from tests.ranks import run_ranks

if importlib.util.find_spec("megatron") is None:  # not imported here: it adds to the classes that torch.load takes
    pytest.skip("megatron-core is not installed", allow_module_level=True)

TWO_BY_TWO = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2)
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (3, 17)))
SEGMENTS = torch.from_numpy(np.random.default_rng(1).integers(0, 2, (3, 17)))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Megatron's checkpoints at TP 2 × PP 2; of each rank, what its models compute, its optimizer's state, names."""
    folder = tmp_path_factory.mktemp("megatron")
    return folder, run_ranks(save_all, 4, folder, TOKENS, SEGMENTS, timeout=240)


@pytest.fixture(scope="module")
def saved(ranks: tuple[Path, list[Any]]) -> tuple[Path, dict[str, list[torch.Tensor]]]:
    """The checkpoints of each case, and what Megatron computes."""
    return ranks[0], ranks[1][-1][0]


@pytest.fixture(scope="module")
def imported(saved: tuple[Path, dict[str, list[torch.Tensor]]]) -> dict[str, CheckpointReader]:
    readers = {}
    for name in CASES:
        target, parallel = saved[0] / "imported" / name, ParallelConfig(tensor_parallel_size=2)
        import_checkpoint(lambda name=name: MegatronSource(saved[0] / name), target, parallel, Alone())  # type: ignore[misc]
        readers[name] = CheckpointReader(target)
    return readers


@pytest.fixture(scope="module")
def trained(ranks: tuple[Path, list[Any]]) -> tuple[Path, list[dict[str, Any]]]:
    """Checkpoints with the optimizer's state, and that state as each rank holds it."""
    return ranks[0] / "trained", [held for _, held, _ in ranks[1]]


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
            assert "--no-load-optim" in said and "megacore → megatron" in said
        else:
            export_megatron(
                imported[name], tmp_path / name, ParallelConfig(pipeline_parallel_size=2), "float32", Alone()
            )
    computed = run_ranks(load_all, 2, tmp_path, list(CASES), 1, 2, TOKENS, SEGMENTS, timeout=240)[-1]
    for name, logits in saved[1].items():
        for mine, theirs in zip(computed[name], logits, strict=True):
            mine, theirs = mine[..., :VOCABULARY], theirs[..., :VOCABULARY]
            assert float((mine - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_adam_s_state_and_fp32_weights_come_along(
    kind: str, trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """``trained`` gives each rank's state: tensor-parallel ranks 0 and 1 of stage 0, then of stage 1."""
    folder, ranks = trained
    said = run(megacore_command("convert", folder / kind, tmp_path / "imported"))
    assert "megatron → megacore" in said and "optimizer" not in said
    reader = CheckpointReader(tmp_path / "imported")
    assert reader.manifest.states == ("weight", "exp_avg", "exp_avg_sq")
    assert reader.manifest.progress.optimizer_step == 2
    for state in reader.manifest.states:

        def whole(stage: int, name: str, dim: int, state: str = state) -> Any:
            parts = [ranks[2 * stage + rank][kind][name][state] for rank in (0, 1)]
            return torch.cat(parts, dim).numpy()

        expected = {
            "embeddings.word": whole(0, "embedding.word_embeddings.weight", 0)[:VOCABULARY],
            "layers.1.mlp.down_weight": whole(0, "decoder.layers.1.mlp.linear_fc2.weight", 1),
            "layers.3.mlp.up_bias": whole(1, "decoder.layers.1.mlp.linear_fc1.bias", 0),
            "layers.2.attention_residual.norm.bias": ranks[2][kind]["decoder.layers.0.input_layernorm.bias"][state],
        }
        qkv = whole(1, "decoder.layers.1.self_attention.linear_qkv.weight", 0).reshape(8, 3, 4, 32)
        expected["layers.3.attention.query_weight"] = qkv[:, 0]
        expected["layers.3.attention.key_value_weight"] = qkv[:, 1:].swapaxes(0, 1)
        for name, values in expected.items():
            assert np.array_equal(reader.read(name, state), values), (name, state)


def test_an_optimizer_that_is_not_read_is_left_out_by_name(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    source = rewritten(trained[0] / "fp32", tmp_path)
    for file in source.glob("*/*.pt"):
        content = torch.load(file, weights_only=False)
        content["optimizer"]["state"] = {}  # the distributed optimizer keeps it in files of its own
        torch.save(content, file)
    said = run(megacore_command("convert", source, tmp_path / "imported"))
    assert "left out" in said and "the optimizer's state (the distributed optimizer's)" in said
    manifest = CheckpointReader(tmp_path / "imported").manifest
    assert manifest.states == ("weight",) and manifest.progress.optimizer_step == 0
    assert any("optimizer" in what for what in manifest.lineage[0]["left_out"])
    swapped = rewritten(trained[0] / "bf16", tmp_path / "swapped")
    for file in swapped.glob("*/*.pt"):
        content = torch.load(file, weights_only=False)
        weights = content["optimizer"]["fp32_from_fp16_params"][0]
        first, second = (place for place, weight in enumerate(weights) if weight.shape == (32, 24))
        weights[first], weights[second] = weights[second], weights[first]
        torch.save(content, file)
    assert any("not of these parameters" in what for what in MegatronSource(swapped).left_out)
    run(megacore_command("convert", trained[0] / "bf16", tmp_path / "weights", "--weights-only"))
    assert CheckpointReader(tmp_path / "weights").manifest.states == ("weight",)


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


def test_transformer_engine_s_names_of_norms_are_read(
    ranks: tuple[Path, list[Any]],
    saved: tuple[Path, Any],
    imported: dict[str, CheckpointReader],
    tmp_path: Path,
) -> None:
    named = ranks[1][0][2]
    source = rewritten(saved[0] / "bert", tmp_path)
    for file in source.glob("*/*.pt"):
        content = torch.load(file, weights_only=False)
        model = {}
        for key, value in content["model"].items():
            for local, engine in named.items():
                key = key.replace(local, engine)
            model[key] = value
        extra = {"encoder.layers.0.self_attention.linear_qkv._extra_state": io.BytesIO(b"scales")}
        torch.save(content | {"model": model | extra}, file)
    again = MegatronSource(source)
    for name in ("layers.2.attention_residual.norm.weight", "layers.3.mlp_residual.norm.bias"):
        assert np.array_equal(again.box(name, "weight", ((0, 32),)), imported["bert"].read(name, "weight"))


def test_weights_of_no_iteration_are_a_release(tmp_path: Path) -> None:
    gpt = {"architecture": "decoder", "type_vocab_size": 0, "lm_transform": False, "lm_bias": False}
    reader = written(tmp_path / "source", residual="pre_norm", embedding_norm=False, **gpt)
    export_megatron(reader, tmp_path / "out", ParallelConfig(tensor_parallel_size=4), "float32", Alone())
    assert (tmp_path / "out" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert sorted(path.name for path in (tmp_path / "out" / "release").iterdir()) == [f"mp_rank_0{n}" for n in range(4)]
    source = MegatronSource(tmp_path / "out")
    assert source.manifest.model.num_hidden_layers == 2 and source.manifest.progress.step == 0
    box = source.box("layers.1.mlp.up_weight", "weight", ((7, 33), (0, 24)))
    assert np.array_equal(box, reader.read("layers.1.mlp.up_weight", "weight", ((7, 33), (0, 24))))


def test_what_is_not_exact_is_said(saved: tuple[Path, Any], tmp_path: Path) -> None:
    source = rewritten(saved[0] / "bert", tmp_path, bias_gelu_fusion=True)
    assert any("exact gelu" in what for what in MegatronSource(source).left_out)


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
