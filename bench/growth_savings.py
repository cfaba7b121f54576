"""Does growth pay? FLOPs to a held-out loss, grown against from scratch, the small model's training counted.

A BERT (MLM + NSP; small model: half the width) and a LLaMA-like model (small: half the width and half the depth) are
trained on the same text, in the same order, with the same batches, by megacore's own commands:

- *scratch*: the learning rate is the best of a grid, by the loss at the end of the full budget (20 tokens or more for
  each parameter outside the tables); a grid whose best value is at its edge is widened;
- *mapped*: a small model, stopped before its decay, grown with its optimizer, multipliers, noise and uneven shares;
- *reset*: the same with a new optimizer, warmed up again; *symmetric*: the same as mapped with equal copies;
- *stacked* (LLaMA-like): a model of the target's width and half its depth, its layers repeated as in G_stack.

Every method is measured at several budgets, each with a learning-rate decay of its own (a branch of the constant part),
and charged what lies on the path to that measurement. Between budgets, the logarithm of the FLOPs is linear in the
loss. The saving at a loss is one minus the ratio of the method's FLOPs to the baseline's; targets are all losses
between the baseline's shortest and full budget. When to grow, and how long the multipliers hold, is chosen on the first
seed; all that was tried is in the figures.

    python bench/growth_savings.py --input TEXT.jsonl    # hours; 30 MB of text or more, .jsonl or .txt
    python bench/growth_savings.py --small               # within 10 minutes, on the embedded corpus

Without ``--input`` the text is $MEGACORE_TEXT, in the format of ``megacore data`` (``inputs``). A study that was
stopped goes on when the same command is given again. ``--small`` tests the way; its figures say nothing. The last line
is one JSON object: ``saved_bert`` and ``saved_llama`` are the fractions that *mapped* saves at the baseline's final
loss, for the worst seed (``null``: that loss was not reached), then the other methods'. ``growth-savings.json`` and
``growth-savings.png`` (needs matplotlib), in the output directory, hold all the rest.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from growth_curves import Curve, draw, saving_at, savings
from growth_runs import Line, Origin, Point, execute, first_point, grown, last_point, say, side_by_side, stacked

SEQUENCE_LENGTH = 128
LEAST_TEXT_MB = 30
BERT: dict[str, Any] = {"objective": "mlm_nsp", "position_embedding": "rotary", "initializer_range": 0.05}
"""Rotary positions: with learned ones, models of this size stayed at the tokens' frequencies in trials of up to 2,150
steps, where these leave them after 200."""
LLAMA: dict[str, Any] = {"preset": "llama-1b3"}
COMMON: dict[str, Any] = {"max_position_embeddings": SEQUENCE_LENGTH, "hidden_dropout": 0.0, "attention_dropout": 0.0}


@dataclass(frozen=True)
class Family:
    """A model to reach, the small one to grow, and the shallow one to stack.

    Args:
        objective: of the data.
        target: the configuration.
        small: the keys in which the small model differs.
        shallow: those of the model whose layers are stacked; none: there is no such comparison.
    """

    objective: str
    target: dict[str, Any]
    small: dict[str, int]
    shallow: dict[str, int] | None = None


@dataclass(frozen=True)
class Growth:
    """When to grow, and how long the multipliers hold, and take to go to one: shares of the baseline's steps."""

    at: float
    hold: float


@dataclass(frozen=True)
class Setting:
    """How large the study is; steps are given as shares of ``steps``, the baseline's full budget."""

    steps: int
    batch_size: int
    warmup: int
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    widenings: int
    """How often a grid of learning rates may be widened."""
    explored: tuple[Growth, ...]
    scratch_budgets: tuple[float, ...]
    grown_budgets: tuple[float, ...]
    """Steps after the growth."""
    explored_budgets: tuple[float, ...]
    """Those of them that growths are compared at."""
    vocab_size: int
    tokenizer_sentences: int
    validation_fraction: float
    decay: float = 0.2

    def count(self, share: float) -> int:
        """Return a share of the baseline's steps."""
        return round(share * self.steps)

    def counts(self, shares: Sequence[float]) -> list[int]:
        """Return several."""
        return [self.count(share) for share in shares]


