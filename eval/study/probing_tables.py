"""Tables of sparse probing: how far arms are from BatchTopK, and how certain that is.

Every SAE of an arm is probed on every split of every task. SAEs of one seed are a pair, and seeds are crossed with
tasks: a gain that an arm has by chance at one seed or on one task shows in many cells. A difference therefore gets two
intervals. The interval over seeds, from means over all tasks, is for new SAEs on these tasks. The interval over tasks,
from means over all splits and seeds, is for other tasks with these SAEs. Splits share texts and never count as repeats.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from pages import interval_text, markdown_table
from sae_lens_sampled.confidence import Interval, cluster_means, clustered_interval, difference_interval, holm
from study.plan import BASE
from study.summary import Summary

SET_NAME = re.compile(r"(?P<task>.+?)(?:_split(?P<split>\d+))?(?:_results)?")
SIGNIFICANT = 0.05
"""Adjusted p-value up to which a difference stands out."""


class Cell(NamedTuple):
    """Origin of one accuracy."""

    seed: int
    task: str
    split: int


def seed_of(cell: Cell) -> int:
    return cell.seed


def task_of(cell: Cell) -> str:
    return cell.task


@dataclass(frozen=True)
class Comparison:
    """An arm's accuracy at one k, and its difference from BatchTopK."""

    accuracy: Interval
    """Mean over tasks, with an interval over seeds."""
    over_seeds: Interval | None
    """Difference, with an interval for other seeds on these tasks; None if there is none, as for BatchTopK itself."""
    over_tasks: Interval | None
    """The same difference, with an interval for other tasks with these seeds; None as above."""

    @property
    def p(self) -> float | None:
        """The larger of the two p-values; None without a difference, or if there is only one seed or task."""
        p_values = [interval.p for interval in (self.over_seeds, self.over_tasks) if interval is not None]
        return None if not p_values or None in p_values else max(p for p in p_values if p is not None)


def probed_ks(results: Iterable[Mapping[str, Any]]) -> list[int]:
    """Numbers of latents that were probed in all these results."""
    of_results = [
        {int(name.removeprefix("probing_")) for name in result["metrics"] if re.fullmatch(r"probing_\d+", name)}
        for result in results
    ]
    return sorted(set.intersection(*of_results)) if of_results else []


def accuracies(results: Mapping[int, Mapping[str, Any]], k: int) -> dict[Cell, float]:
    """Accuracies of one arm's probes on `k` latents, from its results by seed."""
    cells = {}
    for seed, result in results.items():
        place = probed_ks([result]).index(k)
        for name, by_k in result["metrics"]["probing_sets"].items():
            match = SET_NAME.fullmatch(name)
            assert match is not None
            cells[Cell(seed, match["task"], int(match["split"] or 0))] = by_k[place]
    return cells


def compare(accuracy: Mapping[Cell, float], baseline: Mapping[Cell, float] | None) -> Comparison:
    """Compare an arm with BatchTopK over the cells that both have; `baseline` None: no difference."""
    mean = clustered_interval(accuracy, seed_of)
    assert mean is not None
    if baseline is None:
        return Comparison(mean, None, None)
    return Comparison(
        mean, difference_interval(accuracy, baseline, seed_of), difference_interval(accuracy, baseline, task_of)
    )


def difference(summary: Summary, arm: str, k: int) -> Interval | None:
    """An arm's accuracy with `k` latents minus BatchTopK's, over seeds; its p-value is that of `Comparison`.

    None if one of them was not probed with `k` latents.
    """
    probed = [summary.on_model.get(name, {}) for name in (arm, BASE)]
    if any(k not in probed_ks(results.values()) for results in probed):
        return None
    compared = compare(*(accuracies(results, k) for results in probed))
    return None if compared.over_seeds is None else replace(compared.over_seeds, p=compared.p)


def comparisons(summary: Summary) -> dict[tuple[str, int], Comparison]:
    """Comparisons of all probed arms, by arm and k."""
    probed = {arm: by_seed for arm, by_seed in summary.on_model.items() if probed_ks(by_seed.values())}
    found = {}
    for k in probed_ks(result for by_seed in probed.values() for result in by_seed.values()):
        cells = {arm: accuracies(by_seed, k) for arm, by_seed in probed.items()}
        for arm in cells:
            found[arm, k] = compare(cells[arm], None if arm == BASE else cells.get(BASE))
    return found


def adjusted_p_values(found: Mapping[tuple[str, int], Comparison]) -> dict[tuple[str, int], float]:
    """p-values after Holm's correction over all arms and k together."""
    return holm({key: of_key.p for key, of_key in found.items() if of_key.p is not None})


def difference_table(summary: Summary, k: int) -> str:
    """Accuracy of probes on `k` latents, a row for each arm, and its difference from BatchTopK's with both intervals.

    The accuracy has an interval over seeds. The p-value is for a difference that holds for other seeds and for other
    tasks: the larger of the two p-values, adjusted over all arms and k.
    """
    found = comparisons(summary)
    adjusted = adjusted_p_values(found)
    rows = [
        [
            summary.label(arm),
            interval_text(compared.accuracy),
            interval_text(compared.over_seeds, signed=True),
            interval_text(compared.over_tasks, signed=True),
            f"{adjusted[arm, k]:.2g}" if (arm, k) in adjusted else "-",
        ]
        for (arm, of_k), compared in found.items()
        if of_k == k
    ]
    return markdown_table(["", "accuracy", "difference, over seeds", "over tasks", "p, adjusted"], rows)


def task_table(summary: Summary, k: int, arms: Iterable[str]) -> str:
    """Accuracy of probes on `k` latents, mean over splits and seeds, a row for each task and a column for each arm."""
    means = {
        arm: cluster_means(accuracies(by_seed, k), task_of)
        for arm in arms
        if (by_seed := summary.on_model.get(arm)) and k in probed_ks(by_seed.values())
    }
    tasks = dict.fromkeys(str(task) for of_arm in means.values() for task in of_arm)
    rows = [
        [task.replace("_", " "), *(f"{of_arm[task]:.3f}" if task in of_arm else "-" for of_arm in means.values())]
        for task in tasks
    ]
    return markdown_table(["", *(summary.label(arm) for arm in means)], rows)


def verdict(summary: Summary) -> str:
    """The differences in words: how wide their intervals are, and which of them stand out."""
    found = comparisons(summary)
    adjusted = adjusted_p_values(found)
    half_widths = [
        interval.high - interval.mean
        for key in adjusted
        for interval in (found[key].over_seeds, found[key].over_tasks)
        if interval is not None and interval.high is not None
    ]
    if not half_widths:
        return "One SAE for each arm, or one task, says nothing about others."
    standing: dict[str, dict[str, list[str]]] = {"better": {}, "worse": {}}
    for (arm, k), p in adjusted.items():
        change = found[arm, k].over_seeds
        if p <= SIGNIFICANT and change is not None:
            of_direction = standing["better" if change.mean > 0 else "worse"]
            of_direction.setdefault(summary.label(arm), []).append(f"{k}")
    named = [
        f" {direction.capitalize()} (with so many latents): "
        + "; ".join(f"{label} ({', '.join(ks)})" for label, ks in of_direction.items())
        + "."
        for direction, of_direction in standing.items()
        if of_direction
    ]
    n_standing = sum(p <= SIGNIFICANT for p in adjusted.values())
    return (
        f"The intervals reach {min(half_widths):.3f} to {max(half_widths):.3f} to either side; of {len(adjusted)} "
        f"differences from BatchTopK, those of controls among them, {n_standing} stand out." + "".join(named)
    )
