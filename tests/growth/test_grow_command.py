"""``megacore grow`` as a user runs it: what it takes, what it says, and that nothing wrong is ever published."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
import yaml
from typer.testing import CliRunner

from launcher.cli import app, main
from launcher.start import mpi_command
from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Alone
from megacore.config import ParallelConfig
from megacore.convert.reshard import reshard
from megacore.errors import MegacoreError
from megacore.growth.plan import GrowthPlan, Rule
from megacore.specs import ParamSpec
from tests.growth.small import LLAMA, family, save, trained_model
from tests.models import MODEL, model_config

DOUBLE = ("hidden_size=48", "num_attention_heads=8", "intermediate_size=80")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BERT, saved at tensor parallel size 2, in float64."""
    path = tmp_path_factory.mktemp("small") / "bert"
    save(*trained_model(family("bert")), path, parts=2)
    return path


def cast(source: Path, target: Path, dtype: str, weights_only: bool = True) -> Path:
    reshard(CheckpointReader(source), target, ParallelConfig(), Alone(), weights_only, dtype)
    return target


def grow(*words: str | Path) -> str:
    """Run the command; raise its error."""
    result = CliRunner().invoke(app, ["grow", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def digests(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_growth_says_what_it_did_and_proves_it(small: Path, tmp_path: Path) -> None:
    said = grow(small, tmp_path / "large", *DOUBLE, "--json", tmp_path / "figures.json")
    assert "hidden_size 24 → 48" in said and "13,647 → " in said
    assert "function: exact but for rounding to float64" in said
    assert "optimizer: exact but for" in said and "noise" in said and "uneven shares" in said
    assert "tolerance 1e-12" in said and "MB read" in said
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["verification"]["mlm_relative_error"] <= 1e-12
    reader = CheckpointReader(tmp_path / "large")
    event, proof = reader.manifest.lineage
    assert event["to"]["hidden_size"] == 48 and any("noise" in reason for reason in event["not_exact"])
    assert proof["event"] == "verify" and proof["passed"] and proof["dtype"] == "float64"
    assert proof["against"] == {"name": "bert", "sha256": CheckpointReader(small).manifest.digest}
    # Written out of the checkpoint's own entries, by hand: with even copies, columns that read the stream are halved.
    grow(small, tmp_path / "even", *DOUBLE, "--symmetry", "none")
    name = "layers.0.mlp.up_weight"
    a, b = (CheckpointReader(path).read(name, "weight") for path in (small, tmp_path / "even"))
    assert (b == a.repeat(2, axis=0).repeat(2, axis=1) / 2).all()


def test_a_wrong_rule_is_never_published(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = GrowthPlan._rule

    def wrong(self: GrowthPlan, name: str, spec: ParamSpec) -> Rule:
        rule = right(self, name, spec)
        return rule if name != "layers.1.mlp.down_weight" else Rule(rule.source, rule.dims, factor=1.5)

    sources = [small, cast(small, tmp_path / "fp32", "float32"), cast(small, tmp_path / "bf16", "bfloat16")]
    monkeypatch.setattr(GrowthPlan, "_rule", wrong)
    (tmp_path / "out").mkdir()
    for source in sources:
        with pytest.raises(MegacoreError, match=r"not the same function.*nothing was written"):
            grow(source, tmp_path / "out" / "large", *DOUBLE)
        assert list((tmp_path / "out").iterdir()) == []
    said = grow(small, tmp_path / "out" / "large", *DOUBLE, "--verify", "never")
    assert "not compared with the source: --verify never" in said
    assert [event["event"] for event in CheckpointReader(tmp_path / "out" / "large").manifest.lineage] == ["grow"]


def test_models_that_are_too_large_are_not_compared_and_that_is_said(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megacore.growth.proof.available_memory", lambda: 500_000)
    assert "not compared with the source: both models take" in grow(small, tmp_path / "a", *DOUBLE)
    assert "compared with the source in float64" in grow(small, tmp_path / "b", *DOUBLE, "--verify", "always")
    monkeypatch.setattr("megacore.growth.proof._MAX_PARAMETERS", 1000)
    assert "parameters, more than 1,000" in grow(small, tmp_path / "c", *DOUBLE)


def test_a_dry_run_writes_nothing_and_names_what_is_not_exact(small: Path, tmp_path: Path) -> None:
    words = (small, tmp_path / "large", "hidden_size=48", "vocab_size=128", "num_hidden_layers=4", "--dry-run")
    said = grow(*words)
    assert list(tmp_path.iterdir()) == []
    lines = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert "vocab 101→128: 27 new" in lines["embeddings.word"] and "new rows" in lines["embeddings.word"]
    assert "hidden 24→48: shared ×0.5 + noise" in lines["layers.0,2.attention.query_weight"]  # layers that are alike
    assert "0 everywhere: the layer adds nothing" in lines["layers.1,3.mlp.down_weight"]
    assert "new layer" in lines["layers.1,3.mlp.down_weight"]
    for words_of_it in (
        "function, new tokens: the 101 old tokens keep their logits",
        "training, dropout",
        "reads 0.",
        "memory of a rank",
        "nothing was written",
    ):
        assert words_of_it in said
    # float64 weights and two moments of each entry of the grown model
    entries = 128 * 48 + 34 * 48 + 2 * 48 + 4 * (48 * 24 * 4 + 24 * 3 + 48 + 4 * 48 + 2 * 48 * 40 + 40 + 48)
    entries += 48 * 48 + 48 + 2 * 48 + 2 + 48 * 48 + 48 + 128 + 2 * 48
    assert f"→ {entries:,} parameters" in said and f"writes {entries * 24 / 1e6:.1f} MB" in said


def test_smaller_key_groups_and_uneven_ratios_are_named(tmp_path: Path) -> None:
    save(*trained_model(model_config(**LLAMA)), tmp_path / "llama", parts=1)
    words = ("hidden_size=36", "num_key_value_heads=4", "num_experts=2", "--symmetry", "none", "--dry-run")
    said = grow(tmp_path / "llama", tmp_path / "large", *words)
    for name in ("smaller key groups", "uneven copies", "experts share tokens", "gates in float32", "new router"):
        assert f"{name}: " in said
    even = grow(tmp_path / "llama", tmp_path / "large", "hidden_size=48", "--symmetry", "none", "--dry-run")
    assert "optimizer: exact\n" in even and "function: exact\n" in even


def test_a_configuration_file_is_the_same_as_its_keys(small: Path, tmp_path: Path) -> None:
    model = MODEL | {"hidden_size": 48, "num_attention_heads": 8, "intermediate_size": 80, "num_hidden_layers": 3}
    parallel = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2, "sequence_parallel": True}
    config = tmp_path / "large.yaml"
    config.write_text(yaml.safe_dump({"model": model | {"hidden_dropout": 0.0}, "parallel": parallel}))
    layout = ("tensor_parallel_size=4", "pipeline_parallel_size=2")
    grow(small, tmp_path / "keys", *DOUBLE, "num_hidden_layers=3", *layout)
    grow(small, tmp_path / "file", "--to", config)
    grow(small, tmp_path / "both", "--to", config, "num_hidden_layers=2")
    assert digests(tmp_path / "file") == digests(tmp_path / "keys")
    assert CheckpointReader(tmp_path / "both").manifest.model.num_hidden_layers == 2
    names = {f"pp{stage:02d}-tp{rank:02d}-0000.safetensors" for stage in range(2) for rank in range(4)}
    assert {file.name for file in (tmp_path / "file").iterdir()} == {"manifest.json", *names}
    reader = CheckpointReader(tmp_path / "file")
    assert {holder.split("-")[0] for holder in reader._files_of("layers.2.mlp.up_weight")} == {"pp01"}
    reader.check_coverage()


def test_two_ranks_write_the_same_bytes_as_one(small: Path, tmp_path: Path) -> None:
    words = ("grow", small, tmp_path / "two", *DOUBLE)
    said = subprocess.run(mpi_command(2, *words), check=True, capture_output=True, text=True, timeout=200).stdout
    assert "by 2 ranks" in said and said.count("compared with the source in float64") == 1
    grow(small, tmp_path / "one", *DOUBLE)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_hugging_face_directory_grows_as_if_it_had_been_converted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=101, intermediate_size=40, num_key_value_heads=2, **sizes)
    hf.LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    assert CliRunner().invoke(app, ["convert", str(tmp_path / "hf"), str(tmp_path / "converted")]).exit_code == 0
    said = grow(tmp_path / "hf", tmp_path / "direct", *DOUBLE, "num_key_value_heads=4")
    assert "optimizer: starts anew" in said
    grow(tmp_path / "converted", tmp_path / "indirect", *DOUBLE, "num_key_value_heads=4")
    direct, indirect = (digests(tmp_path / name) for name in ("direct", "indirect"))
    assert {name for name in direct if direct[name] != indirect[name]} == {"manifest.json"}
    assert direct.keys() == indirect.keys() >= {"huggingface/tokenizer.json"}
    first, second = (CheckpointReader(tmp_path / name).manifest for name in ("direct", "indirect"))
    assert first.files == second.files and first.progress == second.progress
    assert [event["event"] for event in first.lineage] == ["import", "grow", "verify"]
    assert first.lineage[0] == second.lineage[0]


def test_types_are_the_sources_unless_asked_for(small: Path, tmp_path: Path) -> None:
    bf16 = cast(small, tmp_path / "bf16", "bfloat16")
    said = grow(bf16, tmp_path / "kept", *DOUBLE)
    assert CheckpointReader(tmp_path / "kept").dtype("embeddings.word", "weight") == "bfloat16"
    assert "rounding to bfloat16" in said and "compared with the source in float32" in said
    # Halves are no rounding: then even bfloat16 weights must agree as closely as float32 arithmetic does.
    assert "tolerance 1e-05" in grow(bf16, tmp_path / "even", *DOUBLE, "--symmetry", "none")
    assert "tolerance 1e-05" in grow(bf16, tmp_path / "parts", "intermediate_size=67", "--symmetry", "uneven")
    grow(small, tmp_path / "mixed", *DOUBLE, "--dtype", "bf16")
    mixed = CheckpointReader(tmp_path / "mixed")
    assert [mixed.dtype("embeddings.word", state) for state in mixed.states] == ["bfloat16", "float64", "float64"]
    grow(small, tmp_path / "reset", *DOUBLE, "--dtype", "fp32", "--optimizer", "reset")
    reset = CheckpointReader(tmp_path / "reset")
    assert reset.states == ("weight",) and reset.dtype("embeddings.word", "weight") == "float32"


def test_symmetry_chooses_what_makes_copies_differ(small: Path, tmp_path: Path) -> None:
    kinds = {"noise": (0.2, 0.1), "uneven": (0.0, 0.1), "none": (0.0, 0.0)}
    for kind, scales in kinds.items():
        share = () if kind == "none" else ("--share-scale", "0.1")
        grow(small, tmp_path / kind, *DOUBLE, "--symmetry", kind, *share, "--verify", "never")
        event = CheckpointReader(tmp_path / kind).manifest.lineage[0]
        assert (event["noise_scale"], event["share_scale"]) == scales


def test_noise_that_outgrows_the_weights_is_refused(small: Path, tmp_path: Path) -> None:
    for scale in ("1.1", "inf"):
        words = ["grow", small, tmp_path / "large", *DOUBLE, "--noise-scale", scale, "--verify", "never"]
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 2 and "--noise-scale" in result.output
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_no_memory_holds_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def allocate() -> None:
        raise MemoryError("Unable to allocate 14.9 GiB")

    monkeypatch.setattr("launcher.cli.app", allocate)
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: not enough memory: Unable to allocate 14.9 GiB\n"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["nothing to grow", "--to"]),
        (["hidden_size=48", "--symmetry", "odd"], ["--symmetry odd", "noise, uneven or none"]),
        (["hidden_size=48", "--symmetry", "uneven", "--noise-scale", "0.1"], ["--noise-scale 0.1", "uneven"]),
        (["hidden_size=48", "--symmetry", "none", "--share-scale", "0.1"], ["--share-scale 0.1", "none"]),
        (["hidden_size=48", "--dtype", "float32"], ["--dtype float32", "fp32, bf16 or fp64"]),
        (["hidden_size=48", "--verify", "maybe"], ["--verify maybe", "auto, always or never"]),
        (["hidden_size=48", "--dry-run", "--json", "x"], ["--json x", "--dry-run"]),
        (["hidden_size=48", "pipeline_parallel_size=3"], ["pipeline_parallel_size=3", "2 layers"]),
        (["num_experts=4"], ["tensor_parallel_size=2", "num_experts", "set tensor_parallel_size=1"]),
        (["--to", "missing.yaml"], ["missing.yaml", "no such configuration file"]),
    ],
)
def test_what_cannot_be_is_one_line(small: Path, tmp_path: Path, words: list[str], parts: list[str]) -> None:
    with pytest.raises(MegacoreError) as error:
        grow(small, tmp_path / "large", *words)
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_other_formats_are_sent_to_convert(tmp_path: Path) -> None:
    (tmp_path / "deepspeed").mkdir()
    with pytest.raises(MegacoreError, match=r"deepspeed: neither a checkpoint.*megacore convert"):
        grow(tmp_path / "deepspeed", tmp_path / "large", *DOUBLE)
    with pytest.raises(MegacoreError, match="no such directory"):
        grow(tmp_path / "nowhere", tmp_path / "large", *DOUBLE)


def test_a_configuration_of_another_function_is_refused(small: Path, tmp_path: Path) -> None:
    config = tmp_path / "other.yaml"
    config.write_text(yaml.safe_dump({"model": MODEL | {"hidden_size": 48, "activation": "relu"}}))
    with pytest.raises(MegacoreError, match="activation cannot be changed by growing"):
        grow(small, tmp_path / "large", "--to", config)
    config.write_text(yaml.safe_dump({"model": MODEL | {"hidden_size": 48, "head_dim": 6, "architecture": "decoder"}}))
    with pytest.raises(MegacoreError, match=r"architecture cannot be changed by growing \(from encoder to decoder\)"):
        grow(small, tmp_path / "large", "--to", config)
    config.write_text(yaml.safe_dump({"parallell": {}, "model": MODEL}))
    with pytest.raises(MegacoreError, match="unknown key 'parallell'; did you mean parallel"):
        grow(small, tmp_path / "large", "--to", config)
    config.write_text(yaml.safe_dump({"parallel": {"tensor_paralel_size": 2}, "model": MODEL}))
    with pytest.raises(MegacoreError, match=r"other\.yaml: .*tensor_paralel_size"):
        grow(small, tmp_path / "large", "--to", config)
    # A run that does not name the positions has 512 of them, and would refuse a checkpoint with as many as the source.
    few = {key: value for key, value in MODEL.items() if key != "max_position_embeddings"}
    config.write_text(yaml.safe_dump({"model": few | {"residual": "pre_norm"}}))
    with pytest.raises(MegacoreError, match="residual cannot be changed"):
        grow(small, tmp_path / "large", "--to", config)
    config.write_text(yaml.safe_dump({"model": few}))
    assert "max_position_embeddings 32 → 512" in grow(small, tmp_path / "longer", "--to", config)
    config.write_text(yaml.safe_dump({"model": [1]}))
    with pytest.raises(MegacoreError, match=r"other\.yaml: model and parallel must be sections"):
        grow(small, tmp_path / "large", "--to", config)