FULL = Setting(
    steps=5000,
    batch_size=16,
    warmup=200,
    seeds=(1, 2),
    rates=(1e-3, 2e-3, 4e-3),
    widenings=2,
    explored=(Growth(0.15, 0.1), Growth(0.3, 0.1), Growth(0.5, 0.1), Growth(0.3, 0.0)),
    scratch_budgets=(0.25, 0.4, 0.55, 0.7, 0.85, 1.0),
    grown_budgets=(0.15, 0.3, 0.45, 0.6, 0.8),
    explored_budgets=(0.3, 0.45),
    vocab_size=2048,
    tokenizer_sentences=100_000,
    validation_fraction=0.003,
)
SMALL = replace(
    FULL,
    steps=240,
    warmup=20,
    seeds=(1,),
    rates=(2e-3,),
    widenings=0,
    explored=(Growth(0.3, 0.1),),
    scratch_budgets=(0.5, 1.0),
    grown_budgets=(0.3, 0.6),
    explored_budgets=(0.3,),
    tokenizer_sentences=10_000,
    validation_fraction=0.01,
)


def families(setting: Setting) -> dict[str, Family]:
    """Return the models: 0.47 and 0.44 million parameters outside the tables."""
    sizes = {"vocab_size": setting.vocab_size, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    narrow = {"hidden_size": 48, "num_attention_heads": 2}
    return {
        "bert": Family(
            "mlm_nsp", {**COMMON, **BERT, **sizes, "intermediate_size": 384}, {**narrow, "intermediate_size": 192}
        ),
        "llama": Family(
            "lm",
            {**COMMON, **LLAMA, **sizes, "num_key_value_heads": 4, "intermediate_size": 256},
            {**narrow, "num_key_value_heads": 2, "intermediate_size": 128, "num_hidden_layers": 2},
            shallow={"num_hidden_layers": 2},
        ),
    }


METHODS: dict[str, tuple[str, ...]] = {
    "mapped": (),
    "reset": ("--optimizer", "reset"),
    "symmetric": ("--symmetry", "none"),
}
"""Growths with ``megacore grow``, and its options beside the sizes and the multipliers' steps."""
STACKED = "stacked"


class Study:
    """One family's part of the study; its methods are called in the order in which they stand here.

    Args:
        name: of the family.
        family: its models.
        setting: how large the study is.
        root: everything is written below it.
        text: the corpus.
    """

    def __init__(self, name: str, family: Family, setting: Setting, root: Path, text: Path | None) -> None:
        self.name, self._family, self._setting, self._text = name, family, setting, text
        self._root = root / name
        self._first = setting.seeds[0]
        self._rates: dict[str, float] = {}
        self._growths: dict[str, Growth] = {}
        self.figures: dict[str, Any] = {"learning_rates": {}, "explored": {}, "at_growth": {}}
        self._ends: dict[tuple[str, int], dict[int, Point]] = {}

    # Data and learning rates

    def make_data(self) -> None:
        """Write the instances."""
        data = self._root / "data"
        if (data / "complete").exists():
            return
        data.mkdir(parents=True, exist_ok=True)
        text = self._text
        if text is None:
            text = data / "corpus.jsonl"
            execute(data / "data.log", "data", "corpus", text)
        settings = {
            "inputs": [str(text.resolve())],
            "output_dir": str(data),
            "objective": self._family.objective,
            "sequence_length": SEQUENCE_LENGTH,
            "vocab_size": self._setting.vocab_size,
            "tokenizer_sentences": self._setting.tokenizer_sentences,
            "validation_fraction": self._setting.validation_fraction,
        }
        config = data / "data.yaml"
        config.write_text(yaml.safe_dump(settings))
        for step in ("tokenizer", "build", "instances"):
            if step != "tokenizer" or not (data / "tokenizer.model").exists():
                execute(data / "data.log", "data", step, config)
        (data / "complete").touch()
        say(f"{self.name}: instances of {text.stat().st_size / 1e6:.0f} MB of text")

    def tune(self, kind: str) -> None:
        """Choose the learning rate of ``target`` or ``small``, on the first seed."""
        losses: dict[float, float] = {}
        rates = sorted(self._setting.rates)
        for widening in range(self._setting.widenings + 1):
            for rate in rates:
                if rate not in losses:
                    losses[rate] = self._tuned_loss(kind, rate)
            best = min(losses, key=lambda rate: losses[rate])
            if widening == self._setting.widenings or best not in (rates[0], rates[-1]):
                break
            rates = [best / 2, *rates] if best == rates[0] else [*rates, best * 2]
        self._rates[kind] = best
        self.figures["learning_rates"][kind] = {f"{rate:g}": loss for rate, loss in losses.items()}
        say(f"{self.name} {kind}: learning rate {best:g} of " + ", ".join(f"{r:g}: {losses[r]:.4f}" for r in rates))

    def _tuned_loss(self, kind: str, rate: float) -> float:
        if kind == "small":
            end = self._setting.count(max(growth.at for growth in self._setting.explored))
            return self._line("small", self._first, rate).branches([end])[end].loss
        budgets = self._setting.counts(self._setting.scratch_budgets)
        return self._line("scratch", self._first, rate).branches(budgets, [max(budgets)])[max(budgets)].loss

    # Trunks to grow from, and the baseline

    def train_scratch(self, seed: int) -> None:
        """Measure the baseline at all its budgets."""
        line = self._line("scratch", seed, self._rates["target"])
        self._ends["scratch", seed] = line.branches(self._setting.counts(self._setting.scratch_budgets))

    def train_source(self, kind: str, seed: int) -> dict[int, Origin]:
        """Train the ``small`` or ``shallow`` model, at a constant learning rate, to every step that it is grown at."""
        rate = self._rates["small" if kind == "small" else "target"]
        steps = self._setting.counts([growth.at for growth in self._setting.explored])
        return self._line(kind, seed, rate, "source").trunk(steps)

    def sources(self) -> list[str]:
        """Name the kinds of models that are grown."""
        return ["small", "shallow"] if self._family.shallow else ["small"]

    # Growing

    def methods(self) -> list[str]:
        """Name the ways to grow."""
        return [*METHODS, STACKED] if self._family.shallow else list(METHODS)

    def choose_growth(self, method: str) -> None:
        """Choose when to grow, and how long the multipliers hold, on the first seed."""
        tried = list(self._setting.explored)
        if method == STACKED:  # has no multipliers
            tried = [Growth(at, 0.0) for at in sorted({growth.at for growth in tried})]
        curves = {}
        for growth in tried:
            points = self._grown(method, self._first, growth, self._setting.explored_budgets)
            curves[growth] = Curve.of(points.values())
        common = max(curve.lowest for curve in curves.values())
        reached = {growth: curve.flops_to(common) for growth, curve in curves.items()}
        self._growths[method] = min(tried, key=lambda growth: reached[growth] or float("inf"))
        self.figures["explored"][method] = {
            "loss": common,
            "tried": [
                {**asdict(g), "flops_to_loss": reached[g], "points": [asdict(p) for p in curves[g].points]}
                for g in tried
            ],
        }
        say(f"{self.name} {method}: {self._growths[method]}")

    def train_grown(self, method: str, seed: int) -> None:
        """Measure a way to grow at all its budgets."""
        growth = self._growths.get(method, self._growths["mapped"])
        self._ends[method, seed] = self._grown(method, seed, growth, self._setting.grown_budgets)

    def _grown(self, method: str, seed: int, growth: Growth, budgets: Sequence[float]) -> dict[int, Point]:
        setting, kind = self._setting, "shallow" if method == STACKED else "small"
        source = self.train_source(kind, seed)[setting.count(growth.at)]
        line = self._line(f"{method}-at{growth.at:g}-hold{growth.hold:g}", seed, self._rates["target"])
        start = line.directory / "start"
        if method == STACKED:
            origin = stacked(source, start, self._family.target["num_hidden_layers"])
        else:
            sizes = [f"{key}={self._family.target[key]}" for key in self._family.small]
            hold = str(setting.count(growth.hold))
            multipliers = ("--hold-steps", hold, "--anneal-steps", hold)
            origin = grown(source, start, [*sizes, *METHODS[method], *multipliers])
        warmup = setting.warmup if method == "reset" else 0
        line = replace(line, origin=origin, warmup=warmup)
        points = line.branches(setting.counts(setting.grown_budgets), setting.counts(budgets))
        first = f"trunk-{line.leave(setting.count(min(setting.grown_budgets))):05d}"
        before, after = last_point(source.checkpoint.parents[1]).loss, first_point(line.directory / first).loss
        self.figures["at_growth"][line.directory.name] = {"before": before, "after": after}
        return points

    def _line(self, what: str, seed: int, rate: float, purpose: str = "") -> Line:
        kinds = {"small": self._family.small, "shallow": self._family.shallow or {}}
        data = self._root / "data" / "instances"
        return Line(
            self._root / f"{what}{purpose and '-'}{purpose}-lr{rate:g}-seed{seed}",
            {**self._family.target, **kinds.get(what, {})},
            {
                "seed": seed,
                "global_batch_size": self._setting.batch_size,
                "micro_batch_size": self._setting.batch_size,
                "adam_beta2": 0.98,
                "eval_samples": 1_000_000,  # all
            },
            {"train_data": str(data / "train"), "validation_data": str(data / "validation")},
            rate,
            self._setting.decay,
            warmup=self._setting.warmup,
        )

    # Figures

    def finish(self) -> dict[str, Any]:
        """Return all figures of the family."""
        seeds = {}
        for seed in self._setting.seeds:
            curves = {method: Curve.of(self._ends[method, seed].values()) for method in ("scratch", *self.methods())}
            seeds[str(seed)] = {
                method: {
                    "points": [asdict(point) for point in curve.points],
                    "saved": savings(curve, curves["scratch"]),
                    "saved_at_end": saving_at(curve, curves["scratch"], curves["scratch"].points[-1].loss),
                }
                for method, curve in curves.items()
            }
        tokens = [max(p.tokens for p in self._ends["scratch", seed].values()) for seed in self._setting.seeds]
        return {
            **self.figures,
            "growth": {method: asdict(growth) for method, growth in self._growths.items()},
            "baseline_tokens": tokens,
            "seeds": seeds,
        }


def described(text: Path | None) -> dict[str, Any]:
    """Say which text a study was made on."""
    if text is None:
        return {"file": "the embedded corpus"}
    with text.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": text.name, "bytes": text.stat().st_size, "sha256": digest}


def worst(figures: dict[str, Any], method: str) -> float | None:
    """Return what a method saves at the baseline's final loss, for the worst seed."""
    saved = [seed[method]["saved_at_end"] for seed in figures["seeds"].values()]
    return None if None in saved else round(min(saved), 3)


def run(studies: Sequence[Study], seeds: Sequence[int], jobs: int) -> None:
    """Run the studies; what does not wait for each other runs side by side."""
    side_by_side([study.make_data for study in studies], jobs)
    kinds = ("target", "small")
    side_by_side([partial(study.tune, kind) for kind in kinds for study in studies], jobs)
    side_by_side([partial(study.train_scratch, seed) for seed in seeds for study in studies], jobs)
    sources = [(study, kind, seed) for study in studies for kind in study.sources() for seed in seeds]
    side_by_side([partial(study.train_source, kind, seed) for study, kind, seed in sources], jobs)
    chosen = [(study, method) for study in studies for method in study.methods() if method in ("mapped", STACKED)]
    side_by_side([partial(study.choose_growth, method) for study, method in chosen], jobs)
    rest = [(study, method, seed) for seed in seeds for study in studies for method in study.methods()]
    side_by_side([partial(study.train_grown, method, seed) for study, method, seed in rest], jobs)


def main() -> None:
    """Run the study, and print the figures as the last line."""
    parser = argparse.ArgumentParser(description="FLOPs to a held-out loss: grown against from scratch.")
    parser.add_argument("--small", action="store_true", help="a test of the way, within 10 minutes")
    text = os.environ.get("MEGACORE_TEXT")
    parser.add_argument("--input", type=Path, default=text and Path(text), help="the text, .jsonl or .txt")
    parser.add_argument("--families", nargs="+", choices=["bert", "llama"], default=["bert", "llama"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="stages to run side by side")
    parser.add_argument("--out", type=Path, help="default: runs/growth-savings, runs/growth-savings-small")
    parser.add_argument("--results", type=Path, help="also copy figures and plot to this directory")
    given = parser.parse_args()
    setting = SMALL if given.small else FULL
    if not given.small and (given.input is None or given.input.stat().st_size < LEAST_TEXT_MB * 1e6):
        raise SystemExit(f"give a text of {LEAST_TEXT_MB} MB or more: --input FILE, or MEGACORE_TEXT=FILE; or --small")
    out = given.out or Path("runs/growth-savings-small" if given.small else "runs/growth-savings")
    known = families(setting)
    studies = [Study(name, known[name], setting, out.resolve(), given.input) for name in given.families]
    run(studies, setting.seeds, given.jobs)
    figures = {
        "text": described(given.input),
        "setting": asdict(setting),
        **{study.name: study.finish() for study in studies},
    }
    (out / "growth-savings.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draw({study.name: figures[study.name]["seeds"] for study in studies}, out / "growth-savings.png")
    if given.results:
        given.results.mkdir(parents=True, exist_ok=True)
        for name in ("growth-savings.json", "growth-savings.png"):
            shutil.copy(out / name, given.results)
    line = {f"saved_{study.name}": worst(figures[study.name], "mapped") for study in studies}
    for study in studies:
        others = [method for method in study.methods() if method != "mapped"]
        line |= {f"saved_{study.name}_{method}": worst(figures[study.name], method) for method in others}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
