"""The paper's experiments: Sampled-SAE in many settings beside SAELens' TopK, BatchTopK and Matryoshka BatchTopK.

    python eval/study/run.py --config tiny                   # the bundled model, on 2 CPU cores, offline
    python eval/study/run.py --config smollm2-block10 --text FOLDER  # a real model; FOLDER has .txt files
    python eval/study/run.py --config pythia-160m --dry-run  # the cost for the paper's model
    python eval/study/run.py --config pythia-160m --smoke    # the same arms on the bundled model, in minutes
    python eval/study/run.py --config pythia-160m --stages prepare             # once, before several processes
    python eval/study/run.py --config pythia-160m --stages train --part 2/8    # the second of eight processes

Trains every arm with several seeds on the same activations, evaluates the exported SAEs with SAEBench, compares their
dictionaries, trains and evaluates the arms on synthetic data too, and writes tables and pictures. A second call resumes
where the first left off: finished results are never recomputed. Results (small) go to `--results-dir`, SAEs and caches
to `--work-dir`. Parts of a stage may run at the same time, with the same folders; start the next stage when all have
ended.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # instead of this script's folder, so that the packages in eval can be imported
sys.path.append(str(EVAL.parent / "examples"))

from sae_lens_sampled.devices import NoDeviceError, check_device
from sae_lens_sampled.files import NoSpaceError
from sae_lens_sampled.runners.parts import parse_part
from sae_lens_sampled.signals import interruptible
from study.costs import format_plan
from study.named_text import keep_titles, with_text, with_text_of_results
from study.plan import arms, check_patterns
from study.report import write_report
from study.stages import PREPARATION, STAGES, status, to_do
from study.storage import StaleResultsError, Storage
from study.studies import STUDIES, smoke

PREPARE, REPORT = "prepare", "report"
"""Names of the steps before the stages (only on request) and after them; they have no parts."""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    study = STUDIES[args.config]
    study = smoke(study) if args.smoke else study
    if args.device:
        study = replace(study, device=args.device)
    work = args.work_dir or Path("study_output") / (study.shared_folder or study.name)
    results = args.results_dir or (work / "results" if args.smoke else EVAL / "results" / f"study_{study.name}")
    try:
        part = parse_part(args.part)
        study = with_text(study, args.text, work) if args.text else with_text_of_results(study, results)
        check_patterns(args.arms, (arm.name for arm in arms(study)))
    except ValueError as error:
        sys.exit(str(error))
    if args.dry_run:
        print(format_plan(study))
        return
    warnings.filterwarnings("ignore")  # deprecation warnings from dependencies
    logging.disable(logging.WARNING)
    storage = Storage(study, results, work)
    if args.status:
        print(status(storage, args.arms, part.count))
        return
    try:
        storage.evaluations.load()  # raises if the results there are of other settings, such as another text
        keep_titles(study, results)
        for name in args.stages:
            if name == REPORT:
                print(f"Report: {write_report(storage, EVAL)}")
                continue
            stage = PREPARATION if name == PREPARE else STAGES[name]
            if items := to_do(stage, storage, args.arms, part):
                check_device(study.device)
                if study.text and not args.text:
                    sys.exit("this stage needs the text itself: pass the same --text as for the existing results.")
                with interruptible():  # SAELens' runs leave their signal handlers installed for the next stage
                    stage.do(storage, items)
    except (NoSpaceError, NoDeviceError, StaleResultsError) as error:
        sys.exit(str(error))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=STUDIES, required=True)
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=[PREPARE, *STAGES, REPORT],
        default=[*STAGES, REPORT],
        help="default: all but prepare, which builds shared inputs first, so that no process waits for another",
    )
    parser.add_argument("--arms", nargs="+", default=["*"], help="only arms whose names match, such as 'pool_5*'")
    parser.add_argument("--part", default="1/1", help="such as 2/8: every eighth item of each stage from the second on")
    parser.add_argument("--status", action="store_true", help="print what is finished and what is left, and stop")
    parser.add_argument(
        "--smoke", action="store_true", help="the same arms with two seeds, the bundled model and a few steps"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its cost, and stop")
    parser.add_argument("--text", help="training text: a folder of .txt files, some held out, or a Hub data set")
    parser.add_argument("--device", help="cpu or cuda; default: that of the study")
    parser.add_argument(
        "--work-dir", type=Path, help="SAEs and caches; default: study_output/CONFIG (smollm2 for each smollm2-...)"
    )
    parser.add_argument(
        "--results-dir", type=Path, help="default: eval/results/study_CONFIG; with --smoke, results in the work folder"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
