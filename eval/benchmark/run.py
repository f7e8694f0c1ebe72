"""Pools, scores and nested losses on data with known features by SynthSAEBench's recipe (arXiv 2602.14687).

    python eval/benchmark/run.py --config dictionaries         # eval/KNOWN_FEATURES.md; half an hour in two processes
    python eval/benchmark/run.py --config dictionaries --report    # only renders the pages again
    python eval/benchmark/run.py --config small                # earlier experiments, in an hour
    python eval/benchmark/run.py --config tuning               # how their settings were chosen
    python eval/benchmark/run.py --config factorial --part 1/2 # which pools pay off at which sizes; half of the streams
    python eval/benchmark/run.py --config synth-sae-bench-16k  # the benchmark itself, 200M samples: for a GPU
    python eval/benchmark/run.py --config synth-sae-bench-16k-cpu --arms batchtopk groups  # 5M samples, two arms
    python eval/benchmark/run.py --config synth-sae-bench-16k-cpu --time 50000             # how long that would take

All arms of a seed start from the same weights; all SAEs of a data set see the same samples. A second call resumes where
the first left off: finished results are never recomputed, and a killed run continues from its last checkpoint, if its
benchmark has any (`n_checkpoints`).
Processes with different `--arms` or `--part` may share the folders.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # instead of this script's folder, so that the packages in eval can be imported
sys.path.append(str(EVAL.parent / "examples"))

from benchmark.configs import BENCHMARKS
from benchmark.page import write_pages
from benchmark.plan import streams, units
from benchmark.report import result_table
from benchmark.timing import time_plan
from benchmark.training import run
from sae_lens_sampled.runners.parts import parse_part
from study.plan import check_patterns


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    benchmark = BENCHMARKS[args.config]
    results = args.results_dir or EVAL / "results" / f"benchmark_{benchmark.name}"
    work = args.work_dir or Path("study_output") / f"benchmark_{benchmark.name}"
    try:
        part = parse_part(args.part)
        check_patterns(args.arms, (unit.arm for unit in units(benchmark)))
    except ValueError as error:
        sys.exit(str(error))
    arms = {arm for arm in benchmark.arms if any(fnmatch(arm, pattern) for pattern in args.arms)}
    warnings.filterwarnings("ignore")  # deprecation warnings from dependencies
    logging.disable(logging.WARNING)
    if args.time:
        print(time_plan(benchmark, arms, args.time, work))
        return
    table = result_table(benchmark, results)
    finished = table.load()
    for stream in [] if args.report else tqdm(part.of(streams(benchmark)), desc="Streams of samples"):
        if missing := [unit for unit in stream if unit.arm in arms and unit.key not in finished]:
            for result in run(benchmark, missing, work):
                table.append(result)
    if args.results_dir is None:
        print(f"Page: {write_pages(EVAL)}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=BENCHMARKS, required=True)
    parser.add_argument("--arms", nargs="+", default=["*"], help="only arms whose names match, such as 'nested*'")
    parser.add_argument("--part", default="1/1", help="such as 2/8: every eighth stream of samples from the second on")
    parser.add_argument(
        "--time", type=int, metavar="SAMPLES", help="time the sampling and each arm for this many samples, and stop"
    )
    parser.add_argument(
        "--report", action="store_true", help="compute nothing, only render the pages from existing results"
    )
    parser.add_argument("--work-dir", type=Path, help="checkpoints; default: study_output/benchmark_CONFIG")
    parser.add_argument(
        "--results-dir", type=Path, help="default: eval/results/benchmark_CONFIG; if given, no pages are rendered"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
