"""The report's numbers against ones computed by hand, and its page as a browser would parse it."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launcher.report import summary_table, write_report
from launcher.report_charts import Axis, Line, chart, linear_ticks, log_ticks, scientific, smooth, thin
from launcher.report_runs import flops_to_reach, growth_savings, read_run
from megacore.errors import ConfigError, MegacoreError

CONFIG = """\
model: {vocab_size: 100, hidden_size: 128, num_hidden_layers: 3, num_attention_heads: 4, intermediate_size: 512}
parallel: {tensor_parallel_size: 2}
training: {eval_samples: 64, log_interval: 10, initial_checkpoint: null}
data: {validation_data: data/held-out}
"""
GROWTH = {
    "source": "runs/small/step-00000100",
    "from": {"hidden_size": 64, "num_hidden_layers": 3},
    "to": {"hidden_size": 128, "num_hidden_layers": 3},
    "parameters_before": 1000,
    "parameters_after": 3000,
    "verification": {
        "dtype": "float32",
        "mlm_relative_error": 1.5e-7,
        "nsp_relative_error": 2e-7,
        "loss_before": 6.21,
        "loss_after": 6.21,
    },
}


def line(split: str, step: int, loss: float, flops: float, **values: Any) -> str:
    point = {"split": split, "step": step, "loss": loss, "mlm_loss": loss - 0.5, "nsp_loss": 0.5, "mlm_accuracy": 0.1}
    return json.dumps({**point, "nsp_accuracy": 0.6, "tokens": 10 * step, "flops": flops, **values})


def write_run(path: Path, lines: list[str], config: str = CONFIG, growth: object = None) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (path / "config.yaml").write_text(config)
    if growth is not None:
        (path / "growth.json").write_text(json.dumps(growth))
    return path


def held_out(path: Path, curve: list[tuple[float, float]], **kwargs: Any) -> Path:
    """Write a run of held-out losses only: (FLOPs, loss)."""
    return write_run(path, [line("validation", i, loss, flops) for i, (flops, loss) in enumerate(curve)], **kwargs)


class Page(HTMLParser):
    """Checks that tags nest, and collects text, attributes and the cells of tables."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def render(paths: list[Path], out: Path) -> Page:
    write_report([read_run(path) for path in paths], out)
    return Page(out.read_text(encoding="utf-8"))


