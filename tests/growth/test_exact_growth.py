"""What growth writes: the same bytes for any ranks and layouts, multipliers, copies that come apart."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from megacore.checkpoint.load import load_model
from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Alone, TorchRanks
from megacore.config import ParallelConfig
from megacore.convert.reshard import reshard
from megacore.growth.apply import Grower, exact_part
from megacore.growth.execute import GrowthOutput, grow_checkpoint
from megacore.growth.maps import centred, copied, query_heads, shared, weighted
from megacore.growth.plan import Symmetry, make_plan
from megacore.models.transformer import Transformer
from megacore.params import declared
from tests.growth.small import (
    EVEN,
    TRAINED_STEPS,
    adam_of,
    batch_of,
    family,
    grow,
    relative_errors,
    save,
    step,
    trained_model,
)
from tests.models import model_config
from tests.ranks import run_ranks

DOUBLE = {"hidden_size": 48, "num_attention_heads": 8, "intermediate_size": 80}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Transformer, torch.optim.AdamW]:
    """Train a small BERT for some steps in float64 and save it at tensor parallel size 2."""
    model, optimizer = trained_model(model_config())
    path = tmp_path_factory.mktemp("trained") / "small"
    save(model, optimizer, path, parts=2)
    return path, model, optimizer


@pytest.mark.parametrize("parts", [1, 4])
def test_the_function_is_kept_in_float32_and_at_any_layout(trained: Any, tmp_path: Path, parts: int) -> None:
    source, model, _ = trained
    large = load_model(grow(source, tmp_path / "large", DOUBLE, parts, dtype="float32"), torch.float32)
    small = load_model(CheckpointReader(source), torch.float32)
    assert {parameter.dtype for _, parameter in declared(large)} == {torch.float32}
    assert max(relative_errors(small, large, batch_of(model.config, 99))) <= 1e-5


def test_the_copies_separate_within_a_few_adam_steps(trained: Any, tmp_path: Path) -> None:
    source, _, _ = trained

    def ranks(symmetry: Symmetry, steps: int) -> dict[str, int]:
        name = f"{symmetry.noise_scale}-{symmetry.share_scale}-{steps}"
        large, optimizer = adam_of(grow(source, tmp_path / name, DOUBLE, symmetry=symmetry))
        for number in range(steps):
            step(large, optimizer, batch_of(large.config, 30 + number))
        named = {name: parameter.detach() for name, parameter in declared(large)}
        stream = named["embeddings.word"]  # its columns are the coordinates of the stream
        up, down = named["layers.0.mlp.up_weight"], named["layers.0.mlp.down_weight"]
        matrices = {"up": up, "down": down, "stream": stream}
        return {key: int(np.linalg.matrix_rank(value.numpy(), tol=1e-6)) for key, value in matrices.items()}

    locked = {"up": 24, "down": 24, "stream": 24}
    assert ranks(EVEN, 0) == locked
    assert ranks(EVEN, 5) == locked  # even copies learn the same for ever
    assert ranks(Symmetry(), 0)["stream"] == 24  # the writers are copies still
    assert ranks(Symmetry(), 5) == {"up": 48, "down": 48, "stream": 48}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def grow_in_parallel(source: str, targets: list[str]) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    reader = CheckpointReader(Path(source))
    for parts, target in enumerate(targets, start=1):
        plan = make_plan(reader.manifest.model, DOUBLE, Symmetry())
        output = GrowthOutput(ParallelConfig(tensor_parallel_size=2**parts // 2), max_file_bytes=20_000)
        grow_checkpoint(reader, plan, Path(target), output, TorchRanks())
    dist.destroy_process_group()


def test_the_bytes_do_not_depend_on_the_number_of_ranks(trained: Any, tmp_path: Path) -> None:
    source, _, _ = trained
    found = []
    for ranks in (1, 2, 4):
        targets = [str(tmp_path / f"{ranks}-{layout}") for layout in ("tp1", "tp2", "tp4")]
        run_ranks(grow_in_parallel, ranks, str(source), targets)
        found.append([digests(Path(target)) for target in targets])
    assert found[0] == found[1] == found[2]
    assert len(found[0][0]) > 4  # several files, so that there was work for all


def test_the_bytes_do_not_depend_on_the_sources_layout(trained: Any, tmp_path: Path) -> None:
    source, model, optimizer = trained
    save(model, optimizer, tmp_path / "whole", parts=1)
    first, second = (grow(path, tmp_path / f"from-{path.name}", DOUBLE, 2) for path in (source, tmp_path / "whole"))
    assert first.manifest.files == second.manifest.files


def test_multipliers_anneal_and_compound(trained: Any, tmp_path: Path) -> None:
    source, _, _ = trained
    once = grow(source, tmp_path / "once", DOUBLE, hold_steps=10, anneal_steps=20).manifest
    assert once.parameters["layers.0.mlp.up_weight"].learning_rate_multiplier == 0.5
    assert once.parameters["layers.0.mlp.up_weight"].adam_eps_multiplier == 0.5
    assert once.parameters["embeddings.word"].learning_rate_multiplier == 1.0
    assert once.parameters["lm_head.norm.weight"].learning_rate_multiplier == 0.5
    annealing = once.annealing
    now = TRAINED_STEPS
    exponents = [annealing.exponent(now + elapsed) for elapsed in (0, 10, 15, 20, 30, 99)]
    assert exponents == pytest.approx([1, 1, 0.75, 0.5, 0, 0])
    twice = grow(tmp_path / "once", tmp_path / "twice", {"intermediate_size": 160}).manifest
    assert twice.parameters["layers.0.mlp.down_weight"].learning_rate_multiplier == 0.25
    assert [event["event"] for event in twice.lineage] == ["grow", "grow"]


def test_reset_leaves_the_optimizer_out(trained: Any, tmp_path: Path) -> None:
    manifest = grow(trained[0], tmp_path / "reset", DOUBLE, keep_optimizer=False).manifest
    assert manifest.states == ("weight",)
    assert (manifest.progress.step, manifest.progress.optimizer_step) == (TRAINED_STEPS, 0)


def test_shares_of_the_copies_sum_to_one_and_differ() -> None:
    for old, new in ((4, 8), (3, 5), (40, 67), (5, 5)):
        axis_map = shared(old, copied(old, new), 0.2, 0, "layer", "axis")
        assert np.bincount(axis_map.source, weights=axis_map.read) == pytest.approx(np.ones(old), abs=1e-15)
        assert (np.diff(axis_map.source) >= 0).all() and set(axis_map.source) == set(range(old))
        counts = np.bincount(axis_map.source)
        assert counts.max() - counts.min() <= 1
        assert (axis_map.read[counts[axis_map.source] == 1] == 1).all()
    assert not np.allclose(shared(4, copied(4, 8), 0.2, 0, "a").read, shared(4, copied(4, 8), 0.2, 0, "b").read)
    assert np.array_equal(shared(2, copied(2, 6)).read, np.full(6, 1 / 3))


@pytest.mark.parametrize("new", [25, 26, 27, 31, 36, 47, 49, 60, 71, 73])
def test_weights_of_a_widened_stream_keep_mean_and_mean_square(new: int) -> None:
    """The conditions under which layer norms and RMS norms commute with copying."""
    for axis_map in (centred(24, new), weighted(24, copied(24, new), new / 24)):
        assert len(axis_map.source) == new and set(axis_map.source) == set(range(24))
        squares = np.bincount(axis_map.source, weights=axis_map.write**2)
        assert squares == pytest.approx(np.full(24, new / 24), rel=1e-12)
        assert np.bincount(axis_map.source, weights=axis_map.write * axis_map.read) == pytest.approx(np.ones(24))
    sums = np.bincount(centred(24, new).source, weights=centred(24, new).write)
    assert sums == pytest.approx(np.full(24, sums[0]), rel=1e-12)
    assert (centred(24, new).write == 0).sum() <= (new == 25)  # no coordinate is wasted but for a single extra one


def test_query_heads_read_copies_of_the_key_heads_that_their_sources_read() -> None:
    for old, new in (((4, 2), (8, 4)), ((8, 2), (8, 8)), ((4, 2), (6, 3)), ((6, 3), (24, 6)), ((4, 4), (6, 6))):
        source = query_heads(old, new)
        assert source is not None and set(source) == set(range(old[0]))
        keys = copied(old[1], new[1])
        for head, origin in enumerate(source):
            assert keys[head * new[1] // new[0]] == origin * old[1] // old[0]


def bfloat16(values: Any) -> Any:
    return np.asarray(values, ml_dtypes.bfloat16).astype(np.float64)


def test_parts_of_bfloat16_weights_are_bfloat16_and_sum_up_exactly() -> None:
    rng = np.random.default_rng(0)
    for new in (8, 11, 17):
        axis_map = shared(4, copied(4, new), 0.2, 0, "axis")
        values = bfloat16(rng.standard_normal((100, 4)) * 10.0 ** rng.integers(-30, 30, (100, 1)))
        parts = exact_part(values[:, axis_map.source], *axis_map.shares)
        assert np.array_equal(parts, bfloat16(parts))
        for entry in range(4):
            assert np.array_equal(parts[:, axis_map.source == entry].sum(axis=1), values[:, entry])
        assert np.abs(parts - values[:, axis_map.source] * axis_map.read).max() <= np.abs(values).max() / 128


def test_doubled_bfloat16_models_give_the_same_bits(tmp_path: Path) -> None:
    """Halves are exact, and sums of equal pairs round as the single sums do."""
    for name in ("bert", "llama"):
        model, optimizer = trained_model(family(name))
        save(model, optimizer, tmp_path / name, parts=1)
        reshard(
            CheckpointReader(tmp_path / name), tmp_path / f"{name} bf16", ParallelConfig(), Alone(), True, "bfloat16"
        )
        sizes = {
            "hidden_size": 48,
            "num_attention_heads": 8,
            "num_key_value_heads": 2 * model.config.num_key_value_heads,
        }
        grown = grow(
            tmp_path / f"{name} bf16", tmp_path / f"{name} grown", {**sizes, "intermediate_size": 80}, symmetry=EVEN
        )
        small = load_model(CheckpointReader(tmp_path / f"{name} bf16"), torch.bfloat16)
        large = load_model(grown, torch.bfloat16)
        assert grown.dtype("layers.0.mlp.up_weight", "weight") == "bfloat16"
        assert relative_errors(small, large, batch_of(small.config, 3))[0] == 0.0


def test_threads_take_a_mean_once_and_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained_model(family("gpt2"))
    save(model, optimizer, tmp_path / "small", parts=1)
    reader = CheckpointReader(tmp_path / "small")
    plan = make_plan(model.config, {"hidden_size": 36}, Symmetry())
    grower, taken = Grower(reader, plan), []
    average = Grower._averaged

    def slow(self: Grower, *what: Any) -> Any:
        taken.append(what[:2])
        time.sleep(0.05)
        return average(self, *what)

    monkeypatch.setattr(Grower, "_averaged", slow)
    monkeypatch.setattr("megacore.growth.apply._MEANS_KEPT", 1)
    with ThreadPoolExecutor(3) as pool:
        for name in ("layers.0.mlp.down_weight", "layers.1.mlp.down_weight"):
            rows = [pool.submit(grower.box, name, "weight", ((n, n + 12), (0, 40))) for n in (0, 12, 24)]
            whole = np.concatenate([row.result() for row in rows])
            assert np.array_equal(whole, Grower(reader, plan).box(name, "weight", ((0, 36), (0, 40))))
    names = [name for name, _ in taken]
    assert names == ["layers.0.mlp.down_weight"] * 2 + ["layers.1.mlp.down_weight"] * 2  # one of each for the check
    assert len(grower._means) == 1


def test_uneven_shares_of_bfloat16_weights_sum_up_in_the_file(tmp_path: Path) -> None:
    model, optimizer = trained_model(family("llama"))
    save(model, optimizer, tmp_path / "small", parts=1)
    reshard(CheckpointReader(tmp_path / "small"), tmp_path / "bf16", ParallelConfig(), Alone(), True, "bfloat16")
    sizes = {"intermediate_size": 67, "num_attention_heads": 8}
    before = CheckpointReader(tmp_path / "bf16")
    after = grow(tmp_path / "bf16", tmp_path / "large", sizes, symmetry=Symmetry(noise_scale=0.0, share_scale=0.2))
    plan = make_plan(before.manifest.model, sizes, Symmetry())
    for name, dim in (("mlp.down_weight", 1), ("attention.output_weight", 1)):
        small, large = (r.read(f"layers.1.{name}", "weight").astype(np.float64) for r in (before, after))
        summed = np.zeros_like(small)
        np.add.at(np.moveaxis(summed, dim, 0), plan.maps(f"layers.1.{name}")[dim].source, np.moveaxis(large, dim, 0))
        assert np.array_equal(summed, small)
    errors = relative_errors(
        load_model(before, torch.float64), load_model(after, torch.float64), batch_of(model.config, 3)
    )
    assert max(errors) <= 1e-12  # the weights are rounded, their sums are not
