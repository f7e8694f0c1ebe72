"""Tables that compare arms with BatchTopK: differences, corrected for the number of comparisons, and times."""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path

from pages import interval_text, markdown_table
from sae_lens_sampled.confidence import Interval, holm
from study import plan, probing_tables
from study.plan import BASE
from study.summary import Summary

DECISION = {
    "FVU": "fvu",
    "loss recovered": "loss_recovered",
    "probing, top 1": "probing_1",
    "top 5": "probing_5",
    "dead": "dead",
    "MMCS": "mmcs",
    "absorption, full": "absorption_full",
    "fraction": "absorption_fraction",
}
"""Metrics for choosing an arm, by column; MMCS is that of live latents between seeds."""
SMALLER_IS_BETTER = ("FVU", "dead", "absorption, full", "fraction")
ALPHA = 0.05
"""Family-wise error rate of the marks in a table."""
BETTER, WORSE = "▲", "▼"
SIDES = {
    "batchtopk": "SAELens BatchTopK",
    "own_batchtopk": "all latents",
    "topk": "SAELens TopK",
    "matryoshka": "SAELens Matryoshka",
    "pool_5": "one pool, factor 5",
    "pool_5_groups_16": "groups of 16, factor 5",
    "pool_10_groups_16": "groups of 16, factor 10",
    "nested_10": "nested groups of 16, factor 10",
}
"""Names of the arms in the benchmark of training steps, and of BatchTopK by this package's step."""


def decision_table(summary: Summary, step_seconds: dict[str, float]) -> str:
    """Decision table, one row per arm: means, with marks where they differ from BatchTopK, and time.

    Marks are from the SAEs of the seeds that both arms have, and corrected for all comparisons of the table (Holm).

    Args:
        summary: the study's results.
        step_seconds: seconds of training steps for a million tokens, by arm.
    """
    marks = marks_of(differences(summary))
    rows = []
    for arm in summary.arms:
        seconds = step_seconds.get(arm)
        means = {name: summary.mean(arm, metric) for name, metric in DECISION.items()}
        cells = [
            "-" if mean is None else f"{mean.mean:.3f}{marks.get((arm, name), '')}" for name, mean in means.items()
        ]
        n_saes = str(summary.n_evaluated(arm))
        rows.append([summary.label(arm), n_saes, *cells, "-" if seconds is None else f"{seconds:.0f} s"])
    return markdown_table(["", "SAEs", *DECISION, "steps for 1M tokens"], rows)


def difference_table(summary: Summary) -> str:
    """Differences behind the decision table: every arm minus BatchTopK, with 95 % intervals; bold where marked."""
    found = differences(summary)
    marks = marks_of(found)
    rows = []
    for arm in dict.fromkeys(arm for arm, _ in found):
        texts = {name: interval_text(found.get((arm, name)), signed=True) for name in DECISION}
        cells = [f"**{text}**" if (arm, name) in marks else text for name, text in texts.items()]
        rows.append([summary.label(arm), *cells])
    return markdown_table(["", *DECISION], rows)


def differences(summary: Summary) -> dict[tuple[str, str], Interval]:
    """Every arm minus BatchTopK, by arm and column of the decision table."""
    found = {}
    for arm, (name, metric) in itertools.product(summary.arms, DECISION.items()):
        if arm != BASE and (of_arm := difference(summary, arm, metric)) is not None:
            found[arm, name] = of_arm
    return found


def difference(summary: Summary, arm: str, metric: str) -> Interval | None:
    """An arm minus BatchTopK over pairs of SAEs (MMCS: over pairs of seeds).

    A p-value of probing is of a difference that holds for other seeds and for other tasks.
    """
    probing = re.fullmatch(r"probing_(\d+)", metric)
    if probing is not None:
        return probing_tables.difference(summary, arm, int(probing[1]))
    return summary.difference(arm, BASE, metric)


def marks_of(found: Mapping[tuple[str, str], Interval]) -> dict[tuple[str, str], str]:
    """Marks of the differences that are significant after Holm's correction over all of them."""
    adjusted = holm({key: difference.p for key, difference in found.items() if difference.p is not None})
    return {
        (arm, name): f" {BETTER if (found[arm, name].mean < 0) == (name in SMALLER_IS_BETTER) else WORSE}"
        for (arm, name), p in adjusted.items()
        if p <= ALPHA
    }


def step_seconds(benchmark: Path) -> dict[str, float]:
    """Seconds of training steps for a million tokens at the size of the study on SmolLM2, by arm."""
    rows = json.loads(benchmark.read_text())["sections"]["smollm2"]
    by_side = {side: ms / row["case"]["tokens"] * 1000 for row in reversed(rows) for side, ms in row["step_ms"].items()}
    seconds = {arm: by_side[side] for arm, side in SIDES.items()}
    return seconds | {plan.THEN_PLAIN: (seconds["nested_10"] + seconds["pool_10_groups_16"]) / 2}
