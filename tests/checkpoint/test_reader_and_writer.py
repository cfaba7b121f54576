"""Checkpoints: any box of any tensor from any layout; damage is found and named; nothing is left half-written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from megacore.checkpoint.manifest import Layout, Manifest, Progress, parameter_records, read_manifest
from megacore.checkpoint.pieces import Piece
from megacore.checkpoint.reader import CheckpointReader
from megacore.checkpoint.stream import Entry, SafetensorsStream
from megacore.checkpoint.writer import PieceToWrite, write_checkpoint
from megacore.communicator import Alone
from megacore.errors import CheckpointError
from megacore.growth.verify import check_integrity
from megacore.models.transformer import declarations
from megacore.specs import Shard
from tests.models import model_config

CONFIG = model_config()
SPECS = declarations(CONFIG)
EMPTY: dict[str, Any] = {"size": 1, "header": "", "states": {}, "holds": []}


def values(name: str) -> np.ndarray[Any, Any]:
    """Any numbers, different for each parameter."""
    return np.random.default_rng(len(name)).normal(size=SPECS[name].shape).astype(np.float32)


def files_of(parts: int, replicas: int) -> list[tuple[str, list[PieceToWrite]]]:
    """Cut the model as tensor-parallel ranks and ZeRO replicas do: each replica has a run of each local tensor."""
    files = []
    for rank in range(parts):
        for replica in range(replicas):
            pieces = []
            for name, spec in SPECS.items():
                if spec.sharded_dim is None and rank:
                    continue
                region = spec.local_region(Shard(rank, parts))
                local = values(name)[tuple(slice(*bounds) for bounds in region)]
                start, stop = local.size * replica // replicas, local.size * (replica + 1) // replicas
                if start == stop:
                    continue
                run = (start, stop) if replicas > 1 else None
                block = local.ravel()[start:stop] if run else local
                pieces.append(PieceToWrite(Piece(name, "weight", region, run, "float32"), lambda block=block: [block]))
            files.append((f"rank{rank}-{replica}.safetensors", pieces))
    return files


def write(path: Path, parts: int = 1, replicas: int = 1) -> Path:
    manifest = Manifest(
        model=CONFIG,
        layout=Layout(tensor_parallel_size=parts, data_parallel_size=replicas),
        progress=Progress(step=3),
        parameters=parameter_records(SPECS, dict.fromkeys(SPECS, (1.0, 1.0))),
        files={},
    )
    write_checkpoint(path, Alone(), files_of(parts, replicas), manifest)
    return path


@pytest.mark.parametrize(("parts", "replicas"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)])
def test_every_layout_reads_back_as_the_same_tensors(tmp_path: Path, parts: int, replicas: int) -> None:
    reader = CheckpointReader(write(tmp_path / "c", parts, replicas))
    reader.check_coverage()
    for name in SPECS:
        assert np.array_equal(reader.read(name, "weight"), values(name))


@pytest.fixture(scope="module")
def fragmented(tmp_path_factory: pytest.TempPathFactory) -> CheckpointReader:
    return CheckpointReader(write(tmp_path_factory.mktemp("boxes") / "c", parts=2, replicas=3))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_box_of_any_tensor_can_be_read(fragmented: CheckpointReader, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(SPECS)))
    region = []
    for size in SPECS[name].shape:
        start = data.draw(st.integers(0, size - 1))
        region.append((start, data.draw(st.integers(start + 1, size))))
    expected = values(name)[tuple(slice(*bounds) for bounds in region)]
    assert np.array_equal(fragmented.read(name, "weight", tuple(region)), expected)


def test_the_stream_writes_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    arrays = {"a": np.arange(12.0).reshape(3, 4), "b": np.float32([[1.5], [2.5]]), "ü": np.zeros((1, 0, 2))}
    entries = [Entry(key, str(array.dtype), array.shape) for key, array in arrays.items()]
    with SafetensorsStream(tmp_path / "f", entries) as stream:
        for key, array in arrays.items():
            stream.write(key, [array[:1], array[1:]])
    assert (tmp_path / "f").stat().st_size == stream.size
    for key, array in load_file(tmp_path / "f").items():
        assert array.dtype == arrays[key].dtype and np.array_equal(array, arrays[key])


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(content)


def damage_header(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"F32"', b'"I32"', 1))


def remove(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("damage", "what"),
    [(truncate, "cut short"), (flip, "altered"), (damage_header, "header is damaged"), (remove, "missing")],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None], what: str) -> None:
    path = write(tmp_path / "c", parts=2)
    damage(path / "rank1-0.safetensors")
    with pytest.raises(CheckpointError, match=r"rank1-0\.safetensors") as error:
        check_integrity(CheckpointReader(path))
    assert what in str(error.value)


def test_swapped_files_are_found(tmp_path: Path) -> None:
    path = write(tmp_path / "c", parts=2)
    a, b = path / "rank0-0.safetensors", path / "rank1-0.safetensors"
    spare = tmp_path / "spare"
    a.rename(spare)
    b.rename(a)
    spare.rename(b)
    with pytest.raises(CheckpointError, match="safetensors"):
        check_integrity(CheckpointReader(path))


def edited(path: Path, edit: Callable[[dict[str, Any]], None], honest: bool = True) -> None:
    """Edit a manifest; an honest edit also mends the checksum, as a determined user could."""
    from megacore.sealed import seal

    file = path / "manifest.json"
    body = json.loads(file.read_text())
    edit(body)
    if honest:
        body.pop("sha256")
    file.write_text(seal(body) if honest else json.dumps(body))


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c")
    edited(path, lambda body: body["progress"].update(step=4), honest=False)
    with pytest.raises(CheckpointError, match=r"manifest\.json: .*altered"):
        read_manifest(path)


def edited_header(path: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit what a file says of its pieces, and mend the file's record in the manifest."""
    from megacore.checkpoint.stream import checksum_of

    file = path / name
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:length])
    about = {key: json.loads(text) for key, text in header["__metadata__"].items()}
    edit(about)
    header = {key: value for key, value in header.items() if key in about}
    text = json.dumps(header | {"__metadata__": {key: json.dumps(value) for key, value in about.items()}}).encode()
    new = len(text).to_bytes(8, "little") + text
    file.write_bytes(new + content[length:])
    record = {"size": file.stat().st_size, "header": checksum_of(new)}
    edited(path, lambda body: body["files"][name].update(record))


