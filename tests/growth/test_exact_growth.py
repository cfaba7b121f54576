"""Growth changes the size and nothing else: the function, what Adam does next, and the bytes for any ranks."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megacore.checkpoint.load import load_model
from megacore.checkpoint.manifest import Layout, Manifest, Progress, parameter_records
from megacore.checkpoint.pieces import Piece
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.writer import PieceToWrite, write_checkpoint
from megacore.communicator import Alone, TorchRanks
from megacore.config import ParallelConfig
from megacore.errors import ConfigError
from megacore.growth.execute import GrowthOutput, grow_checkpoint
from megacore.growth.maps import even_map, uneven_map
from megacore.growth.plan import Symmetry, make_plan
from megacore.growth.verify import random_batch
from megacore.model_config import ModelConfig
from megacore.models.transformer import Transformer
from megacore.params import declared
from megacore.specs import Shard
from tests.models import model_config, plain_loss
from tests.ranks import run_ranks

DOUBLE = {"hidden_size": 48, "num_attention_heads": 8, "intermediate_size": 80}
TRIPLE = {"hidden_size": 72, "num_attention_heads": 12, "intermediate_size": 97}
SIZES = {"x2": DOUBLE, "x3": TRIPLE, "ffn only, 40 to 67": {"intermediate_size": 67}}
EVEN = Symmetry(noise_scale=0.0, share_scale=0.0)
TRAINED_STEPS = 12


def text_loss(model: Transformer, seed: int) -> torch.Tensor:
    batch = random_batch(model_config(), samples=8, seed=seed)
    return plain_loss(model.eval()(batch), batch)


def adam(model: Transformer, multipliers: dict[str, tuple[float, float]] | None = None) -> torch.optim.AdamW:
    """AdamW with a group per parameter, by the rules of growth: lr × a, eps × b, decay lr × wd as it was."""
    groups = []
    for name, parameter in declared(model):
        rate, eps = multipliers[name] if multipliers else (1.0, 1.0)
        decay = 0.1 / rate if parameter.spec.is_matrix else 0.0
        groups.append({"params": [parameter], "lr": 3e-3 * rate, "eps": 1e-4 * eps, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=(0.9, 0.99))


def step(model: Transformer, optimizer: torch.optim.AdamW, seed: int) -> None:
    optimizer.zero_grad()
    text_loss(model, seed).backward()
    optimizer.step()


def save(model: Transformer, optimizer: torch.optim.AdamW, config: ModelConfig, path: Path, parts: int) -> None:
    """Write a checkpoint as ``parts`` tensor-parallel ranks would, in float64."""
    files = []
    for rank in range(parts):
        pieces = []
        for name, parameter in declared(model):
            if parameter.spec.sharded_dim is None and rank:
                continue
            region = parameter.spec.local_region(Shard(rank, parts))
            box = tuple(slice(start, stop) for start, stop in region)
            state = optimizer.state[parameter]
            for key, values in (("weight", parameter.detach()), *((k, state[k]) for k in ("exp_avg", "exp_avg_sq"))):
                block = values[box].numpy()
                pieces.append(PieceToWrite(Piece(name, key, region, None, "float64"), lambda block=block: [block]))
        files.append((f"rank{rank}.safetensors", pieces))
    specs = {name: parameter.spec for name, parameter in declared(model)}
    records = parameter_records(specs, dict.fromkeys(specs, (1.0, 1.0)))
    progress = Progress(step=TRAINED_STEPS, optimizer_step=TRAINED_STEPS, consumed_samples=96)
    write_checkpoint(
        path,
        Alone(),
        files,
        Manifest(
            model=config,
            layout=Layout(tensor_parallel_size=parts),
            progress=progress,
            parameters=records,
            files={},
        ),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Transformer, torch.optim.AdamW]:
    """Train a small model for some steps in float64 and save it at tensor parallel size 2."""
    from tests.models import whole_model

    config = model_config()
    model = whole_model(config, dtype=torch.float64)
    with torch.no_grad():  # gains and biases away from where they start
        for number, parameter in enumerate(model.parameters()):
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    optimizer = adam(model)
    for number in range(TRAINED_STEPS):
        step(model, optimizer, number)
    path = tmp_path_factory.mktemp("trained") / "small"
    save(model, optimizer, config, path, parts=2)
    return path, model, optimizer


def grow(source: Path, target: Path, sizes: dict[str, Any], parts: int = 1, **options: Any) -> CheckpointReader:
    symmetry = options.pop("symmetry", Symmetry())
    reader = CheckpointReader(source)
    plan = make_plan(reader.manifest.model, sizes, symmetry)
    output = GrowthOutput(ParallelConfig(tensor_parallel_size=parts), **options)
    grow_checkpoint(reader, plan, target, output, Alone())
    return CheckpointReader(target)


def relative_errors(small: Transformer, large: Transformer, dtype: torch.dtype) -> tuple[float, float]:
    batch = random_batch(model_config(), seed=99)
    with torch.inference_mode():
        pairs = zip(small.to(dtype)(batch), large.to(dtype)(batch), strict=True)
    mlm, nsp = (float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    return mlm, nsp


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("sizes", list(SIZES.values()), ids=list(SIZES))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_the_grown_model_computes_the_same(
    trained: Any, tmp_path: Path, sizes: dict[str, int], parts: int, dtype: torch.dtype, tolerance: float
) -> None:
    if sizes.get("intermediate_size", 0) % parts:
        sizes = {**sizes, "intermediate_size": sizes["intermediate_size"] // parts * parts + parts}
    source, model, _ = trained
    stored = str(dtype).removeprefix("torch.")
    large = load_model(grow(source, tmp_path / "large", sizes, parts, dtype=stored), dtype)
    assert {parameter.dtype for _, parameter in declared(large)} == {dtype}
    assert max(relative_errors(copy.deepcopy(model), large, dtype)) <= tolerance


def test_growing_twice_computes_the_same(trained: Any, tmp_path: Path) -> None:
    source, model, _ = trained
    grow(source, tmp_path / "once", DOUBLE, 2)
    sizes = {"hidden_size": 96, "num_attention_heads": 16, "intermediate_size": 100}
    large = load_model(grow(tmp_path / "once", tmp_path / "twice", sizes), torch.float64)
    assert max(relative_errors(copy.deepcopy(model), large, torch.float64)) <= 1e-12


def adam_of(reader: CheckpointReader) -> tuple[Transformer, torch.optim.AdamW]:
    """Make the model of a checkpoint and go on with its optimizer state."""
    model = load_model(reader, torch.float64)
    records = reader.manifest.parameters
    optimizer = adam(model, {name: (r.learning_rate_multiplier, r.adam_eps_multiplier) for name, r in records.items()})
    for name, parameter in declared(model):
        moments = {key: torch.from_numpy(reader.read(name, key)) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(float(reader.manifest.progress.optimizer_step)), **moments}
    return model, optimizer


@pytest.mark.parametrize("sizes", [DOUBLE, {**TRIPLE, "intermediate_size": 120}], ids=["x2", "x3"])
def test_adam_goes_on_in_lock_step_with_the_small_model(trained: Any, tmp_path: Path, sizes: dict[str, int]) -> None:
    source, _, _ = trained
    small, small_adam = adam_of(CheckpointReader(source))
    large, large_adam = adam_of(grow(source, tmp_path / "large", sizes, symmetry=EVEN))
    before = text_loss(small, 50).item()
    for number in range(5):
        for which in ((small, small_adam), (large, large_adam)):
            step(*which, 20 + number)
    assert abs(text_loss(small, 50).item() - before) > 1e-3  # five steps change the function
    assert max(relative_errors(small, large, torch.float64)) <= 1e-10


def test_gradients_of_the_grown_model_are_the_mapped_gradients(trained: Any, tmp_path: Path) -> None:
    """The moments' rule, checked by autograd: written axes × share, read axes unchanged (uneven shares too)."""
    source, model, _ = trained
    plan = make_plan(model_config(), DOUBLE, Symmetry(noise_scale=0.0, share_scale=0.2))
    large = load_model(grow(source, tmp_path / "large", DOUBLE, symmetry=plan.symmetry), torch.float64)
    for which in (model, large):
        which.zero_grad()
        text_loss(which, 7).backward()
    small_gradients = {name: parameter.grad.numpy() for name, parameter in declared(model)}
    for name, parameter in declared(large):
        expected = small_gradients[name]
        for dim, axis_map in enumerate(plan.maps(name)):
            expected = np.take(expected, axis_map.source, axis=dim)
            if plan.specs[name].dims[dim].role.value == "write":
                expected = expected * axis_map.share.reshape([-1 if d == dim else 1 for d in range(expected.ndim)])
        scale = np.abs(expected).max() + 1e-9  # key biases have no gradient: softmax does not see them
        assert np.abs(parameter.grad.numpy() - expected).max() <= 1e-11 * scale + 1e-15, name


