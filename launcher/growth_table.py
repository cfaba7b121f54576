"""A growth plan as a table: every parameter once, layers that grow alike in one row."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from rich.table import Table

if TYPE_CHECKING:
    from megacore.growth.describe import Dtypes, Note
    from megacore.growth.plan import GrowthPlan

_LAYER = re.compile(r"((?:.*\.)?layers\.)(\d+)\.(.+)")


class _Row(NamedTuple):
    """What is said of a parameter, without its name."""

    shape: str
    steps: str
    multipliers: str
    weights: str
    moments: str


def growth_table(plan: GrowthPlan, dtypes: Dtypes, moments: bool) -> Table:
    """Make the table; layers of the same stack whose parameters all grow alike share their rows."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("parameter", "shape", "what is done", "lr, eps", "weights", "moments"):
        table.add_column(column, overflow="fold")
    for name, row in _folded({name: _row(plan, name, dtypes, moments) for name in plan.specs}):
        table.add_row(name, *row)
    return table


def _row(plan: GrowthPlan, name: str, dtypes: Dtypes, moments: bool) -> _Row:
    from megacore.growth.describe import parameter_notes, steps

    found = parameter_notes(plan, name, dtypes, moments)
    factors = plan.learning_rate_multiplier(name), plan.adam_eps_multiplier(name)
    return _Row(
        "×".join(f"{size}" for size in plan.specs[name].shape),
        "; ".join(steps(plan, name)) or "copied",
        "" if factors == (1.0, 1.0) else ", ".join(f"×{factor:.3g}" for factor in factors),
        _words(found, "function"),
        _words(found, "optimizer") if moments else "none",
    )


def _words(found: Sequence[Note], about: str) -> str:
    return ", ".join(note.name for note in found if note.about == about) or "exact"


def _folded(rows: dict[str, _Row]) -> Iterator[tuple[str, _Row]]:
    layers: dict[tuple[str, str], dict[str, _Row]] = defaultdict(dict)
    for name, row in rows.items():
        if match := _LAYER.fullmatch(name):
            layers[match[1], match[2]][match[3]] = row
    alike: dict[tuple[str, tuple[tuple[str, _Row], ...]], list[int]] = defaultdict(list)
    for (stack, number), content in layers.items():
        alike[stack, tuple(content.items())].append(int(number))
    shown = set()
    for name, row in rows.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            yield name, row
            continue
        group = match[1], tuple(layers[match[1], match[2]].items())
        if group not in shown:
            shown.add(group)
            for rest, same in group[1]:
                yield f"{match[1]}{_runs(alike[group])}.{rest}", same


def _runs(numbers: Sequence[int]) -> str:
    """Write numbers as runs: 0-2,5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
