"""The paper's experiments: what Sampled-SAE does beside SAELens' TopK, BatchTopK and Matryoshka BatchTopK, and when.

    python eval/study.py --config tiny                   # all of eval/RESULTS.md, on 2 CPU cores, offline
    python eval/study.py --config pythia-160m --dry-run  # the paper's model and settings: what it would cost
    python eval/study.py --config pythia-160m --smoke    # the same plan on the bundled model, in minutes

Trains every arm with several seeds on the same activations, evaluates the exported SAEs with SAEBench and on synthetic
data, compares their dictionaries, and writes tables and pictures. Run it again and it goes on where it was: a result
that is there is never computed again. Results (small) go to `--results-dir`, SAEs and caches to `--work-dir`.
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from studies.configs import STUDIES, smoke
from studies.costs import format_plan
from studies.dictionaries import Dictionaries, compare
from studies.evaluation import evaluate
from studies.plan import Arm, Unit, compared, runs, synthetic_units, units
from studies.report import write_report
from studies.storage import Storage
from studies.synthetic import run_synthetic
from studies.training import train

EVAL = Path(__file__).parent
EXPORTS_TOGETHER = 12
"""More are faster; `run_evals` keeps what it has finished of them if it is killed."""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    study = STUDIES[args.config]
    study = smoke(study) if args.smoke else study
    if args.device:
        study = replace(study, device=args.device)
    work = args.work_dir or Path("study_output") / study.name
    results = args.results_dir or (work / "results" if args.smoke else EVAL / "results" / f"study_{study.name}")
    if args.dry_run:
        print(format_plan(study))
        return
    warnings.filterwarnings("ignore")  # of the hosts, about their own future
    logging.disable(logging.WARNING)
    storage = Storage(study, results, work)
    for stage in args.stages:
        STAGES[stage](storage, lambda arm: any(fnmatch(arm.name, pattern) for pattern in args.arms))


def run_train(storage: Storage, wanted: Callable[[Arm], bool]) -> None:
    """Train the SAEs that some missing result needs."""
    needed = {unit.trained for unit in units(storage.study) if not storage.is_done(storage.on_model(unit))}
    for a, b in compared(storage.study):
        if not storage.is_done(storage.comparison(a, b)):
            needed |= {Unit(arm, seed).trained for arm in (a, b) for seed in range(arm.n_seeds)}
    for run in progress("Training", runs(storage.study)):
        some = [u for u in run if wanted(u.arm) and u.trained in needed and not storage.sae(u).exists()]
        if some:
            train(storage, some)


def run_evaluate(storage: Storage, wanted: Callable[[Arm], bool]) -> None:
    """Evaluate the exports that have no result; those of a seed share passes of the language model."""
    exports: dict[int, list[Unit]] = {}
    for unit in units(storage.study):
        if wanted(unit.arm) and not storage.is_done(storage.on_model(unit)):
            exports.setdefault(unit.seed, []).append(unit)
    n = EXPORTS_TOGETHER
    parts = [some[start : start + n] for some in exports.values() for start in range(0, len(some), n)]
    for part in progress("Evaluating", parts):
        evaluate(storage, part)


def run_all_synthetic(storage: Storage, wanted: Callable[[Arm], bool]) -> None:
    for unit in progress("Synthetic data", synthetic_units(storage.study)):
        if wanted(unit.arm) and not storage.is_done(storage.on_synthetic(unit)):
            run_synthetic(storage, unit)


def run_compare(storage: Storage, wanted: Callable[[Arm], bool]) -> None:
    found = Dictionaries(storage)
    for a, b in progress("Comparing", list(compared(storage.study))):
        if wanted(a) and wanted(b) and not storage.is_done(storage.comparison(a, b)):
            compare(storage, found, a, b)


def run_report(storage: Storage, wanted: Callable[[Arm], bool]) -> None:  # noqa: ARG001
    print(f"Report: {write_report(storage, EVAL)}")


STAGES: dict[str, Callable[[Storage, Callable[[Arm], bool]], None]] = {
    "train": run_train,
    "evaluate": run_evaluate,
    "synthetic": run_all_synthetic,
    "compare": run_compare,
    "report": run_report,
}


def progress(name: str, items: Sequence) -> tqdm:
    return tqdm(items, desc=name)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=STUDIES, required=True)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all of them")
    parser.add_argument("--arms", nargs="+", default=["*"], help="only arms whose names match, such as 'pool_5*'")
    parser.add_argument("--smoke", action="store_true", help="the same plan with the bundled model and a few steps")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what it costs, and stop")
    parser.add_argument("--device", help="cpu or cuda, if not the config's")
    parser.add_argument("--work-dir", type=Path, help="SAEs and caches; default: study_output/CONFIG")
    parser.add_argument("--results-dir", type=Path, help="default: eval/results/study_CONFIG")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
