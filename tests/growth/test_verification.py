"""``megacore verify --against`` after a growth: honest figures, limits that rounding explains, a record of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner, Result

from launcher.cli import app
from megacore.checkpoint.load import load_model
from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Alone
from megacore.config import ParallelConfig
from megacore.convert.reshard import reshard
from megacore.growth.proof import stored_tolerance
from megacore.growth.tolerance import tolerance
from megacore.growth.verify import random_batch
from tests.growth.small import EVEN, FAMILIES, family, grow, save, trained_model
from tests.models import model_config, write_instances

DOUBLE = {"hidden_size": 48, "num_attention_heads": 8, "intermediate_size": 80}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "bert"
    save(*trained_model(family("bert")), path, parts=2)
    return path


def megacore(*words: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, words)))


def test_a_larger_vocabulary_is_compared_on_the_old_tokens(small: Path, tmp_path: Path) -> None:
    grow(small, tmp_path / "large", {"vocab_size": 128, "max_position_embeddings": 40, "hidden_size": 48}, parts=4)
    data = write_instances(tmp_path / "data")  # of the small vocabulary
    for more in ((), ("--data", data)):
        figures = tmp_path / "figures.json"
        words = ("verify", tmp_path / "large", "--against", small, "--dtype", "fp64", "--json", figures, *more)
        result = megacore(*words)
        assert result.exit_code == 0, result.output
        assert "if only the old tokens could be predicted" in result.output
    # The losses by torch alone, on the same random tokens.
    megacore(*words[:-2])
    found = json.loads(figures.read_text())
    models = [load_model(CheckpointReader(path), torch.float64) for path in (small, tmp_path / "large")]
    batch = random_batch(models[0].config)
    with torch.no_grad():
        (before, pairs), (after, more_pairs) = (model(batch) for model in models)
    assert batch.pair_labels is not None and after.shape[1] == 128
    pair_loss, more_pair_loss = (cross_entropy(p, batch.pair_labels) for p in (pairs, more_pairs))
    assert found["loss_before"] == pytest.approx(float(cross_entropy(before, batch.labels) + pair_loss), rel=1e-12)
    assert found["loss_after"] == pytest.approx(float(cross_entropy(after, batch.labels) + more_pair_loss), rel=1e-12)
    old = cross_entropy(after[:, :101], batch.labels) + more_pair_loss
    assert found["loss_after_old_tokens"] == pytest.approx(float(old), rel=1e-12)
    assert found["loss_after"] > found["loss_before"] + 1e-3
    assert found["mlm_relative_error"] <= 1e-12


def test_a_smaller_vocabulary_cannot_be_compared(small: Path, tmp_path: Path) -> None:
    grow(small, tmp_path / "large", {"vocab_size": 128})
    error = megacore("verify", small, "--against", tmp_path / "large").exception
    assert "vocab_size is 128 in one and 101 in the other" in str(error)


def test_the_record_of_a_comparison_is_part_of_the_lineage(small: Path, tmp_path: Path) -> None:
    grow(small, tmp_path / "large", DOUBLE)
    before = CheckpointReader(tmp_path / "large").manifest
    assert megacore("verify", tmp_path / "large", "--against", small, "--dtype", "fp64").exit_code == 0
    assert CheckpointReader(tmp_path / "large").manifest == before  # not asked for
    for more, passed in (((), True), (("--tolerance", "0"), False)):
        words = ("verify", tmp_path / "large", "--against", small, "--dtype", "fp64", "--record", *more)
        assert megacore(*words).exit_code == (0 if passed else 1)
        after = CheckpointReader(tmp_path / "large").manifest  # its seal is right
        assert after.model_copy(update={"lineage": before.lineage}) == before
        event = after.lineage[-1]
        assert (event["event"], event["passed"], event["dtype"]) == ("verify", passed, "float64")
        assert 0 < event["mlm_relative_error"] <= 1e-12
    assert {file.suffix for file in (tmp_path / "large").iterdir()} == {".json", ".safetensors"}
    shown = " ".join(megacore("inspect", tmp_path / "large").output.split())
    assert "the same function as bert in float64" in shown and "NOT the same function as bert" in shown
    error = megacore("verify", small, "--record").exception
    assert "--record" in str(error) and "--against" in str(error)


def test_a_hugging_face_directory_is_taken_for_the_source(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=101, n_embd=24, n_layer=2, n_head=4, n_positions=64)
    hf.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    assert megacore("grow", tmp_path / "hf", tmp_path / "large", "hidden_size=48", "--verify", "never").exit_code == 0
    result = megacore("verify", tmp_path / "large", "--against", tmp_path / "hf")
    assert result.exit_code == 0 and "(LM)" in result.output


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "roformer v2"])
def test_bfloat16_weights_pass_in_each_arithmetic(name: str, tmp_path: Path) -> None:
    """With noise, which is rounded, within what that allows; without, exactly."""
    save(*trained_model(family(name)), tmp_path / "small", parts=1)
    reshard(CheckpointReader(tmp_path / "small"), tmp_path / "bf16", ParallelConfig(), Alone(), True, "bfloat16")
    grow(tmp_path / "bf16", tmp_path / "large", DOUBLE)
    for dtype in ("fp32", "fp64", "bf16"):
        result = megacore("verify", tmp_path / "large", "--against", tmp_path / "bf16", "--dtype", dtype)
        assert result.exit_code == 0, result.output
    exact = grow(tmp_path / "bf16", tmp_path / "even", DOUBLE, symmetry=EVEN)
    words = ("verify", exact.path, "--against", tmp_path / "bf16", "--dtype", "fp64", "--tolerance", "1e-12")
    assert megacore(*words).exit_code == 0  # halves are bfloat16 numbers


def test_tolerances_follow_the_types(small: Path, tmp_path: Path) -> None:
    two, deep = model_config(), model_config(num_hidden_layers=32)
    assert tolerance("float32", two, None) == tolerance("float32", two, "float32") == 1e-5
    assert tolerance("float64", two, None) == 1e-12
    assert 1e-8 < tolerance("float64", two, "float32") < 1e-5
    assert 1e-2 < tolerance("float64", two, "bfloat16") < tolerance("float64", deep, "bfloat16") < 0.2
    assert tolerance("bfloat16", two, None) > tolerance("float32", two, "bfloat16")
    experts = model_config(**{**FAMILIES["llama"], "num_experts": 2})
    assert tolerance("float64", experts, None) == 1e-6
    fp32 = tmp_path / "fp32"
    reshard(CheckpointReader(small), fp32, ParallelConfig(), Alone(), True, "float32")
    readers = CheckpointReader(small), CheckpointReader(fp32)
    assert stored_tolerance("float64", readers[0], readers[0]) == 1e-12
    assert stored_tolerance("float64", *readers) == tolerance("float64", two, "float32")


def test_ranks_share_the_models_and_find_the_same(small: Path, tmp_path: Path) -> None:
    """Tensor parallel over two processes, with a vocabulary that they cannot share evenly."""
    sizes = {"vocab_size": 127, "hidden_size": 36, "intermediate_size": 66, "num_hidden_layers": 3}
    grow(small, tmp_path / "large", sizes, parts=2)
    words = ["verify", str(tmp_path / "large"), "--against", str(small), "--dtype", "fp64", "--json"]
    assert megacore(*words, tmp_path / "one.json").exit_code == 0
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "launcher"]
    done = subprocess.run([*start, *words, str(tmp_path / "two.json")], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("every checksum right") == 1
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    for key in ("loss_before", "loss_after", "loss_after_old_tokens"):
        assert two[key] == pytest.approx(one[key], rel=1e-12)
    assert max(two["mlm_relative_error"], two["nsp_relative_error"]) <= 1e-12
