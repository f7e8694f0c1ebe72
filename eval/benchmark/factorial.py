"""When do pools pay off? Every cell of the factorial against BatchTopK, by a rule that was set before the results.

A cell is one dictionary size, k, score and share of the latents in a pool. It **wins** if its F1 and its MCC are above
BatchTopK's, with intervals of both differences over seeds that exclude 0, at an FVU that is at most `MAX_FVU` higher.
The seeds share features and samples, so intervals cover initial weights only; `FACTORIAL_CHECK` tests whether wins hold
for other features.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmark.configs import SCORES, SHARES
from benchmark.plan import pool_factor
from benchmark.report import BenchmarkSummary
from pages import markdown_table
from sae_lens_sampled.confidence import Interval, difference_interval

MAX_FVU = 0.005
"""Largest excess of FVU over BatchTopK's at which a pool still wins."""
METRICS = ("f1", "mcc", "fvu")


@dataclass(frozen=True)
class Cell:
    """Pools of one kind at one size, relative to BatchTopK."""

    d_sae: int
    k: int
    score: str
    percent: int
    """Share of the dictionary in a pool, in percent."""
    pool_factor: float
    differences: Mapping[str, Interval]
    """F1, MCC and FVU minus BatchTopK's, over seeds, by metric name."""

    @property
    def wins(self) -> bool:
        """Whether F1 and MCC are shown to be higher, with FVU at most `MAX_FVU` higher; False with only one seed."""
        f1, mcc, fvu = (self.differences[metric] for metric in METRICS)
        return (f1.low or 0) > 0 and (mcc.low or 0) > 0 and fvu.mean <= MAX_FVU


def cells(summary: BenchmarkSummary) -> Iterator[Cell]:
    """Cells with results, ordered by size, score and share."""
    arms = summary.benchmark.arms
    for name, data in summary.benchmark.data.items():
        for k in summary.benchmark.ks:
            for score, percent in ((score, percent) for score in SCORES for percent in SHARES):
                arm, differences = f"{score}_{percent}", {}
                for metric in METRICS:
                    values, plain = (summary.values(of, k, metric, (name,)) for of in (arm, "batchtopk"))
                    if interval := difference_interval(values, plain):
                        differences[metric] = interval
                factor = pool_factor(arms[arm], data, k)
                if factor and differences:
                    yield Cell(data.d_sae, k, score, percent, factor, differences)


def factorial_table(found: Sequence[Cell], score: str) -> str:
    """Markdown table: F1, MCC and FVU minus BatchTopK's, and the pool factor; winning cells in bold."""
    rows = []
    for d_sae, k in dict.fromkeys((cell.d_sae, cell.k) for cell in found):
        row = {cell.percent: cell for cell in found if (cell.d_sae, cell.k, cell.score) == (d_sae, k, score)}
        rows.append([str(d_sae), str(k), *(_shown(row.get(percent)) for percent in SHARES)])
    return markdown_table(["d_sae", "k", *(f"{percent} % of the latents" for percent in SHARES)], rows)


def _shown(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    f1, mcc, fvu = (f"{cell.differences[metric].mean:+.3f}" for metric in METRICS)
    text = f"{f1} {mcc} {fvu} ({cell.pool_factor:.1f})"
    return f"**{text}**" if cell.wins else text
