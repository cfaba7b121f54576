"""Checkpoints against plain file copies: cutting a 1.3B-parameter model anew, and saving beside training.

    python bench/checkpoint.py            # 1.3B parameters in bf16, about 8 GB of disk under TMPDIR
    python bench/checkpoint.py --small    # a tenth of it, under 2 minutes

The last line is one JSON object:

- ``reshard_vs_cp``: wall time of ``megacore convert``, TP 2 × PP 2 to TP 4, by that of ``cp -r`` of the same bytes,
  both flushed to the disk;
- ``reshard_rss_excess_mb``: its peak resident memory beyond twice the largest target shard of a tensor;
- ``ranks2_speedup``: one rank's time by two ranks', the start of ``mpirun`` included;
- ``ranks1_vs_disk``, ``ranks2_vs_disk``: the time that the command says it took, without its start, by that of two
  ``dd`` that write as many zeros past the page cache, which is what the disk gives;
- ``async_stall_ratio``: by how much a save in the background makes its step longer (the call, the copy beside it, and
  what the update waits for the copy), by the time of a waiting save; ``async_contention_ratio``: by how much it makes
  the steps longer that share processors and memory with the writing, together, by the same;
- ``open_10k_files_s``: seconds to open a checkpoint of 10,000 files and 1,000 layers.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import flush, peak_of, said_by, seconds_of, zeros_by_two
from random_checkpoint import described, write_random

from launcher.start import megacore_command, mpi_command
from megacore.checkpoint.files import plan_files
from megacore.checkpoint.manifest import (
    MANIFEST,
    MOMENTS,
    WEIGHT,
    FileRecord,
    Layout,
)
from megacore.checkpoint.reader import CheckpointReader
from megacore.communicator import Alone
from megacore.model_config import ModelConfig
from megacore.models.transformer import declarations
from megacore.settings import validated
from megacore.specs import Region, Shard, region_shape
from megacore.training.saver import Saver

SOURCE = Layout(tensor_parallel_size=2, pipeline_parallel_size=2)
TARGET_PARTS = 4
FILES, LAYERS = 10_000, 1000


def copied(source: Path, target: Path) -> None:
    """Copy as ``cp -r`` does, and flush."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    flush(target)


def resharding(folder: Path, model: ModelConfig, rounds: int) -> dict[str, float]:
    """Measure conversions and copies in turn, each right after an unmeasured one of its kind.

    A virtual machine may give freed memory back to its host, and is several times slower to write a file into memory
    that it must get anew: so each run finds what a run of its own kind has left.
    """
    source, target = folder / "source", folder / "target"
    write_random(source, model, SOURCE)
    words = ("convert", source, target, f"tensor_parallel_size={TARGET_PARTS}")
    size = described(model, SOURCE).num_parameters * 2
    peak = peak_of(megacore_command(*words))
    shutil.rmtree(target)
    runs = {
        "cp": partial(copied, source, target),
        "one": partial(said_by, megacore_command(*words)),
        "disk": partial(zeros_by_two, target, size),
        "two": partial(said_by, mpi_command(2, *words)),
    }
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for who, run in runs.items():
            run()
            shutil.rmtree(target)
            seconds, said = seconds_of(run)
            times[who].append(seconds)
            if said:  # "TARGET: megacore → megacore, 1.7 s with 2 ranks"
                times[f"{who} moving"].append(float(said.split()[-5]))
            shutil.rmtree(target)
    shutil.rmtree(source)
    shard = Shard(0, TARGET_PARTS)
    largest = max(math.prod(region_shape(spec.local_region(shard))) * 2 for spec in declarations(model).values())
    median = {who: statistics.median(values) for who, values in times.items()}
    print(f"{size / 1e9:.2f} GB: " + ", ".join(f"{who} {seconds:.2f} s" for who, seconds in median.items()))
    print(f"peak of one rank: {peak / 1e6:.0f} MB; largest target shard {largest / 1e6:.0f} MB")
    return {
        "reshard_vs_cp": median["one"] / median["cp"],
        "reshard_rss_excess_mb": (peak - 2 * largest) / 1e6,
        "ranks2_speedup": median["one"] / median["two"],
        "ranks1_vs_disk": median["one moving"] / median["disk"],
        "ranks2_vs_disk": median["two moving"] / median["disk"],
    }


