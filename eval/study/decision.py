"""Which setting is recommended: a rule that was written down before the SAEs it judges were trained.

A setting is recommended instead of BatchTopK if it is shown to be worse by no more than a margin in the metrics that
everyone needs, and better in at least one metric that pools are used for. Only SAEs of seeds that were not seen when
the rule was written count.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from pages import interval_text, markdown_table
from sae_lens_sampled.confidence import Interval, holm, mean_interval
from study.plan import GROUPED, RECOMMENDED, THEN_ALL, THEN_PLAIN, WINSORISED, pool_name
from study.summary import Summary

BASE = "batchtopk"
CANDIDATES = (RECOMMENDED, THEN_ALL, THEN_PLAIN, WINSORISED, pool_name(5, GROUPED), pool_name(5, None))
"""The settings that the rule is applied to."""
MARGINS = {"fvu": 0.02, "absorption_full": 0.03, "dead": 0.02}
"""Largest excess over BatchTopK that counts as no worse: for FVU a share of BatchTopK's, otherwise a difference."""
GAINS = {"mmcs": 1, "absorption_full": -1, "probing_1": 1}
"""Metrics, of which a setting must be better in at least one, and the sign of an improvement."""
ALPHA = 0.05
"""Accepted probability of a false statement, over all settings and metrics of a kind; half of it on each side."""
NAMES = {
    "fvu": "FVU, relative",
    "absorption_full": "full absorption",
    "dead": "dead",
    "mmcs": "MMCS",
    "probing_1": "probing, top 1",
}


@dataclass(frozen=True)
class Verdict:
    """The rule's verdict on one setting."""

    arm: str
    differences: Mapping[str, Interval]
    """Differences from BatchTopK, by metric."""
    no_worse: frozenset[str]
    """Metrics in which it is shown to be worse by no more than the margin."""
    better: frozenset[str]
    """Metrics in which it is shown to be better."""

    @property
    def is_recommended(self) -> bool:
        return len(self.no_worse) == len(MARGINS) and len(self.better) > 0


def verdicts(summary: Summary) -> list[Verdict]:
    """Verdicts on the settings that have all results.

    p-values are corrected over these settings and all metrics of a kind, those with margins and those with gains.
    """
    found = {arm: of_arm for arm in CANDIDATES if len(of_arm := differences(summary, arm)) == len(NAMES)}
    worse = holm(
        {(arm, name): _p(found[arm][name].p_at_least(bound)) for arm in found for name, bound in MARGINS.items()}
    )
    better = holm({(arm, name): _p(found[arm][name].p) for arm in found for name in GAINS})
    return [
        Verdict(
            arm,
            of_arm,
            frozenset(name for name in MARGINS if worse[arm, name] <= ALPHA / 2),
            frozenset(
                name for name, sign in GAINS.items() if better[arm, name] <= ALPHA and sign * of_arm[name].mean > 0
            ),
        )
        for arm, of_arm in found.items()
    ]


def recommended(summary: Summary) -> Verdict | None:
    """The recommended setting; among several, the one better in the most metrics, then the one with the lowest FVU."""
    passed = [verdict for verdict in verdicts(summary) if verdict.is_recommended]
    return min(passed, key=lambda verdict: (-len(verdict.better), verdict.differences["fvu"].mean), default=None)


def differences(summary: Summary, arm: str) -> dict[str, Interval]:
    """Differences from BatchTopK over pairs of SAEs (FVU: as a share of BatchTopK's; MMCS: over pairs of seeds).

    Metrics with fewer than three independent values are left out.
    """
    found = {name: summary.difference(arm, BASE, name) for name in NAMES if name != "fvu"}
    fvu, base = summary.values(arm, "fvu"), summary.values(BASE, "fvu")
    ratios = [fvu[seed] / base[seed] - 1 for seed in fvu if seed in base]
    found["fvu"] = mean_interval(ratios) if ratios else None
    return {name: found[name] for name in NAMES if (interval := found[name]) is not None and interval.n > 2}


def verdict_table(summary: Summary) -> str:
    """Every setting with its differences; bold: shown to be worse by no more than the margin, or better."""
    header = ["", *(f"{NAMES[name]}, at most {bound:+g}" for name, bound in MARGINS.items())]
    header += [f"{NAMES[name]}, better" for name in GAINS] + ["recommended"]
    rows = []
    for verdict in verdicts(summary):
        marked = itertools.chain(((n, verdict.no_worse) for n in MARGINS), ((n, verdict.better) for n in GAINS))
        texts = [(interval_text(verdict.differences[name], signed=True), name in shown) for name, shown in marked]
        cells = [f"**{text}**" if is_shown else text for text, is_shown in texts]
        rows.append([summary.label(verdict.arm), *cells, "yes" if verdict.is_recommended else "no"])
    return markdown_table(header, rows)


def _p(p: float | None) -> float:
    assert p is not None  # `differences` keeps only metrics with at least three values
    return p
