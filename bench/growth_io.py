"""Growing a checkpoint against writing as many bytes: 350M parameters to twice the width, with optimizer.

    python bench/growth_io.py            # bf16 weights, fp32 moments: 14 GB written, about 25 GB of disk under TMPDIR
    python bench/growth_io.py --small    # a tenth of it, under 2 minutes

The last line is one JSON object:

- ``grow_vs_write``: wall time of ``megacore grow`` on one rank, by that of two ``dd`` that write as many zeros past the
  page cache, as fast as the disk takes them;
- ``rss_excess_mb``: its peak resident memory beyond twice the largest tensor that it writes;
- ``ranks2_speedup``: one rank's time by two ranks', the start of ``mpirun`` included;
- ``ranks2_vs_write``: the time that two ranks say they took, without their start, by the same ``dd``.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from measure import peak_of, said_by, seconds_of, zeros_by_two
from random_checkpoint import write_random

from launcher.start import megacore_command, mpi_command
from megacore.checkpoint.manifest import Layout
from megacore.model_config import ModelConfig
from megacore.models.transformer import declarations
from megacore.settings import validated

SMALL = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 1408}
FULL = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 2816}


def main() -> None:
    """Measure, and print the figures as the last line."""
    parser = argparse.ArgumentParser(description="Growing a checkpoint against plain writes.")
    parser.add_argument("--small", action="store_true", help="a tenth of the size: under 2 minutes")
    small = parser.parse_args().small
    sizes = SMALL if small else FULL
    model = validated(ModelConfig, {"preset": "llama-1b3", **sizes})
    grown = {key: 2 * sizes[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size")}
    target = validated(ModelConfig, {"preset": "llama-1b3", **sizes, **grown})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, large = folder / "small", folder / "large"
        write_random(source, model, Layout(), optimizer=True)
        words = ("grow", source, large, *(f"{key}={size}" for key, size in grown.items()), "--verify", "never")
        peak = peak_of(megacore_command(*words))
        written = sum(file.stat().st_size for file in large.iterdir())
        shutil.rmtree(large)
        runs = {
            "write": lambda: zeros_by_two(large, written),
            "one": lambda: said_by(megacore_command(*words)),
            "two": lambda: said_by(mpi_command(2, *words)),
        }
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(3):
            for who, run in runs.items():
                seconds, said = seconds_of(run)
                times[who].append(seconds)
                if said:  # "... GB read, ... GB written by 2 ranks in 9.5 s"
                    times[f"{who} moving"].append(float(said.split()[-2]))
                shutil.rmtree(large)
    median = {who: statistics.median(values) for who, values in times.items()}
    largest = 4 * max(math.prod(spec.shape) for spec in declarations(target).values())
    print(f"{written / 1e9:.2f} GB written: " + ", ".join(f"{who} {seconds:.1f} s" for who, seconds in median.items()))
    print(f"peak of one rank: {peak / 1e6:.0f} MB; largest tensor {largest / 1e6:.0f} MB")
    figures = {
        "grow_vs_write": median["one"] / median["write"],
        "rss_excess_mb": (peak - 2 * largest) / 1e6,
        "ranks2_speedup": median["one"] / median["two"],
        "ranks2_vs_write": median["two moving"] / median["write"],
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