def stall(folder: Path, model: ModelConfig, rounds: int) -> dict[str, float]:
    """Return what a background save costs training, by what a waiting one does: weights and moments, fp32."""
    specs = declarations(model)
    values = {name: np.ones(spec.shape, np.float32) for name, spec in specs.items()}
    states = (WEIGHT, *MOMENTS)
    files = plan_files(
        specs, states, Layout(), lambda name, state: "float32", lambda name, state, region: _cut(values[name], region)
    )
    pieces, manifest = [piece for _, file in files for piece in file], described(model, Layout())
    torch.set_num_threads(1)
    a, b = torch.randn(2, 768, 768)

    def step(saver: Saver) -> float:
        """Compute for some tenths of a second, and come to the update of the weights."""
        began = time.perf_counter()
        for _ in range(30):
            torch.mm(a, b)
        saver.wait_for_copy()
        return time.perf_counter() - began

    def saved(saver: Saver) -> tuple[float, float]:
        """Return the seconds by which a save makes its step longer, and the steps beside the writing, together."""
        done: list[float] = []
        held, _ = seconds_of(
            lambda: saver.save(folder / "save", pieces, manifest, lambda: done.append(time.perf_counter()))
        )
        beside = []
        while not done:
            beside.append(step(saver))
        saver.wait()
        usual = statistics.median(step(saver) for _ in range(10))
        shutil.rmtree(folder / "save")
        first, others = beside[:1], beside[1:]
        longer = [statistics.median(part) - usual if part else 0.0 for part in (first, others)]
        return held + longer[0], len(others) * longer[1]

    beside, waiting = Saver(Alone(), in_background=True), Saver(Alone(), in_background=False)
    saved(beside)  # makes the memory for the copy
    times = [(saved(waiting)[0], *saved(beside)) for _ in range(rounds)]
    wait, own, others = (statistics.median(column) for column in zip(*times, strict=True))
    size = 3 * sum(array.nbytes for array in values.values())
    print(
        f"save of {size / 1e9:.2f} GB: waiting {wait:.2f} s; in the background its step +{own:.2f} s, "
        f"the steps beside it +{others:.2f} s"
    )
    return {"async_stall_ratio": own / wait, "async_contention_ratio": others / wait}


def opening(folder: Path) -> float:
    """Return how long it takes to open a checkpoint of many files, none of which need be there for that."""
    model = validated(ModelConfig, {"preset": "llama-1b3", "num_hidden_layers": LAYERS})
    manifest = described(model, Layout(data_parallel_size=FILES))
    bounds = [number * len(manifest.parameters) // FILES for number in range(FILES + 1)]
    files = {
        f"rank{number:05d}.safetensors": FileRecord(
            size=1 << 30,
            header=f"{number:032x}",
            states={"weight": "float32", "exp_avg": "float32", "exp_avg_sq": "float32"},
            holds=((bounds[number], max(bounds[number] + 1, bounds[number + 1])),),
        )
        for number in range(FILES)
    }
    (folder / MANIFEST).write_text(manifest.model_copy(update={"files": files}).to_json())
    seconds, _ = seconds_of(partial(CheckpointReader, folder))
    print(f"{FILES:,} files, {len(manifest.parameters):,} parameters: opened in {seconds:.2f} s")
    return seconds


def _cut(values: np.ndarray[Any, Any], region: Region) -> np.ndarray[Any, Any]:
    return values[tuple(slice(*bounds) for bounds in region)]


def main() -> None:
    """Measure, and print the figures as the last line."""
    parser = argparse.ArgumentParser(description="Checkpoints against plain file copies.")
    parser.add_argument("--small", action="store_true", help="a tenth of the size: under 2 minutes")
    small = parser.parse_args().small
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048}
    model = validated(ModelConfig, {"preset": "llama-1b3", **(sizes if small else {})})
    saved = validated(ModelConfig, {"preset": "llama-1b3", **sizes})
    with tempfile.TemporaryDirectory() as folder:
        figures = resharding(Path(folder), model, rounds=3 if small else 5)
        figures |= stall(Path(folder), saved, rounds=5)
        figures["open_10k_files_s"] = opening(Path(folder))
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
