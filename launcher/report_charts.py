"""Line charts as inline SVG: a scale, nice ticks and polylines; colours come from the page's style sheet.

Every number the page's script needs for its tooltip is on the element it belongs to, so a chart is one string.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np

Points = Sequence[tuple[float, float]]
COLOURS = 8
"""Colours of the style sheet (``.c0`` ...); further lines repeat them, dashed."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 22, 44
_MOST_POINTS = 600
_START_SHARE = 0.04
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Line:
    """One curve; ``colour`` numbers the run it belongs to. Faint lines have no tooltip."""

    label: str
    colour: int
    points: Points
    style: Literal["strong", "thin", "faint"] = "strong"


@dataclass(frozen=True)
class Axis:
    """What is measured along an axis, and how it is drawn."""

    label: str
    log: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line with a word, such as the moment of a growth."""

    x: float
    label: str
    colour: int


def scientific(value: float, digits: int = 2) -> str:
    """Write a number as in print, e.g. ``3.10×10¹²``; "–" for what is not a finite number."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}×{power_of_ten(int(exponent))}"


def power_of_ten(exponent: int) -> str:
    """Write ``10ⁿ``."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most ``most`` multiples of 1, 2, 2.5 or 5 times a power of ten within [low, high].

    A range without extent gives its one value.
    """
    if high <= low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 2.5, 5, 10, 20, 25, 50):
        step = factor * power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 <= most:
            break
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten within [low, high], with their 2 and 5 where there are few; linear ticks where none fit."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        ticks = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(ticks) >= 3:
            return ticks[:: math.ceil(len(ticks) / 8)]
    return linear_ticks(low, high)


