"""How much faster a CPU step is if the process keeps freed memory, which glibc does if two variables are set.

    python eval/bench/allocator.py    # eval/results/bench_allocator.json, for eval/SPEED.md; five minutes on two cores

A step frees and allocates matrices of the weights' size. glibc returns each one above 32 MiB to the system, which
zeroes it before its next use. Steps run in separate processes, alternately with and without the variables.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from pathlib import Path
from typing import Any
from unittest import mock

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # instead of this script's folder, so that the packages in eval can be imported

from bench.cases import ALL_LATENTS, BATCHTOPK, SIZES, Setting
from bench.training_step import RESULTS, measure

VARIABLES = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


def measure_allocator(setting: Setting, turns: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of a step by case, without and with the variables."""
    times: dict[str, dict[str, list[float]]] = {"default": {}, "kept": {}}
    for _ in range(turns):
        for name, variables in (("default", {}), ("kept", VARIABLES)):
            with mock.patch.dict(os.environ, variables), multiprocessing.get_context("spawn").Pool(1) as process:
                row = process.apply(measure, (setting, [BATCHTOPK, ALL_LATENTS], repeats))
            for side, milliseconds in row["step_ms"].items():
                times[name].setdefault(side, []).append(milliseconds)
    medians = {name: {side: statistics.median(values) for side, values in of.items()} for name, of in times.items()}
    return {"case": setting, "turns": turns, "repeats": repeats, "variables": VARIABLES, "step_ms": medians}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "bench_allocator.json")
    args = parser.parse_args()
    setting = {"device": "cpu", "autocast": False, "trained": False, "dead": 0.0} | SIZES["large"]
    found = measure_allocator(setting, args.turns, args.repeats)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["step_ms"]))


if __name__ == "__main__":
    main()
