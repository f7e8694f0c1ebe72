"""The paper's experiments: what Sampled-SAE does beside SAELens' TopK, BatchTopK and Matryoshka BatchTopK, and when.

    python eval/study/run.py --config tiny                   # all of eval/RESULTS.md, on 2 CPU cores, offline
    python eval/study/run.py --config smollm2 --text FOLDER  # a model that people study, offline; FOLDER has .txt files
    python eval/study/run.py --config pythia-160m --dry-run  # the paper's model and settings: what it would cost
    python eval/study/run.py --config pythia-160m --smoke    # the same plan on the bundled model, in minutes
    python eval/study/run.py --config pythia-160m --stages train --part 2/8    # the second of eight processes

Trains every arm with several seeds on the same activations, evaluates the exported SAEs with SAEBench and on synthetic
data, compares their dictionaries, and writes tables and pictures. Run it again and it goes on where it was: a result
that is there is never computed again. Results (small) go to `--results-dir`, SAEs and caches to `--work-dir`. Parts of
a stage may run at the same time, with the same folders; start the parts of the next stage when all have ended.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # a script finds its own folder, not the package that the folder is
sys.path.append(str(EVAL.parent / "examples"))

from sae_lens_sampled.files import NoSpaceError
from study.configs import STUDIES, smoke
from study.costs import format_plan
from study.dictionaries import Dictionaries, compare
from study.evaluation import evaluate
from study.named_text import keep_titles, with_text, with_text_of_results
from study.parts import Part, parse_part
from study.plan import Arm, Unit, compared, runs, synthetic_units, units
from study.report import write_report
from study.storage import Storage
from study.synthetic import run_synthetic
from study.training import train

EXPORTS_TOGETHER = 12
"""Number of exports in one run of SAEBench. More are faster; `run_evals` keeps what it has finished if it is killed."""


@dataclass(frozen=True)
class Work:
    """What of a study this process does."""

    arms: Sequence[str]
    """Patterns of names."""
    part: Part

    def has(self, arm: Arm) -> bool:
        """Whether one of the patterns is of the arm."""
        return any(fnmatch(arm.name, pattern) for pattern in self.arms)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    study = STUDIES[args.config]
    study = smoke(study) if args.smoke else study
    if args.device:
        study = replace(study, device=args.device)
    work = args.work_dir or Path("study_output") / study.name
    results = args.results_dir or (work / "results" if args.smoke else EVAL / "results" / f"study_{study.name}")
    try:
        part = parse_part(args.part)
        study = with_text(study, args.text, work) if args.text else with_text_of_results(study, results)
    except ValueError as error:
        sys.exit(str(error))
    if args.dry_run:
        print(format_plan(study))
        return
    warnings.filterwarnings("ignore")  # of the hosts, about their own future
    logging.disable(logging.WARNING)
    storage = Storage(study, results, work)
    keep_titles(study, results)
    try:
        for stage in args.stages:
            STAGES[stage](storage, Work(args.arms, part))
    except NoSpaceError as error:
        sys.exit(str(error))


def run_train(storage: Storage, work: Work) -> None:
    """Train the SAEs that some missing result needs."""
    evaluated, comparisons = storage.evaluations.load(), storage.comparisons.load()
    needed = {unit.trained for unit in units(storage.study) if unit.key not in evaluated}
    for arm, other in compared(storage.study):
        if (arm.name, other.name) not in comparisons:
            needed |= {Unit(a, seed).trained for a in (arm, other) for seed in range(a.n_seeds)}
    for run in progress("Training", work.part.of(runs(storage.study))):
        missing = [u for u in run if work.has(u.arm) and u.trained in needed and not storage.sae(u).exists()]
        if missing:
            train(storage, missing)


def run_evaluate(storage: Storage, work: Work) -> None:
    """Evaluate the exports that have no result; those of a seed share passes of the language model."""
    evaluated = storage.evaluations.load()
    missing: dict[int, list[Unit]] = {}
    for unit in work.part.of(units(storage.study)):
        if work.has(unit.arm) and unit.key not in evaluated:
            missing.setdefault(unit.seed, []).append(unit)
    n = EXPORTS_TOGETHER
    portions = [of_seed[start : start + n] for of_seed in missing.values() for start in range(0, len(of_seed), n)]
    faults = [fault for portion in progress("Evaluating", portions) for fault in evaluate(storage, portion)]
    if faults:
        sys.exit("\n".join(dict.fromkeys(faults)))  # nor can they be compared


def run_all_synthetic(storage: Storage, work: Work) -> None:
    """Train and evaluate the SAEs on synthetic data that have no result."""
    finished = storage.synthetic.load()
    for unit in progress("Synthetic data", work.part.of(synthetic_units(storage.study))):
        if work.has(unit.arm) and unit.key not in finished:
            run_synthetic(storage, unit)


def run_compare(storage: Storage, work: Work) -> None:
    """Compare the pairs of arms that have no result."""
    dictionaries, finished = Dictionaries(storage), storage.comparisons.load()
    for arm, other in progress("Comparing", work.part.of(list(compared(storage.study)))):
        if work.has(arm) and work.has(other) and (arm.name, other.name) not in finished:
            compare(storage, dictionaries, arm, other)


def run_report(storage: Storage, work: Work) -> None:  # noqa: ARG001
    """Draw the pictures and render the page; of all arms that have results."""
    print(f"Report: {write_report(storage, EVAL)}")


STAGES: dict[str, Callable[[Storage, Work], None]] = {
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
    parser.add_argument("--part", default="1/1", help="such as 2/8: every eighth entry of each stage's list of work")
    parser.add_argument("--smoke", action="store_true", help="the same plan with the bundled model and a few steps")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and what it costs, and stop")
    parser.add_argument("--text", help="train on it: a folder of .txt files, some held out, or a Hub data set")
    parser.add_argument("--device", help="cpu or cuda, if not the config's")
    parser.add_argument("--work-dir", type=Path, help="SAEs and caches; default: study_output/CONFIG")
    parser.add_argument("--results-dir", type=Path, help="default: eval/results/study_CONFIG")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
