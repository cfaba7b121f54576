"""Curves of held-out loss over FLOPs: what one saves against another, and how that looks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from growth_runs import Point

matplotlib.use("Agg")
from matplotlib import pyplot

TARGETS = 25
TITLES = {"bert": "BERT: width × 2", "llama": "LLaMA-like: width × 2, depth × 2"}


@dataclass(frozen=True)
class Curve:
    """Measurements at growing budgets."""

    points: tuple[Point, ...]

    @classmethod
    def of(cls, points: Iterable[Point]) -> Curve:
        """Put measurements in order."""
        return cls(tuple(sorted(points, key=lambda point: point.flops)))

    @property
    def lowest(self) -> float:
        """The lowest loss."""
        return min(point.loss for point in self.points)

    def flops_to(self, loss: float) -> float | None:
        """Return the FLOPs at which ``loss`` is first reached, their logarithm linear in the loss between two budgets.

        ``None`` if no budget reaches it. If the smallest one does, its FLOPs are an upper bound.
        """
        before = None
        for point in self.points:
            if point.loss <= loss:
                if before is None:
                    return point.flops
                share = (before.loss - loss) / (before.loss - point.loss)
                return math.exp((1 - share) * math.log(before.flops) + share * math.log(point.flops))
            before = point
        return None


def saving_at(curve: Curve, reference: Curve, loss: float) -> float | None:
    """Return the share of the reference's FLOPs that ``curve`` saves on the way to a loss; negative: it needs more."""
    needed, usual = curve.flops_to(loss), reference.flops_to(loss)
    return None if needed is None or usual is None else 1 - needed / usual


def savings(curve: Curve, reference: Curve) -> list[tuple[float, float | None]]:
    """Return the saving at each loss between those of the reference's smallest and largest budget."""
    targets = np.linspace(reference.points[0].loss, reference.points[-1].loss, TARGETS).tolist()
    return [(loss, saving_at(curve, reference, loss)) for loss in targets]


def draw(families: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Draw loss over FLOPs, and saving over loss: a column for each family, a line for each method and seed.

    Args:
        families: family -> seed -> method -> its figures.
        path: of the picture.
    """
    figure, axes = pyplot.subplots(2, len(families), figsize=(6.5 * len(families), 9), squeeze=False)
    for column, (family, seeds) in enumerate(families.items()):
        above, below = axes[0][column], axes[1][column]
        for number, (seed, methods) in enumerate(seeds.items()):
            for shade, (method, found) in enumerate(methods.items()):
                style = {"color": f"C{shade}", "linestyle": ("-", "--", ":")[number % 3], "marker": "."}
                label = f"{method}, seed {seed}"
                flops, losses = zip(*((point["flops"], point["loss"]) for point in found["points"]), strict=True)
                above.plot(flops, losses, label=label, **style)
                reached = [(loss, 100 * saved) for loss, saved in found["saved"] if saved is not None]
                if method != "scratch" and reached:
                    below.plot(*zip(*reached, strict=True), label=label, **style)
        above.set(xscale="log", xlabel="FLOPs, all stages counted", ylabel="held-out loss", title=TITLES[family])
        below.set(xlabel="target: held-out loss (from scratch, full budget: right end)", ylabel="FLOPs saved, %")
        below.axhline(0, color="grey", linewidth=0.8)
        below.invert_xaxis()
        for panel in (above, below):
            panel.legend(fontsize="small")
            panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
