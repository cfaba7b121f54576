"""What runs did, from their ``metrics.jsonl``: one HTML file with charts, and the numbers a growth is judged by.

FLOPs and tokens are cumulative over a checkpoint's lineage, so that curves of a grown run and of one from scratch
can be laid over each other: the smaller model's training is paid for.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from html import escape
from importlib.resources import files
from itertools import permutations
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from launcher.report_charts import Axis, Line, Mark, chart, legend, scientific, smooth
from launcher.report_runs import Point, Run, flops_to_reach, growth_savings
from megacore.errors import ConfigError, MegacoreError

_SIZES = {
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "FFN",
}


def _get(values: Mapping[str, Any] | None, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _held_out(run: Run) -> tuple[Any, ...]:
    """Return what must be equal for two held-out losses to be comparable."""
    data = _get(run.config, "data", "validation_data")
    where = Path(data).resolve() if isinstance(data, str) else data
    return where, _get(run.config, "training", "eval_samples"), _get(run.config, "model", "vocab_size")


def _start(run: Run, count: str) -> tuple[float, bool]:
    """Return the lineage's FLOPs or tokens before this run, and whether that is exact.

    A run that continues a checkpoint may have measured the held-out loss before its first step: then a whole
    ``log_interval`` before the first line of training. Else its first interval is taken to be as long as the second.
    """
    if run.growth is None and _get(run.config, "training", "initial_checkpoint") is None:
        return 0.0, True
    interval = _get(run.config, "training", "log_interval") or math.inf
    if run.validation and (not run.train or run.train[0].step - run.validation[0].step >= interval):
        return float(getattr(run.validation[0], count)), True
    first, second = (float(getattr(p, count)) for p in (run.train[0], run.train[min(1, len(run.train) - 1)]))
    return max(0.0, 2 * first - second), False


def _labels(runs: Sequence[Run]) -> list[str]:
    """Return the runs' names, or their paths where two are named alike."""
    names = Counter(run.name for run in runs)
    return [run.name if names[run.name] == 1 else str(run.path) for run in runs]


def _text(value: Any) -> str:
    """Write a value of a table; "–" for what is not known."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float) and not 1e-3 <= abs(value) < 1e6:
        return scientific(value)
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


Rows = list[list[str]]
_SUMMARY = (
    *("run", *_SIZES.values(), "TP", "step", "tokens"),
    *("own FLOPs", "lineage FLOPs", "held-out loss", "best", "tokens/s"),
)


def _summary_rows(runs: Sequence[Run]) -> Rows:
    rows = []
    for run, label in zip(runs, _labels(runs), strict=True):
        start, exact = _start(run, "flops")
        speeds = [p.tokens_per_second for p in run.train if math.isfinite(p.tokens_per_second)]
        rows.append(
            [
                label,
                *(_text(_get(run.config, "model", key)) for key in _SIZES),
                _text(_get(run.config, "parallel", "tensor_parallel_size")),
                _text(run.last.step),
                _text(int(run.last.tokens)),
                ("" if exact else "≈ ") + scientific(run.last.flops - start),
                scientific(run.last.flops),
                _text(run.final_loss),
                _text(run.best.loss if run.best else None),
                f"{median(speeds):,.0f}" if speeds else "–",
            ]
        )
    return rows


def summary_table(runs: Sequence[Run]) -> Table:
    """Return the summary of the runs for the terminal: what fits into 80 columns."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = [i for i, header in enumerate(_SUMMARY) if header not in ("heads", "FFN", "TP", "tokens", "best")]
    for i in columns:
        # Numbers are never broken; a long name is.
        header = "\n".join(_SUMMARY[i].split())
        table.add_column(header, justify="right" if i else "left", overflow="fold", no_wrap=bool(i), min_width=4)
    for row in _summary_rows(runs):
        table.add_row(*(Text(row[i]) for i in columns))
    return table


_COMPARISON = (
    *("run", "compared with", "which ends with held-out loss", "at FLOPs", "having reached it first at"),
    *("the run reaches it at", "so the run needs"),
)


def _comparison_rows(runs: Sequence[Run]) -> Rows:
    """Compare every run with every other, both ways, so that nothing is picked."""
    rows = []
    for (run, label), (reference, other) in permutations(zip(runs, _labels(runs), strict=True), 2):
        final = reference.validation[-1] if reference.validation else None
        row = [label, other, *(["–"] * 3)]
        if final is not None and math.isfinite(final.loss):
            first = flops_to_reach(reference.validation, final.loss)
            row[2:] = [_text(final.loss), _text(final.flops), _text(first)]
        savings = growth_savings(run, reference)
        if not run.validation or row[2] == "–":
            row += ["–", "no held-out loss to compare"]
        elif _held_out(run) != _held_out(reference):
            row += ["–", "not comparable: other held-out data"]
        elif savings is None or final is None:
            row += ["not reached", f"more than {_text(run.validation[-1].flops)}"]
        else:
            # There before the first measurement: how long before, nobody knows.
            bound = "≤ " if run.validation[0].loss <= final.loss else ""
            row += [bound + scientific((1 - savings) * final.flops)]
            row += [f"{abs(savings):.1%} {'fewer' if savings >= 0 else 'more'} FLOPs"]
        rows.append(row)
    return rows


_GROWTH = ("run", "grown from", "sizes", "parameters", "dtype", "MLM error", "NSP error", "loss before", "loss after")


