"""What it is worth on a CPU to keep freed memory in the process, which glibc does when two variables are set.

    python eval/bench/allocator.py    # eval/results/bench_allocator.json, for eval/SPEED.md; five minutes on two cores

A step frees and takes matrices of the weights' size. Above 32 MiB glibc hands each back to the system, which fills it
with zeros for its next use. Steps are measured in processes of their own, with and without the variables, in turns.
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
sys.path[0] = str(EVAL)  # a script finds its own folder, not the package that the folder is

from bench.cases import ALL_LATENTS, BATCHTOPK, SIZES, Setting
from bench.training_step import RESULTS, measure

VARIABLES = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}


def measure_allocator(setting: Setting, turns: int, repeats: int) -> dict[str, Any]:
    """Median milliseconds of a step, by side, without the variables and with them."""
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
