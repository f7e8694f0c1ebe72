"""The stages of a study: the items of each, which of them lack results, and how they are computed."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from tqdm import tqdm

from sae_lens_sampled.runners.parts import Part
from study.configs import Study
from study.dictionaries import Dictionaries, compare
from study.evaluation import evaluate, evaluate_absorption, train_probes
from study.plan import Arm, Unit, absorption_units, compared, runs, synthetic_units, units
from study.storage import ResultTable, Storage
from study.synthetic import run_synthetic
from study.text import held_out
from study.training import cached_activations, language_model, train

EXPORTS_TOGETHER = 30
"""Number of exports in one run of SAEBench, which runs the model once for all of them. SAEBench's finished results
survive a kill, but enter the study's table only when the whole portion has ended."""


@dataclass(frozen=True)
class Stage:
    """One stage; its items are SAEs, groups of SAEs that are trained together, or pairs of arms."""

    plan: Callable[[Study, Callable[[Arm], bool]], list[Any]]
    """All items of the wanted arms, in the same order in every process."""
    missing: Callable[[Storage], Callable[[Any], bool]]
    """Which items still have to be computed."""
    do: Callable[[Storage, list[Any]], None]
    """Compute some of the items."""


def to_do(stage: Stage, storage: Storage, arms: Sequence[str], part: Part) -> list[Any]:
    """The items that a process still has to compute.

    Args:
        stage: the stage.
        storage: where the results are.
        arms: patterns of names; other arms are left out.
        part: the process's part of all planned items, finished or not, so that processes split them alike whenever they
            start.
    """
    mine = part.of(planned(stage, storage, arms))
    return list(filter(stage.missing(storage), mine)) if mine else []


def status(storage: Storage, arms: Sequence[str], n_parts: int) -> str:
    """Progress, one line per stage: how many items are done and, with several parts, which of them have work left."""
    lines = []
    for name, stage in STAGES.items():
        n_planned = len(planned(stage, storage, arms))
        left = {index: len(to_do(stage, storage, arms, Part(index, n_parts))) for index in range(1, n_parts + 1)}
        n_left = sum(left.values())
        line = f"{name:<10} {n_planned - n_left} of {n_planned} done"
        if n_left and n_parts > 1:
            line += f"; parts with work: {','.join(str(index) for index, n in left.items() if n)} of {n_parts}"
        lines.append(line)
    return "\n".join(lines)


def planned(stage: Stage, storage: Storage, arms: Sequence[str]) -> list[Any]:
    """All items of the arms whose names match, including those with results."""
    return stage.plan(storage.study, lambda arm: any(fnmatch(arm.name, pattern) for pattern in arms))


def _plan_units(of_study: Callable[[Study], list[Unit]]) -> Callable[[Study, Callable[[Arm], bool]], list[Unit]]:
    return lambda study, has: [unit for unit in of_study(study) if has(unit.arm)]


def _plan_runs(study: Study, has: Callable[[Arm], bool]) -> list[list[Unit]]:
    exported = {unit.trained for unit in units(study) if has(unit.arm)}  # some arms are exports of another arm's SAEs
    wanted = [[unit for unit in run if unit.name in exported or has(unit.arm)] for run in runs(study)]
    return [run for run in wanted if run]


def _plan_pairs(study: Study, has: Callable[[Arm], bool]) -> list[tuple[Arm, Arm]]:
    return [pair for pair in compared(study) if all(map(has, pair))]


def _without_result(of_storage: Callable[[Storage], ResultTable]) -> Callable[[Storage], Callable[[Unit], bool]]:
    def missing(storage: Storage) -> Callable[[Unit], bool]:
        finished = of_storage(storage).load()
        return lambda unit: unit.key not in finished

    return missing


def _untrained(storage: Storage) -> Callable[[Unit], bool]:
    """The SAEs that a missing result needs and that are not trained yet."""
    evaluated, comparisons = storage.evaluations.load(), storage.comparisons.load()
    needed = {unit.trained for unit in units(storage.study) if unit.key not in evaluated}
    if absorbed := absorption_units(storage.study):
        finished = storage.absorption.load()
        needed |= {unit.trained for unit in absorbed if unit.key not in finished}
    for arm, other in compared(storage.study):
        if (arm.name, other.name) not in comparisons:
            needed |= {Unit(a, seed).trained for a in (arm, other) for seed in storage.study.seeds(a.n_seeds)}
    return lambda unit: unit.trained in needed and not storage.sae(unit).exists()


def _any_untrained(storage: Storage) -> Callable[[list[Unit]], bool]:
    is_missing = _untrained(storage)
    return lambda run: any(map(is_missing, run))


def _not_compared(storage: Storage) -> Callable[[tuple[Arm, Arm]], bool]:
    finished = storage.comparisons.load()
    return lambda pair: (pair[0].name, pair[1].name) not in finished


def _train(storage: Storage, some_runs: list[list[Unit]]) -> None:
    for run in tqdm(some_runs, desc="Training"):
        train(storage, list(filter(_untrained(storage), run)))


def _evaluate(storage: Storage, some_units: list[Unit]) -> None:
    """Evaluate exports in portions, each of which shares passes of the language model."""
    portions = [some_units[i : i + EXPORTS_TOGETHER] for i in range(0, len(some_units), EXPORTS_TOGETHER)]
    faults = [fault for portion in tqdm(portions, desc="Evaluating") for fault in evaluate(storage, portion)]
    if faults:
        sys.exit("\n".join(dict.fromkeys(faults)))  # the next stage could not compare these SAEs either


def _synthetic(storage: Storage, some_units: list[Unit]) -> None:
    for unit in tqdm(some_units, desc="Synthetic data"):
        run_synthetic(storage, unit)


def _compare(storage: Storage, pairs: list[tuple[Arm, Arm]]) -> None:
    dictionaries = Dictionaries(storage)
    for arm, other in tqdm(pairs, desc="Comparing"):
        compare(storage, dictionaries, arm, other)


def _prepare(storage: Storage, _: list[Study]) -> None:
    study = storage.study
    language_model(study)
    held_out(storage)
    if study.cached:
        cached_activations(storage)
    if settings := study.absorption or study.evals.get("absorption"):
        train_probes(storage, settings)


PREPARATION = Stage(lambda study, _: [study], lambda _: lambda _: True, _prepare)
"""Builds shared inputs, for which all processes but one would wait: model, text, activations, absorption's probes."""
STAGES = {
    "train": Stage(_plan_runs, _any_untrained, _train),
    "evaluate": Stage(_plan_units(units), _without_result(lambda storage: storage.evaluations), _evaluate),
    "absorption": Stage(
        _plan_units(absorption_units), _without_result(lambda storage: storage.absorption), evaluate_absorption
    ),
    "synthetic": Stage(_plan_units(synthetic_units), _without_result(lambda storage: storage.synthetic), _synthetic),
    "compare": Stage(_plan_pairs, _not_compared, _compare),
}
"""The stages by name, each after those whose results it needs; `report` comes after them."""
