"""The demo does not touch what is not its own, and hands paths on as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launcher.demo import _MARKER, _prepare, _setting, run_demo
from megacore.errors import ConfigError
from megacore.settings import parse_overrides


def test_a_directory_that_is_not_a_demos_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(ConfigError, match="not from a demo"):
        _prepare(tmp_path)
    assert (tmp_path / "precious").read_text() == "data"


def test_an_earlier_demo_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    _prepare(folder)
    (folder / "old").write_text("run")
    _prepare(folder)
    assert [path.name for path in folder.iterdir()] == [_MARKER]


def test_a_missing_input_is_named_before_anything_is_removed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.txt: no such file"):
        run_demo(tmp_path / "demo", tmp_path / "absent.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["plain", "with space", "it's", 'a"b', "a: b", "123", "[x]", "# no", "null", "{a}", "é"]
)
def test_paths_survive_the_command_line(name: str) -> None:
    assert parse_overrides([_setting("output_dir", Path(name))]) == {"output_dir": name}


def test_the_recipes_grow_into_each_other() -> None:
    from launcher.demo import _GROWTH, _RECIPE
    from megacore.config import ModelConfig
    from megacore.growth.plan import Symmetry, make_plan

    small, large = (
        ModelConfig(**yaml.safe_load((_RECIPE / f"{n}.yaml").read_text())["model"]) for n in ("small", "large")
    )
    sizes = parse_overrides(_GROWTH)
    sizes.pop("tensor_parallel_size")
    assert make_plan(small, sizes, Symmetry()).target == large


def test_an_input_inside_the_demos_directory_is_not_removed(tmp_path: Path) -> None:
    _prepare(tmp_path)
    text = tmp_path / "my.txt"
    text.write_text("mine")
    with pytest.raises(ConfigError, match=r"my\.txt lies in"):
        run_demo(tmp_path, text)
    assert text.read_text() == "mine"