def test_the_copies_separate_within_a_few_adam_steps(trained: Any, tmp_path: Path) -> None:
    source, _, _ = trained

    def ranks(symmetry: Symmetry, steps: int) -> dict[str, int]:
        name = f"{symmetry.noise_scale}-{symmetry.share_scale}-{steps}"
        large, optimizer = adam_of(grow(source, tmp_path / name, DOUBLE, symmetry=symmetry))
        for number in range(steps):
            step(large, optimizer, 30 + number)
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
    save(model, optimizer, model_config(), tmp_path / "whole", parts=1)
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


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ({"hidden_size": 36, "num_attention_heads": 6}, ["hidden_size=36", "multiple", "24, 48"]),
        ({"hidden_size": 48}, ["head size", "num_attention_heads=8"]),
        ({"hidden_size": 12, "num_attention_heads": 2}, ["hidden_size=12", "smaller"]),
        ({"num_hidden_layers": 4}, ["num_hidden_layers", "hidden_size"]),
        ({"hiden_size": 48}, ["hiden_size", "hidden_size"]),
        ({"intermediate_size": "big"}, ["intermediate_size", "big"]),
    ],
)
def test_growth_that_would_change_the_function_is_refused(sizes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        make_plan(model_config(), sizes, Symmetry())
    for part in parts:
        assert part in str(error.value)


def test_shares_of_the_copies_sum_to_one_and_differ() -> None:
    for old, new in ((4, 8), (3, 5), (40, 67), (5, 5)):
        axis_map = uneven_map(old, new, 0.2, 0, "layer", "axis")
        assert np.bincount(axis_map.source, weights=axis_map.share) == pytest.approx(np.ones(old), abs=1e-15)
        assert (np.diff(axis_map.source) >= 0).all() and set(axis_map.source) == set(range(old))
        counts = np.bincount(axis_map.source)
        assert counts.max() - counts.min() <= 1
        assert (axis_map.share[counts[axis_map.source] == 1] == 1).all()
    assert not np.allclose(uneven_map(4, 8, 0.2, 0, "a").share, uneven_map(4, 8, 0.2, 0, "b").share)
    assert np.array_equal(even_map(2, 6).share, np.full(6, 1 / 3))
