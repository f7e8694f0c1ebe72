"""Make a page of an output folder of SAEBench results: tables over seeds, Pareto plots, densities, MMCS, contexts.

    python eval/report.py sae_bench_results

Writes `report.html`, one file that needs no network, and `report.md` into that folder.
"""

import argparse
from pathlib import Path

from sae_lens_sampled.saebench.report import write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="of run_evals, or a folder of SAEBench's own results")
    args = parser.parse_args()
    try:
        path = write_report(args.output_dir)
    except ValueError as error:
        parser.error(str(error))
    print(f"Written to {path} and {path.with_suffix('.md')}")


if __name__ == "__main__":
    main()
