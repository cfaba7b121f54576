"""Megatron-DeepSpeed's models: what DeepSpeed's engine saves of them is read bit for bit, and computes the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacore.checkpoint.load import load_model
from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Alone
from megacore.config import ParallelConfig
from megacore.convert.deepspeed import DeepSpeedSource
from megacore.convert.imports import import_checkpoint
from megacore.models.batch import ModelBatch
from tests.convert.megatron_deepspeed_models import CASES, PADDED, POSITIONS, STEPS, VOCABULARY, settings, train_all
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
    tokens = torch.stack([TOKENS.flatten(), torch.zeros(count * length).long(), torch.arange(length).repeat(count)])
    sequences = torch.tensor([[length] * count, [0] * count, list(range(count))])
    batch = ModelBatch(tokens, sequences, torch.arange(count * length), TOKENS.flatten(), torch.zeros(count).long())
    with torch.no_grad():
        logits = load_model(reader, torch.float32)(batch)[0]
    theirs = next(rank["logits"] for rank in ranks[::-1] if rank["logits"] is not None)
    expected = theirs[..., :VOCABULARY].flatten(0, 1)
    assert float((logits - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_what_deepspeeds_own_tool_makes_of_them_is_read_bit_for_bit(
    name: str, trained: tuple[Path, dict[str, list[dict[str, Any]]]], tmp_path: Path
) -> None:
    source, universal = trained[0] / name / f"global_step{STEPS}", tmp_path / "universal"
    tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    run([*tool, "--input_folder", str(source), "--output_folder", str(universal), *workers])
    assert_same(imported(universal, tmp_path / "imported"), name, trained[1][name])
