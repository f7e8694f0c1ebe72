"""Which setting is recommended: a rule that was written down before the SAEs it judges were trained.

A setting is recommended instead of BatchTopK if it is shown to be worse by no more than a margin in the metrics that
everyone needs, and better in at least one metric that pools are used for. Only SAEs of seeds that were not seen when
the rule was written count, and only when all of them have results.

Before the first of them was evaluated, one condition was added: a gain in probing must hold for other tasks too, not
only for other seeds.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from scipy import stats

from pages import interval_text, markdown_table
from sae_lens_sampled.confidence import Interval, holm, mean_interval
from study.beside_batchtopk import difference
from study.plan import BASE, GROUPED, GROUPS_10, THEN_ALL, THEN_PLAIN, WINSORISED, pool_name
from study.summary import MMCS, Summary

CANDIDATES = (GROUPS_10, THEN_ALL, THEN_PLAIN, WINSORISED, pool_name(5, GROUPED), pool_name(5, None))
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
    """Verdicts on all settings; none while a result is missing.

    p-values are corrected over all settings and all metrics of a kind, those with margins and those with gains.
    """
    if missing(summary):
        return []
    found = {arm: differences(summary, arm) for arm in CANDIDATES}
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


def missing(summary: Summary) -> list[str]:
    """The settings, and BatchTopK, that lack the result of a seed in a metric, or have fewer than three seeds."""
    return [arm for arm in (BASE, *CANDIDATES) if not _is_complete(summary, arm)]


def _is_complete(summary: Summary, arm: str) -> bool:
    if arm not in summary.arms:
        return False
    seeds = set(summary.study.seeds(summary.arms[arm].n_seeds))
    pairs = set(itertools.combinations(sorted(seeds), 2))
    return (
        len(seeds) > 2
        and all(set(summary.values(arm, name)) == seeds for name in NAMES if name != MMCS)
        and set(summary.similarities(arm, arm, "forward", MMCS)) == pairs
    )


def differences(summary: Summary, arm: str) -> dict[str, Interval]:
    """Differences from BatchTopK over pairs of SAEs (FVU: as a share of BatchTopK's; MMCS: over pairs of seeds)."""
    found = {name: difference(summary, arm, name) for name in NAMES}
    fvu, base = summary.values(arm, "fvu"), summary.values(BASE, "fvu")
    found["fvu"] = mean_interval([fvu[seed] / base[seed] - 1 for seed in fvu])
    return {name: interval for name, interval in found.items() if interval is not None}


def standard_errors_needed(summary: Summary) -> float:
    """Distance from a margin, in standard errors, at which the first step of the correction shows "no worse"."""
    n_tests = len(CANDIDATES) * len(MARGINS)
    return float(stats.t.isf(ALPHA / 2 / n_tests, summary.study.n_seeds - 1))


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


def verdict_text(summary: Summary) -> str:
    """The rule's verdict in a sentence."""
    passed = [summary.label(verdict.arm) for verdict in verdicts(summary) if verdict.is_recommended]
    chosen = recommended(summary)
    if chosen is None:
        return "**No setting of pools passes: BatchTopK by this package's step is what to take.**"
    others = f" (of {len(passed)} that pass)" if len(passed) > 1 else ""
    return f"**Recommended: {summary.label(chosen.arm)}**{others}."


def _p(p: float | None) -> float:
    """A p-value; 1 where there are too few values for one, so that nothing is shown."""
    return 1.0 if p is None else p
