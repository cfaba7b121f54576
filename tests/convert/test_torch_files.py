"""Files of other programs are read in place: the right values, no code of theirs, no more than was asked for."""

from __future__ import annotations

import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megacore.convert.safetensors_files import load_safetensors
from megacore.convert.torch_files import load_torch_file
from megacore.errors import CheckpointError

BASE = torch.arange(3000.0).reshape(40, 75)
TENSORS = {
    "matrix": BASE,
    "transposed": BASE.T,
    "part": BASE[10:20, 5:60],
    "strided": BASE[::3, ::2],
    "expanded": BASE[:1].expand(5, 75),
    "permuted": torch.arange(105.0).reshape(3, 5, 7).permute(2, 0, 1),
    "wide": torch.arange(12000.0).reshape(3, 4000),
    "half": torch.arange(33).bfloat16(),
    "whole numbers": torch.arange(5),
    "number": torch.tensor(4.0),
    "nothing": torch.empty(0, 3),
}


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
def test_any_box_of_a_stored_tensor_is_what_the_tensor_has_there(kind: str, tmp_path: Path) -> None:
    file, draw = tmp_path / "file", random.Random(0)
    if kind == "torch":
        torch.save({"deep": [TENSORS, (torch.nn.Parameter(BASE),)]}, file)
        stored, (parameter,) = load_torch_file(file)["deep"]
        assert torch.equal(parameter.read(), BASE)
        assert stored["number"].item() == 4.0
    else:
        save_file({key: value.contiguous().clone() for key, value in TENSORS.items()}, file)
        stored = load_safetensors(file)
    for key, tensor in TENSORS.items():
        assert torch.equal(stored[key].read(), tensor), key
        for _ in range(10):
            edges = [sorted(draw.choices(range(size + 1), k=2)) for size in tensor.shape]
            box = tuple(slice(*pair) for pair in edges)
            assert torch.equal(stored[key].read(box), tensor[box]), (key, box)
    assert torch.equal(stored["matrix"].narrow(3, 4).flattened().read(), BASE[3:7].flatten())


@pytest.mark.parametrize("damage", ["truncated", "old format", "compressed", "moved", "sparse", "missing", "emptied"])
def test_what_cannot_be_read_in_place_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save({"weight": BASE}, file)
    what = ""
    if damage in ("truncated", "emptied"):
        file.write_bytes(file.read_bytes()[: 5000 if damage == "truncated" else 0])
    elif damage == "old format":
        torch.save({"weight": BASE}, file, _use_new_zipfile_serialization=False)
        what = "save it again"
    elif damage == "sparse":
        torch.save({"weight": BASE.to_sparse()}, file)
        what = "sparse"
    elif damage == "missing":
        file.unlink()
        what = "is missing"
    else:  # other programs' zip files
        with zipfile.ZipFile(file) as archive:
            content = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        if damage == "moved":
            content["file/data/0"] = content["file/data/0"][4:]
        method = zipfile.ZIP_DEFLATED if damage == "compressed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        what = "compressed" if damage == "compressed" else "does not lie"
    with pytest.raises(CheckpointError, match=rf"file\.pt.*{what}"):
        load_torch_file(file)


def test_a_file_that_is_cut_short_later_is_refused_when_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    torch.save({"weight": BASE}, file)
    stored = load_torch_file(file)["weight"]
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r"file\.pt is cut short"):
        stored.read()


class Bomb:
    """Its pickle would write a file."""

    def __reduce__(self) -> Any:
        return shutil.copyfile, (__file__, "exploded")


class Blocked:
    """Its pickle would make a directory, by a module that torch refuses to read the name of."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_no_code_in_a_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file.pt"
    torch.save({"weight": torch.arange(3), "bomb": Bomb()}, file)
    assert load_torch_file(file)["weight"].read().tolist() == [0, 1, 2]
    torch.save({"weight": torch.arange(3), "bomb": Blocked()}, file)
    with pytest.raises(CheckpointError, match=r"file\.pt: .*blocked"):
        load_torch_file(file)
    assert not (tmp_path / "exploded").exists()
