"""Megatron-DeepSpeed's models: what DeepSpeed's engine saves of them is read bit for bit, and computes the same."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.start import megacore_command, mpi_command
from megacore.checkpoint.load import load_model
from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Alone
from megacore.config import ParallelConfig
from megacore.convert.deepspeed import DeepSpeedSource
from megacore.convert.imports import import_checkpoint
from megacore.errors import ConfigError, MegacoreError
from megacore.models.batch import ModelBatch
from tests.convert.megatron_deepspeed_models import PADDED, POSITIONS, VOCABULARY, segments_of
from tests.convert.megatron_deepspeed_runs import CASES, STEPS, settings, train_all
from tests.convert.test_convert_command import run
from tests.ranks import run_ranks

TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (2, POSITIONS)))
STATES = ("weight", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The checkpoints, and by case what each rank holds and computes."""
    folder = tmp_path_factory.mktemp("megatron-deepspeed")
    ranks = run_ranks(train_all, 4, folder, list(CASES), TOKENS, timeout=280)
    return folder, {name: [rank[name] for rank in ranks] for name in CASES}


def parameters(name: str, ranks: list[dict[str, Any]], state: str) -> dict[str, torch.Tensor]:
    """Put megacore's parameters together from what the tensor-parallel ranks hold."""
    args = settings(**CASES[name][0])
    held: dict[str, list[torch.Tensor]] = {}
    for rank in sorted(ranks, key=lambda rank: rank["place"]):
        if rank["place"][2] == 0:
            for theirs, states in rank["states"].items():
                held.setdefault(theirs, []).append(states[state])
    parts = CASES[name][1].get("tensor_parallel_size", 1)
    held = {theirs: values[:parts] for theirs, values in held.items()}  # of tied ones the first stage's
    heads, size, groups = args.num_attention_heads, args.kv_channels, args.num_key_value_heads
    found = {"embeddings.word": torch.cat(held["language_model.embedding.word_embeddings.weight"])[:VOCABULARY]}
    if args.add_position_embedding:
        found["embeddings.position"] = held["language_model.embedding.position_embeddings.weight"][0]
    if args.untie_embeddings_and_output_weights:
        found["lm_head.weight"] = torch.cat(held["language_model.output_layer.weight"])[:VOCABULARY]
    if args.bert:
        names = {
            "embeddings.segment": "language_model.embedding.tokentype_embeddings.weight",
            **{f"lm_head.transform_{kind}": f"lm_head.dense.{kind}" for kind in ("weight", "bias")},
            **{f"lm_head.norm.{kind}": f"lm_head.layernorm.{kind}" for kind in ("weight", "bias")},
            **{f"nsp_head.pooler_{kind}": f"language_model.pooler.dense.{kind}" for kind in ("weight", "bias")},
            **{f"nsp_head.{kind}": f"binary_head.{kind}" for kind in ("weight", "bias")},
        }
        found |= {ours: held[theirs][0] for ours, theirs in names.items()}
        found["lm_head.bias"] = torch.cat(held["lm_head.bias"])[:VOCABULARY]
    kinds = ("weight", "bias") if args.add_bias_linear else ("weight",)
    norm_kinds = ("weight", "bias") if args.normalization == "layernorm" else ("weight",)
    for kind in norm_kinds:
        found[f"final_norm.{kind}"] = held[f"language_model.encoder.final_layernorm.{kind}"][0]
    for number in range(args.num_layers):
        theirs, ours = f"language_model.encoder.layers.{number}.", f"layers.{number}."
        for kind in norm_kinds:
            found[f"{ours}attention_residual.norm.{kind}"] = held[f"{theirs}input_layernorm.{kind}"][0]
            found[f"{ours}mlp_residual.norm.{kind}"] = held[f"{theirs}post_attention_layernorm.{kind}"][0]
        for kind in kinds:
            rest = (args.hidden_size,) if kind == "weight" else ()
            fused = held[f"{theirs}self_attention.query_key_value.{kind}"]
            if hasattr(args, "ds_sequence_parallel_fpdt"):
                thirds = [part.view(3, heads // parts, size, *rest) for part in fused]
                queries, keys, values = (torch.cat([third[n] for third in thirds]) for n in range(3))
            else:
                grouped = torch.cat([part.view(groups // parts, -1, size, *rest) for part in fused])
                queries = grouped[:, :-2].reshape(heads, size, *rest)
                keys, values = grouped[:, -2], grouped[:, -1]
            found[f"{ours}attention.query_{kind}"] = queries
            found[f"{ours}attention.key_value_{kind}"] = torch.stack((keys, values))
            up = held[f"{theirs}mlp.dense_h_to_4h.{kind}"]
            gates = [part.view(2, -1, *rest) for part in up] if args.swiglu else up
            found[f"{ours}mlp.up_{kind}"] = torch.cat(gates, dim=1 if args.swiglu else 0)
        output = torch.cat(held[f"{theirs}self_attention.dense.weight"], dim=1)
        found[f"{ours}attention.output_weight"] = output.view(-1, heads, size)
        found[f"{ours}mlp.down_weight"] = torch.cat(held[f"{theirs}mlp.dense_4h_to_h.weight"], dim=1)
        if args.add_bias_linear:
            found[f"{ours}attention.output_bias"] = held[f"{theirs}self_attention.dense.bias"][0]
            found[f"{ours}mlp.down_bias"] = held[f"{theirs}mlp.dense_4h_to_h.bias"][0]
    return found


def assert_same(reader: CheckpointReader, name: str, ranks: list[dict[str, Any]]) -> None:
    for state in STATES:
        expected = parameters(name, ranks, state)
        assert expected.keys() == reader.manifest.parameters.keys()
        for ours, values in expected.items():
            assert torch.equal(torch.from_numpy(reader.read(ours, state)), values), (ours, state)


def imported(source: Path, target: Path) -> CheckpointReader:
    parallel = ParallelConfig(tensor_parallel_size=4, pipeline_parallel_size=2)
    import_checkpoint(lambda: DeepSpeedSource(source), target, parallel, Alone())
    reader = CheckpointReader(target)
    reader.check_coverage()
    return reader


@pytest.mark.parametrize("name", CASES)
def test_native_checkpoints_are_read_bit_for_bit_and_compute_the_same(
    name: str, trained: tuple[Path, dict[str, list[dict[str, Any]]]], tmp_path: Path
) -> None:
    folder, ranks = trained[0], trained[1][name]
    reader = imported(folder / name, tmp_path / "imported")
    assert_same(reader, name, ranks)
    progress = reader.manifest.progress
    assert (progress.step, progress.optimizer_step) == (STEPS, STEPS)
    assert any(f"{PADDED - VOCABULARY} rows of padding" in what for what in DeepSpeedSource(folder / name).left_out)
    count, length = TOKENS.shape
    is_bert = reader.manifest.model.architecture == "encoder"
    segments = segments_of(TOKENS) if is_bert else torch.zeros_like(TOKENS)
    tokens = torch.stack([TOKENS.flatten(), segments.flatten(), torch.arange(length).repeat(count)])
    sequences = torch.tensor([[length] * count, [0] * count, list(range(count))])
    batch = ModelBatch(tokens, sequences, torch.arange(count * length), TOKENS.flatten(), torch.zeros(count).long())
    with torch.no_grad():
        outputs = load_model(reader, torch.float32)(batch)
    theirs = next(rank["outputs"] for rank in ranks[::-1] if rank["outputs"] is not None)
    words, *pairs = theirs if is_bert else (theirs,)
    for mine, expected in zip(outputs, [words[..., :VOCABULARY].flatten(0, 1), *pairs], strict=True):
        assert float((mine - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_what_deepspeeds_own_tool_makes_of_them_is_read_bit_for_bit(
    name: str, trained: tuple[Path, dict[str, list[dict[str, Any]]]], tmp_path: Path
) -> None:
    source, universal = trained[0] / name / f"global_step{STEPS}", tmp_path / "universal"
    tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    run([*tool, "--input_folder", str(source), "--output_folder", str(universal), *workers])
    assert_same(imported(universal, tmp_path / "imported"), name, trained[1][name])


def changed(source: Path, target: Path, **changes: Any) -> Path:
    """Copy a checkpoint with other settings; without any if there are none."""
    shutil.copytree(source, target)
    for file in target.glob("*/mp_rank_*_model_states.pt"):
        content = torch.load(file, weights_only=False)
        for key, value in changes.items():
            setattr(content["args"], key, value)
        if not changes:
            del content["args"]
        torch.save(content, file)
    return target


def test_the_command_reads_them_and_needs_a_configuration_only_where_there_are_no_settings(
    trained: tuple[Path, Any], tmp_path: Path
) -> None:
    source = trained[0] / "llama tp2 pp2"
    said = run(mpi_command(2, "convert", source, tmp_path / "first"))
    assert "deepspeed → megacore" in said and "6 rows of padding of tied_modules" not in said
    assert "6 rows of padding of 1.word_embeddings.weight, 6 rows of padding of 7.lm_head.weight" in said
    first = CheckpointReader(tmp_path / "first")
    bare = changed(source, tmp_path / "bare")
    with pytest.raises(ConfigError, match="--config"):
        DeepSpeedSource(bare)
    (tmp_path / "run.yaml").write_text(json.dumps({"model": first.manifest.model.model_dump(mode="json")}))
    run(megacore_command("convert", bare, tmp_path / "second", "--config", tmp_path / "run.yaml"))
    assert_same(CheckpointReader(tmp_path / "second"), "llama tp2 pp2", trained[1]["llama tp2 pp2"])


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("gpt tp2 dp2 zero1", {"num_layers": 3}, r"layers\.3\.\S* does not belong to the model"),
        ("gpt tp2 dp2 zero1", {"ffn_hidden_size": 64}, r"mp_rank_00_model_states\.pt: .*dense_h_to_4h.* has the shape"),
        ("gpt tp2 dp2 zero1", {"num_experts": [4]}, "num_experts"),
        ("gpt tp2 dp2 zero1", {"squared_relu": True}, "squared_relu"),
        ("llama tp2 dp2 zero1", {"normalization": "other"}, "normalization"),
        ("llama tp2 dp2 zero1", {"rotary_percent": 0.5}, "rotary_percent"),
        ("llama tp2 dp2 zero1", {"ds_sequence_parallel_fpdt": False}, "num_key_value_heads=4"),
    ],
)
def test_a_model_that_is_another_or_that_megacore_does_not_compute_is_refused_by_name(
    name: str, changes: dict[str, Any], named: str, trained: tuple[Path, Any], tmp_path: Path
) -> None:
    source = changed(trained[0] / name, tmp_path / "changed", **changes)
    with pytest.raises(MegacoreError, match=named):
        DeepSpeedSource(source)
