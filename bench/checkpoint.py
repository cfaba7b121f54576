"""Checkpoints against plain file copies: cutting a 1.3B-parameter model anew, and saving beside training.

    python bench/checkpoint.py            # 1.3B parameters in bf16, about 6 GB of disk under TMPDIR
    python bench/checkpoint.py --small    # a tenth of it, under 2 minutes

The last line is one JSON object: ``reshard_vs_cp`` (wall time of ``megacore convert``, TP 2 × PP 2 to TP 4, by that of
a copy of the same bytes, both flushed to the disk), ``reshard_rss_excess_mb`` (its peak resident memory beyond twice
the largest target shard of a tensor), ``ranks2_speedup`` (one rank's time by two ranks'), ``async_stall_ratio`` (what a
save in the background adds to a step, by what a waiting save adds).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from launcher.start import megacore_command, mpi_command
from megacore.checkpoint.files import plan_files
from megacore.checkpoint.manifest import MOMENTS, WEIGHT, Layout, Manifest, Progress, parameter_records
from megacore.checkpoint.writer import write_checkpoint
from megacore.communicator import Alone
from megacore.model_config import ModelConfig
from megacore.models.transformer import declarations
from megacore.settings import validated
from megacore.specs import Region, Shard, region_shape
from megacore.training.saver import Saver

SOURCE = Layout(tensor_parallel_size=2, pipeline_parallel_size=2)
TARGET_PARTS = 4


def write_random(path: Path, model: ModelConfig) -> None:
    """Write a checkpoint of random bf16 weights in files for TP 2 × PP 2."""
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32)

    def box(name: str, state: str, region: Region) -> np.ndarray[Any, Any]:
        return np.resize(noise, region_shape(region))

    specs = declarations(model)
    files = plan_files(specs, (WEIGHT,), SOURCE, lambda name, state: "bfloat16", box)
    write_checkpoint(path, Alone(), files, partial(_manifest, model))


def _manifest(model: ModelConfig, files: Any) -> Manifest:
    specs = declarations(model)
    records = parameter_records(specs, dict.fromkeys(specs, (1.0, 1.0)))
    return Manifest(model=model, layout=SOURCE, progress=Progress(), parameters=records, files=files)


def copied(source: Path, target: Path) -> None:
    """Copy as ``cp -r`` does, and flush."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in target.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def seconds_of(run: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    os.sync()
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def command(words: list[str]) -> None:
    """Run a command of one thread for each process."""
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def resharding(folder: Path, model: ModelConfig, rounds: int) -> dict[str, float]:
    """Measure conversions and copies in turn."""
    source, target = folder / "source", folder / "target"
    write_random(source, model)
    words = ("convert", source, target, f"tensor_parallel_size={TARGET_PARTS}")
    times: dict[str, list[float]] = {"cp": [], "one": [], "two": []}
    peak = 0
    for _ in range(rounds):
        for who, run in (
            ("cp", partial(copied, source, target)),
            ("one", partial(command, megacore_command(*words))),
            ("two", partial(command, mpi_command(2, *words))),
        ):
            times[who].append(seconds_of(run))
            shutil.rmtree(target)
            if who == "one" and not peak:  # before mpirun's children are counted
                peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    shard = Shard(0, TARGET_PARTS)
    largest = max(math.prod(region_shape(spec.local_region(shard))) * 2 for spec in declarations(model).values())
    copy, one, two = (statistics.median(times[who]) for who in ("cp", "one", "two"))
    size = sum(math.prod(spec.shape) * 2 for spec in declarations(model).values())
    print(f"{size / 1e9:.2f} GB: cp -r {copy:.1f} s, 1 rank {one:.1f} s, 2 ranks {two:.1f} s; peak {peak / 1e6:.0f} MB")
    return {
        "reshard_vs_cp": one / copy,
        "reshard_rss_excess_mb": (peak - 2 * largest) / 1e6,
        "ranks2_speedup": one / two,
    }


def stall(folder: Path, model: ModelConfig, rounds: int) -> float:
    """Return what a background save takes from the caller, by what a waiting save does: weights and moments, fp32."""
    specs = declarations(model)
    values = {name: np.ones(spec.shape, np.float32) for name, spec in specs.items()}
    states = (WEIGHT, *MOMENTS)
    files = plan_files(
        specs, states, Layout(), lambda name, state: "float32", lambda name, state, region: _cut(values[name], region)
    )
    pieces = [piece for _, file in files for piece in file]
    times: dict[bool, list[float]] = {True: [], False: []}
    for number in range(rounds):
        for background in (True, False):
            saver = Saver(Alone(), background)
            path = folder / f"{background}-{number}"
            times[background].append(
                seconds_of(partial(saver.save, path, pieces, partial(_manifest, model), lambda: None))
            )
            saver.wait()
            shutil.rmtree(path)
    waiting, beside = (statistics.median(times[kind]) for kind in (False, True))
    size = 3 * sum(array.nbytes for array in values.values())
    print(f"save of {size / 1e9:.2f} GB: {waiting:.2f} s, in the background {beside:.2f} s")
    return beside / waiting


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
        figures = resharding(Path(folder), model, rounds=3)
        figures["async_stall_ratio"] = stall(Path(folder), saved, rounds=3)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