def _growth_rows(runs: Sequence[Run]) -> Rows:
    rows = []
    for run, label in zip(runs, _labels(runs), strict=True):
        if run.growth is None:
            continue
        before, after = (_get(run.growth, key) or {} for key in ("from", "to"))
        changed = {k: (_text(before.get(k)), _text(v)) for k, v in after.items() if before.get(k) != v}
        check = ("dtype", "mlm_relative_error", "nsp_relative_error", "loss_before", "loss_after")
        rows.append(
            [
                label,
                _text(_get(run.growth, "source")),
                ", ".join(f"{_SIZES.get(k, k)} {old} → {new}" for k, (old, new) in changed.items()) or "–",
                " → ".join(_text(_get(run.growth, f"parameters_{when}")) for when in ("before", "after")),
                *(_text(_get(run.growth, "verification", key)) for key in check),
            ]
        )
    return rows


def _html_table(headers: Sequence[str], rows: Rows, text: Collection[int], empty: str) -> str:
    """Build a table; ``text`` numbers the columns that hold words."""
    if not rows:
        return f'<p class="empty">{escape(empty)}</p>'

    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = (' class="text"' if i in text else "" for i in range(len(row)))
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="card"><table><thead><tr>{cells("th", headers)}</tr></thead><tbody>{body}</tbody></table></div>'


def _curve(points: Sequence[Point], x: str, y: str) -> list[tuple[float, float]]:
    return [(float(getattr(p, x)), float(getattr(p, y))) for p in points]


def _held_out_lines(runs: Sequence[Run], x: str, y: str, suffix: str = "") -> list[Line]:
    named = zip(runs, _labels(runs), strict=True)
    return [Line(label + suffix, colour, _curve(run.validation, x, y)) for colour, (run, label) in enumerate(named)]


def _training_lines(runs: Sequence[Run], x: str, y: str) -> list[Line]:
    """Return what was logged, faint, and below it in the list, so drawn above, the same smoothed."""
    labels = _labels(runs)
    curves = [_curve(run.train, x, y) for run in runs]
    faint = [Line(labels[i], i, curve, "faint") for i, curve in enumerate(curves)]
    return faint + [Line(f"{labels[i]}, training", i, smooth(curve), "thin") for i, curve in enumerate(curves)]


def _charts(runs: Sequence[Run]) -> tuple[str, str]:
    """Return the headline figure and the others."""
    labels = _labels(runs)
    key = legend(labels)
    smoothed = "Faint: as logged. Line: mean over 5 % of the run."
    flops, tokens, step = Axis("training FLOPs", from_zero=True), Axis("tokens", from_zero=True), Axis("step")
    loss, accuracy = Axis("loss"), Axis("accuracy")

    def growths(count: str) -> list[Mark]:
        return [Mark(_start(run, count)[0], "growth", i) for i, run in enumerate(runs) if run.growth is not None]

    def figure(
        title: str, note: str, x: Axis, y: Axis, lines: list[Line], marks: Sequence[Mark] = (), width: int = 560
    ) -> str:
        svg = chart(title, x, y, lines, marks, (width, 400 if width > 560 else 320), cut_start=y is loss)
        return f"<figure><figcaption>{title}<small>{note}</small></figcaption>{key}{svg}</figure>"

    def both(y: str) -> list[Line]:
        return _training_lines(runs, "step", y) + _held_out_lines(runs, "step", y, ", held-out")

    held_out = _held_out_lines(runs, "flops", "loss")
    note = "MLM plus NSP loss on held-out text. A dashed vertical line: a smaller model was grown."
    headline = figure("Held-out loss over compute", note, flops, loss, held_out, growths("flops"), width=1140)

    training = _training_lines(runs, "flops", "loss")
    held_out = _held_out_lines(runs, "tokens", "loss")
    rates = [Line(labels[i], i, _curve(run.train, "step", "learning_rate"), "thin") for i, run in enumerate(runs)]
    norms, speeds = (_training_lines(runs, "step", y) for y in ("gradient_norm", "tokens_per_second"))
    figures = [
        figure("Training loss over compute", smoothed, flops, loss, training, growths("flops")),
        figure("Held-out loss over tokens", "As over compute.", tokens, loss, held_out, growths("tokens")),
        *(
            figure(f"{task}: {y.label}", f"Dots: held-out. {smoothed}", step, y, both(f"{name}_{y.label}"))
            for name, task in (("mlm", "Masked tokens (MLM)"), ("nsp", "Next sentence (NSP)"))
            for y in (loss, accuracy)
        ),
        figure("Learning rate", "As logged.", step, Axis("learning rate", from_zero=True), rates),
        figure("Gradient norm", smoothed, step, Axis("norm before clipping", log=True), norms),
        figure("Throughput", smoothed, step, Axis("tokens per second", from_zero=True), speeds),
    ]
    return headline, "".join(figures)


def write_report(runs: Sequence[Run], out: Path) -> None:
    """Write the report of the runs as one HTML file that needs nothing else; it appears whole or not at all.

    Raises:
        ConfigError: there is no run.
        MegacoreError: the file cannot be written.
    """
    if not runs:
        raise ConfigError(f"{out}: a report needs at least one run directory")
    headline, figures = _charts(runs)
    page = Template(files("launcher").joinpath("report.html").read_text(encoding="utf-8")).substitute(
        title=escape("megacore: " + ", ".join(_labels(runs))),
        summary=_html_table(_SUMMARY, _summary_rows(runs), {0}, ""),
        headline=f'<div class="wide">{headline}</div>',
        comparison=_html_table(
            _COMPARISON, _comparison_rows(runs), {0, 1}, "Needs two runs that measured a held-out loss."
        ),
        growth=_html_table(_GROWTH, _growth_rows(runs), {0, 1, 2}, "None of the runs began with a growth."),
        figures=figures,
    )
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # "replace": a directory's name need not be text.
        temporary.write_bytes(page.encode("utf-8", "replace"))
        os.replace(temporary, out)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise MegacoreError(f"{out}: cannot be written: {error}") from error