def forget(body: dict[str, Any], name: str) -> None:
    """Remove a parameter from a manifest as if there had never been one."""
    body["parameters"].pop(name)
    for record in body["files"].values():
        record["holds"][-1][1] -= 1


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (lambda body: body["model"].update(hidden_size=48), "axes"),
        (lambda body: body["model"].update(num_attention_heads=5), "num_attention_heads"),
        (lambda body: body["model"].update(num_hidden_layers=3), "layers.2"),
        (lambda body: forget(body, "nsp_head.bias"), "nsp_head.bias is missing"),
        (lambda body: body["files"].update({"../../evil.safetensors": EMPTY}), "file name"),
        (lambda body: body["files"].update({"a.safetensors": {**EMPTY, "holds": [[3, 999]]}}), "does not have"),
        (lambda body: body.update(version=1), "version 1"),
        (lambda body: body.update(more=1), "more"),
    ],
)
def test_an_inconsistent_manifest_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], None], what: str) -> None:
    path = write(tmp_path / "c")
    edited(path, edit)
    with pytest.raises(CheckpointError, match=r"manifest\.json") as error:
        CheckpointReader(path).specs()
    assert what in str(error.value) and "\n" not in str(error.value)


def test_a_piece_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c")
    edited_header(path, "rank0-0.safetensors", lambda about: about["nsp_head.bias/weight"].update(run=[0, 9]))
    with pytest.raises(CheckpointError, match=r"rank0-0\.safetensors: the piece nsp_head\.bias/weight does not fit"):
        CheckpointReader(path).check_coverage()