def test_last_line_of_a_step_wins_and_a_truncated_one_is_ignored(tmp_path: Path) -> None:
    lines = [
        line("train", 10, 9.0, 1e12, learning_rate=1e-3, tokens_per_second=100.0),
        line("train", 20, 8.0, 2e12),
        line("validation", 20, 7.9, 2e12),
        line("train", 20, 7.5, 2e12),
        line("train", 15, 8.5, 1.5e12),
        line("train", 30, 7.0, 3e12)[:40],
    ]
    run = read_run(write_run(tmp_path / "a", lines))
    assert [(p.step, p.loss) for p in run.train] == [(10, 9.0), (15, 8.5), (20, 7.5)]
    assert [(p.step, p.loss) for p in run.validation] == [(20, 7.9)]
    assert run.name == "a" and run.growth is None and run.config["model"]["hidden_size"] == 128
    assert run.train[0].learning_rate == 1e-3 and math.isnan(run.train[1].learning_rate)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no measurements yet"),
        ('{"split":"tr', "no measurements yet"),
        ('{"split":"tr\n' + line("train", 1, 2.0, 1.0), r"metrics\.jsonl:1: not JSON"),
        (line("test", 1, 2.0, 1.0), r"metrics\.jsonl:1: .*'test'"),
        ("[1]", r"metrics\.jsonl:1"),
        (line("train", 1, 2.0, 1.0, tokens="many"), r"metrics\.jsonl:1: tokens is 'many'"),
        (line("train", 1, 2.0, 1.0, mlm_loss=None), r"metrics\.jsonl:1: mlm_loss is None"),
    ],
)
def test_damaged_metrics_name_the_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = write_run(tmp_path / "run", [text])
    with pytest.raises(MegacoreError, match=message) as error:
        read_run(path)
    assert str(path / "metrics.jsonl") in str(error.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml"])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = held_out(tmp_path / "run", [(1.0, 2.0)])
    (path / name).unlink()
    with pytest.raises(MegacoreError, match=re.escape(str(path / name))):
        read_run(path)


def test_damaged_growth_and_missing_directory_are_named(tmp_path: Path) -> None:
    path = held_out(tmp_path / "run", [(1.0, 2.0)], growth=[])
    with pytest.raises(MegacoreError, match=r"growth\.json"):
        read_run(path)
    with pytest.raises(MegacoreError, match="absent: no such run directory"):
        read_run(tmp_path / "absent")


def test_flops_to_reach_is_linear_between_two_measurements(tmp_path: Path) -> None:
    points = read_run(held_out(tmp_path / "a", [(0, 10), (100, 8), (200, math.nan), (300, 4), (400, 5)])).validation
    assert flops_to_reach(points, 9.0) == pytest.approx(50)
    assert flops_to_reach(points, 8.0) == pytest.approx(100)
    assert flops_to_reach(points, 5.0) == pytest.approx(100 + 200 * 3 / 4)  # over the measurement that is no number
    assert flops_to_reach(points, 12.0) == 0
    assert flops_to_reach(points, 3.9) is None


def test_growth_savings_is_signed_and_none_if_not_reached(tmp_path: Path) -> None:
    scratch = read_run(held_out(tmp_path / "scratch", [(0, 10), (100, 8), (200, 6)]))
    grown = read_run(held_out(tmp_path / "grown", [(40, 8), (140, 4)]))
    assert growth_savings(grown, scratch) == pytest.approx(1 - 90 / 200)
    assert growth_savings(scratch, grown) is None
    slow = read_run(held_out(tmp_path / "slow", [(0, 10), (1000, 2)]))
    assert growth_savings(slow, scratch) == pytest.approx(1 - 500 / 200)
    unmeasured = read_run(write_run(tmp_path / "unmeasured", [line("train", 1, 2.0, 3.0)]))
    assert growth_savings(scratch, unmeasured) is None and growth_savings(unmeasured, scratch) is None


def test_page_states_each_comparison_both_ways(tmp_path: Path) -> None:
    paths = [
        held_out(tmp_path / "scratch", [(0, 10), (100e9, 8), (200e9, 6)]),
        held_out(tmp_path / "grown", [(40e9, 8), (140e9, 4)], growth=GROWTH),
        held_out(tmp_path / "elsewhere", [(0, 9), (1e9, 5)], config=CONFIG.replace("held-out", "other")),
        write_run(tmp_path / "unmeasured", [line("train", 1, 2.0, 3.0)]),
    ]
    page = render(paths, tmp_path / "new" / "report.html")
    rows = {tuple(row[:2]): row[2:] for row in page.rows if len(row) == 7}
    assert len(rows) == 1 + 4 * 3
    assert rows["grown", "scratch"] == ["6.0000", "2.00×10¹¹", "2.00×10¹¹", "9.00×10¹⁰", "55.0% fewer FLOPs"]
    assert rows["scratch", "grown"][-2:] == ["not reached", "more than 2.00×10¹¹"]
    assert rows["elsewhere", "scratch"][-1] == "not comparable: other held-out data"
    assert rows["scratch", "unmeasured"] == ["–", "–", "–", "–", "no held-out loss to compare"]
    [growth] = [row for row in page.rows if row[0] == "grown" and len(row) == 9]
    assert growth[1:] == [
        *("runs/small/step-00000100", "hidden 64 → 128", "1,000 → 3,000", "float32"),
        *("1.50×10⁻⁷", "2.00×10⁻⁷", "6.2100", "6.2100"),
    ]


def test_summary_tells_own_flops_from_the_lineages(tmp_path: Path) -> None:
    measured = [line("validation", 100, 6.0, 5e9), line("train", 110, 5.9, 8e9), line("validation", 110, 5.5, 8e9)]
    logged = [line("train", 110, 5.9, 8e9, tokens_per_second=30.0), line("train", 120, 5.8, 11e9)]
    paths = [
        write_run(tmp_path / "measured", measured, growth=GROWTH),
        write_run(tmp_path / "logged", logged, growth=GROWTH),
        write_run(tmp_path / "scratch", logged),
        write_run(tmp_path / "late", [line("validation", 105, 6.0, 6e9), *logged], growth=GROWTH),
    ]
    rows = {row[0]: row for row in render(paths, tmp_path / "report.html").rows if len(row) == 13}
    assert rows["measured"][1:] == [
        *("128", "3", "4", "512", "2", "110", "1,100"),
        *("3.00×10⁹", "8.00×10⁹", "5.5000", "5.5000", "–"),
    ]
    # Unknown where it began: the first interval is taken to be as long as the second, also if it measured within it.
    assert rows["late"][8:10] == ["≈ 6.00×10⁹", "1.10×10¹⁰"]
    assert rows["logged"][8:] == ["≈ 6.00×10⁹", "1.10×10¹⁰", "–", "–", "30"]
    assert rows["scratch"][8:10] == ["1.10×10¹⁰", "1.10×10¹⁰"]


def test_page_is_self_contained_and_escapes_a_hostile_name(tmp_path: Path) -> None:
    name = """<script>alert(1)<&"'>$title"""
    lines = [line("train", i, 9 - i / 50, i * 1e9, gradient_norm=1.0, learning_rate=1e-3) for i in range(1, 99)]
    path = write_run(tmp_path / name, [*lines, line("validation", 50, 8.0, 50e9), line("validation", 98, 7.0, 98e9)])
    hostile = {**GROWTH, "source": "<img src=x onerror=alert(2)>"}
    (path / "growth.json").write_text(json.dumps(hostile))
    out = tmp_path / "report.html"
    page = render([path], out)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and "img" not in tags and tags.count("figure") == 10
    assert not any(key.startswith("on") or key in ("src", "href") for _, attrs in page.tags for key in attrs)
    assert not re.search(r"https?://|@import|url\(", out.read_text(encoding="utf-8"))
    assert any(row[0] == name for row in page.rows)
    assert any(attrs.get("data-label") == name for tag, attrs in page.tags if tag == "polyline")
    assert list(out.parent.glob(".report*")) == []


def test_runs_named_alike_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    paths = [held_out(tmp_path / part / "run", [(1e9, 5)]) for part in ("a", "b")]
    assert {str(p) for p in paths} <= {row[0] for row in render(paths, tmp_path / "report.html").rows}


def test_a_diverged_run_is_drawn_as_far_as_it_went(tmp_path: Path) -> None:
    points = [line("train", 1, 9.0, 1e9), line("train", 2, math.nan, 2e9), line("validation", 2, math.inf, 2e9)]
    page = render([write_run(tmp_path / "diverged", points)], tmp_path / "report.html")
    assert not any("nan" in str(value) or "inf" in str(value) for _, attrs in page.tags for value in attrs.values())
    assert "Nothing measured." in page.text


def test_writing_fails_with_a_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one run"):
        write_report([], tmp_path / "report.html")
    run = read_run(held_out(tmp_path / "run", [(1.0, 2.0)]))
    with pytest.raises(MegacoreError, match=r"report\.html: cannot be written"):
        write_report([run], tmp_path / "run" / "metrics.jsonl" / "report.html")
    (tmp_path / "report.html").mkdir()
    with pytest.raises(MegacoreError, match=r"report\.html: cannot be written"):
        write_report([run], tmp_path / "report.html")
    assert list(tmp_path.glob(".report*")) == []


def test_terminal_table_fits_and_takes_names_literally(tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=(tmp_path / "log").open("w"))
    console.print(summary_table([read_run(held_out(tmp_path / "[red]run", [(0, 9), (123e9, 5.4321)]))]))
    text = console.export_text()
    assert "[red]run" in text and "5.4321" in text and "1.23×10¹¹" in text


def test_ticks_are_round() -> None:
    assert linear_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(3.9, 6.6) == pytest.approx([4, 4.5, 5, 5.5, 6, 6.5])
    assert linear_ticks(0, 3.4e12) == pytest.approx([0, 1e12, 2e12, 3e12])
    assert linear_ticks(5, 5) == [5]
    assert log_ticks(0.3, 40) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert log_ticks(0.001, 10) == pytest.approx([0.001, 0.01, 0.1, 1, 10])
    assert log_ticks(1.1, 1.9) == pytest.approx([1.2, 1.4, 1.6, 1.8])
    assert (scientific(3.1e12), scientific(0), scientific(math.nan)) == ("3.10×10¹²", "0", "–")


def test_smoothing_and_thinning_keep_what_matters() -> None:
    assert smooth([(0, 1), (1, 4), (2, 7), (3, math.nan)], share=1.0) == [(0, 2.5), (1, 4), (2, 5.5)]
    assert smooth([]) == []
    points = [(float(i), 50.0 if i == 777 else 1.0) for i in range(10_000)]
    thinned = thin(points, 100)
    assert len(thinned) < 110 and (777.0, 50.0) in thinned
    assert thinned[0] == points[0] and thinned[-1] == points[-1] and list(thinned) == sorted(thinned)


def test_chart_places_values_and_says_what_it_cuts() -> None:
    line = Line("a", 0, [(0, 100.0), (50, 2.0), (100, 1.0)])
    whole = chart("t", Axis("x"), Axis("y"), [line])
    cut = chart("t", Axis("x"), Axis("y"), [line], cut_start=True)
    assert "axis cut" not in whole and "the first values reach 100<" in cut
    x, y = (next(float(v) for v in re.search(rf'data-{a}="([^"]*)"', cut)[1].split()[1:2]) for a in "xy")  # type: ignore[index]
    assert (x, y) == pytest.approx((104, 2.04))
    # The plot is 488 × 254 pixels; y counts from the top.
    points = re.search(r'<polyline[^>]* points="([^"]*)"', cut)[1].split()  # type: ignore[index]
    assert [float(v) for v in points[1].split(",")] == pytest.approx([488 * 50 / 104, 254 * 0.04 / 1.08], abs=0.01)
