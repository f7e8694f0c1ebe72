"""Which setting is recommended: a rule that was written down before the SAEs it judges were trained.

A setting is recommended in BatchTopK's place if it is shown to be no worse by more than a margin in what everyone
needs, and shown to be better in one thing that pools are taken for. Only SAEs of seeds that nobody had seen count.
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
"""How much worse than BatchTopK is still no worse: of FVU a share of BatchTopK's, else a difference."""
GAINS = {"mmcs": 1, "absorption_full": -1, "probing_1": 1}
"""What a setting must be better in, one of them at least, and which way is better."""
ALPHA = 0.05
"""Chance of a false statement that is accepted, over all settings and metrics of a kind; half of it on each side."""
NAMES = {
    "fvu": "FVU, relative",
    "absorption_full": "full absorption",
    "dead": "dead",
    "mmcs": "MMCS",
    "probing_1": "probing, top 1",
}


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one setting."""

    arm: str
    differences: Mapping[str, Interval]
    """From BatchTopK, by metric."""
    no_worse: frozenset[str]
    """Metrics in which it is shown to be no worse by more than the margin."""
    better: frozenset[str]
    """Metrics in which it is shown to be better."""

    @property
    def is_recommended(self) -> bool:
        return len(self.no_worse) == len(MARGINS) and len(self.better) > 0


def verdicts(summary: Summary) -> list[Verdict]:
    """One for each setting that has all results; the corrections are over these."""
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
    """The setting that the rule recommends; of several the one that is better in most, then that of the lowest FVU."""
    passed = [verdict for verdict in verdicts(summary) if verdict.is_recommended]
    return min(passed, key=lambda verdict: (-len(verdict.better), verdict.differences["fvu"].mean), default=None)


def differences(summary: Summary, arm: str) -> dict[str, Interval]:
    """From BatchTopK over pairs of SAEs, of FVU as a share of BatchTopK's; of MMCS over pairs of seeds."""
    found = {name: summary.difference(arm, BASE, name) for name in NAMES if name != "fvu"}
    fvu, base = summary.values(arm, "fvu"), summary.values(BASE, "fvu")
    ratios = [fvu[seed] / base[seed] - 1 for seed in fvu if seed in base]
    found["fvu"] = mean_interval(ratios) if ratios else None
    return {name: found[name] for name in NAMES if (interval := found[name]) is not None and interval.n > 2}


def verdict_table(summary: Summary) -> str:
    """Every setting with its differences; bold: shown no worse by more than the margin, or better."""
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
    assert p is not None  # there are three seeds at least
    return p