def smooth(points: Points, share: float = 0.05) -> Points:
    """Average each value over a window of ``share`` of the points around it, cut off at both ends."""
    points = [p for p in points if math.isfinite(p[1])]
    reach = int(len(points) * share / 2)
    index = np.arange(len(points))
    first, last = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(points))
    sums = np.concatenate(([0.0], np.cumsum([y for _, y in points])))
    means = (sums[last] - sums[first]) / (last - first)
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def thin(points: Points, most: int = _MOST_POINTS) -> Points:
    """Keep about ``most`` points: of each bucket the lowest and the highest, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = [points[0]]
    for start in range(1, len(points) - 1, size):
        bucket = points[start : min(start + size, len(points) - 1)]
        extremes = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept.extend(sorted(extremes))
    return [*kept, points[-1]]


def css_class(colour: int) -> str:
    """Return the style-sheet classes of a run's colour."""
    return f"c{colour % COLOURS}" + (" dashed" if colour // COLOURS % 2 else "")


def legend(labels: Iterable[str]) -> str:
    """Return the HTML legend of the runs, in the order of their colours."""
    items = "".join(f'<li><i class="{css_class(i)}"></i>{escape(label)}</li>' for i, label in enumerate(labels))
    return f'<ul class="legend">{items}</ul>'


@dataclass(frozen=True)
class _Scale:
    """Maps [low, high] to pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)


def _scale(values: Sequence[float], axis: Axis, start: float, end: float) -> _Scale:
    low, high = min(values), max(values)
    if axis.from_zero:
        low = min(0.0, low)
    if axis.log:
        low, high = (low / 1.1, high * 1.1) if high < low * 1.2 else (low, high)
        margin = (high / low) ** 0.04
        return _Scale(low / margin, high * margin, start, end, True)
    if high - low <= 1e-9 * abs(high):
        low, high = (0.0, 2 * high) if high > 0 else (low - 1, high + 1)
    margin = 0.04 * (high - low)
    return _Scale(max(0.0, low - margin) if low >= 0 else low - margin, high + margin, start, end, False)


def _tick_texts(ticks: Sequence[float], log: bool) -> tuple[list[str], str]:
    """Return the ticks' texts and what they are multiplied by, e.g. (["0", "1.5"], " (×10¹⁴)")."""
    if log:
        return [scientific(t, 0).removeprefix("1×") if not 1e-3 < t < 1e4 else f"{t:g}" for t in ticks], ""
    largest = max(abs(t) for t in ticks)
    exponent = math.floor(math.log10(largest)) if largest and not 1e-2 <= largest < 1e5 else 0
    scaled = [t / 10.0**exponent for t in ticks]
    digits = next((d for d in range(6) if all(abs(t - round(t, d)) < 1e-6 for t in scaled)), 6)
    return [f"{t:,.{digits}f}" for t in scaled], f" (×{power_of_ten(exponent)})" if exponent else ""


def _drawable(line: Line, x: Axis, y: Axis) -> Points:
    """Leave out what is not a finite number, or has no place on a logarithmic axis."""
    low_x, low_y = (0.0 if axis.log else -math.inf for axis in (x, y))
    return [p for p in line.points if all(map(math.isfinite, p)) and p[0] > low_x and p[1] > low_y]


def _settled_top(curves: Iterable[Points]) -> float:
    """Return the highest value after the first few percent of the x axis: a random model's loss hides the rest."""
    points = [p for curve in curves for p in curve]
    low, high = min(p[0] for p in points), max(p[0] for p in points)
    return max(p[1] for p in points if p[0] >= low + _START_SHARE * (high - low))


def chart(
    title: str,
    x: Axis,
    y: Axis,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    size: tuple[int, int] = (560, 320),
    cut_start: bool = False,
) -> str:
    """Draw lines over common axes.

    Args:
        title: what a screen reader reads.
        x: horizontal axis.
        y: vertical axis.
        lines: the curves; those listed later are drawn above.
        marks: vertical lines.
        size: width and height in the pixels of the view box.
        cut_start: let the first few percent leave the chart at the top where they would flatten the rest; it says so.

    Returns:
        An ``<svg>`` element, or a paragraph where nothing was measured.
    """
    curves = [(line, _drawable(line, x, y)) for line in lines]
    curves = [(line, points) for line, points in curves if points]
    if not curves:
        return '<p class="empty">Nothing measured.</p>'
    width, height = size[0] - _LEFT - _RIGHT, size[1] - _TOP - _BOTTOM
    values = [p[1] for _, points in curves for p in points]
    top = _settled_top(points for _, points in curves) if cut_start else max(values)
    is_cut = max(values) - min(values) > 1.25 * (top - min(values))
    scale_x = _scale([p[0] for _, points in curves for p in points], x, 0, width)
    scale_y = _scale([min(v, top) for v in values] if is_cut else values, y, height, 0)

    parts = [
        f'<svg class="chart" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(title)}">',
        *_axes(scale_x, scale_y, x, y, width, height),
        f'<svg class="plot" x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}"'
        f' overflow="{"hidden" if is_cut else "visible"}" data-x="{_domain(scale_x)}" data-y="{_domain(scale_y)}"'
        f' data-x-label="{escape(x.label)}">',
        f'<rect class="surface" width="{width}" height="{height}"/>',
    ]
    for mark in marks:
        if scale_x.low <= mark.x <= scale_x.high:
            parts.append(_mark(mark, scale_x(mark.x), width, height))
    parts += [_curve(line, thin(points), scale_x, scale_y) for line, points in curves]
    parts.append(f'<line class="cursor" y2="{height}" visibility="hidden"/></svg>')
    if is_cut:
        parts.append(
            f'<text class="note" x="{size[0] - _RIGHT}" y="{_TOP - 8}" text-anchor="end">'
            f"axis cut: the first values reach {max(values):.4g}</text>"
        )
    return "".join([*parts, "</svg>"])


def _domain(scale: _Scale) -> str:
    return f"{scale.low:.9g} {scale.high:.9g} {int(scale.log)}"


def _axes(scale_x: _Scale, scale_y: _Scale, x: Axis, y: Axis, width: int, height: int) -> Iterable[str]:
    bottom = _TOP + height
    texts, factor = _tick_texts(scale_y.ticks(), y.log)
    yield f'<text class="axis" x="2" y="{_TOP - 8}">{escape(y.label)}{factor}</text>'
    for value, text in zip(scale_y.ticks(), texts, strict=True):
        position = f"{_TOP + scale_y(value):.1f}"
        yield f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + width}" y1="{position}" y2="{position}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{position}" dy=".32em" text-anchor="end">{text}</text>'
    texts, factor = _tick_texts(scale_x.ticks(), x.log)
    yield f'<line class="base" x1="{_LEFT}" x2="{_LEFT + width}" y1="{bottom}" y2="{bottom}"/>'
    for value, text in zip(scale_x.ticks(), texts, strict=True):
        position = f"{_LEFT + scale_x(value):.1f}"
        yield f'<line class="base" x1="{position}" x2="{position}" y1="{bottom}" y2="{bottom + 4}"/>'
        yield f'<text class="tick" x="{position}" y="{bottom + 17}" text-anchor="middle">{text}</text>'
    yield (
        f'<text class="axis" x="{_LEFT + width}" y="{bottom + 36}" text-anchor="end">{escape(x.label)}{factor}</text>'
    )


def _mark(mark: Mark, position: float, width: int, height: int) -> str:
    is_right = position > width / 2
    label = f'x="{position + (-6 if is_right else 6):.1f}" y="12" text-anchor="{"end" if is_right else "start"}"'
    return (
        f'<line class="mark {css_class(mark.colour)}" x1="{position:.1f}" x2="{position:.1f}" y2="{height}"/>'
        f'<text class="note" {label}>{escape(mark.label)}</text>'
    )


def _curve(line: Line, points: Points, scale_x: _Scale, scale_y: _Scale) -> str:
    pixels = [(f"{scale_x(x):.2f}", f"{scale_y(y):.2f}") for x, y in points]
    label = "" if line.style == "faint" else f' data-label="{escape(line.label)}"'
    drawn = " ".join(f"{x},{y}" for x, y in pixels)
    text = f'<polyline class="{line.style} {css_class(line.colour)}"{label} points="{drawn}"/>'
    # One point has no line to it; few points are shown as the measurements they are.
    if len(points) == 1 or (line.style == "strong" and len(points) <= 60):
        text += "".join(f'<circle class="{css_class(line.colour)}" cx="{x}" cy="{y}" r="2.8"/>' for x, y in pixels)
    return text