def test_a_missing_piece_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "c")
    edited_header(path, "rank0-0.safetensors", lambda about: about.pop("lm_head.bias/weight"))
    reader = CheckpointReader(path)
    with pytest.raises(CheckpointError, match=r"0 of 101 entries of lm_head\.bias/weight"):
        reader.check_coverage()


def test_runs_that_overlap_are_found(tmp_path: Path) -> None:
    """Twice the first half of a tensor has the right number of entries, and is not the tensor."""
    path, key = write(tmp_path / "c", replicas=2), "lm_head.norm.bias/weight"
    edited_header(path, "rank0-1.safetensors", lambda about: about[key].update(run=[0, 12]))
    reader = CheckpointReader(path)
    for use in (reader.check_coverage, lambda: reader.read("lm_head.norm.bias", "weight")):
        with pytest.raises(CheckpointError, match=r"lm_head\.norm\.bias are missing or overlap"):
            use()


def test_a_comparison_never_takes_not_a_number_for_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 3e38 are finite numbers, but what the model computes with them is not."""
    from megacore.growth.verify import compare, random_batch

    good, original = CheckpointReader(write(tmp_path / "good")), values
    monkeypatch.setattr(
        "tests.checkpoint.test_reader_and_writer.values",
        lambda name: np.full_like(original(name), 3e38) if name == "embeddings.position" else original(name),
    )
    bad = CheckpointReader(write(tmp_path / "bad"))
    check_integrity(bad)
    with pytest.raises(CheckpointError, match="not finite"):
        compare(good, bad, [random_batch(CONFIG)], "float32")


def test_values_that_are_not_finite_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = values

    def with_nan(name: str) -> np.ndarray[Any, Any]:
        array = original(name)
        if name == "lm_head.bias":
            array[7] = np.nan
        return array

    monkeypatch.setattr("tests.checkpoint.test_reader_and_writer.values", with_nan)
    path = write(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"lm_head\.bias/weight.*not finite"):
        check_integrity(CheckpointReader(path))


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"format": "other"}', "\xff"])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "c"
    path.mkdir()
    if content is not None:
        (path / "manifest.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=str(path)):
        CheckpointReader(path)


def test_an_existing_directory_is_never_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path / "c")
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        write(path)
    assert (path / "manifest.json").read_bytes() == before


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def failing() -> Any:
        yield np.zeros((3, 24), np.float32)
        raise OSError(28, "No space left on device")

    spec = SPECS["lm_head.transform_weight"]
    region = spec.local_region(Shard())
    piece = PieceToWrite(Piece("lm_head.transform_weight", "weight", region, None, "float32"), failing)
    manifest = read_manifest(write(tmp_path / "other"))
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_checkpoint(tmp_path / "c", Alone(), [("f.safetensors", [piece])], manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_what_a_killed_job_left_is_replaced(tmp_path: Path) -> None:
    left = tmp_path / "c.incomplete"
    left.mkdir()
    (left / "rank0-0.safetensors").write_bytes(b"half")
    (left / ".being-written").touch()
    write(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_somebody_else_s_directory_is_not_removed(tmp_path: Path) -> None:
    notes = tmp_path / "c.incomplete" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(CheckpointError, match=r"c\.incomplete is in the way"):
        write(tmp_path / "c")
    assert notes.read_text() == "mine" and not (tmp_path / "c").exists()


def test_a_checkpoint_without_weights_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "c")
    edited(path, lambda body: body.update(files={}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: it has no weights"):
        CheckpointReader(path)


def test_a_manifest_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    manifest = read_manifest(write(tmp_path / "c"))
    bad = manifest.model_copy(update={"progress": manifest.progress.model_copy(update={"step": -7})})
    with pytest.raises(CheckpointError, match=r"d/manifest\.json, to be written: progress\.step"):
        write_checkpoint(tmp_path / "d", Alone(), files_of(1, 1), bad)
    assert not (tmp_path / "d").exists()


def test_a_flush_that_fails_in_the_background_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system reports such an error once, to whoever flushes first."""

    def failing(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("megacore.checkpoint.stream._STAGED_BYTES", 16)
    monkeypatch.setattr("megacore.checkpoint.stream._open_direct", lambda path: None)
    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
