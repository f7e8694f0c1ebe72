"""Curves instead of points: what arms reach at several k, and whether their order holds with more tokens."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from pages import interval_text, markdown_table
from study.figures import COLOURS, MARKS
from study.plan import BASE, GROUPED, GROUPS_10, pool_name
from study.studies import BLOCK_10, CURVE
from study.summary import Summary, committed_summary
from study.tables import baselines

ARMS = {name: MARKS[name] for name in baselines()} | {
    GROUPS_10: (COLOURS[GROUPED], "o"),
    pool_name(5, None): (COLOURS[None], "o"),
}
"""Colour and mark of each arm that has a curve."""
PANELS = {
    "fvu": "FVU (lower is better)",
    "loss_recovered": "loss recovered (higher is better)",
    "absorption_full": "full absorption (lower is better)",
}


def summaries_of_curve(eval_folder: Path) -> list[Summary]:
    """The committed results at k 32 and, of fewer seeds, at other k."""
    return [committed_summary(study, eval_folder) for study in (BLOCK_10, *CURVE)]


def measured(summaries: Sequence[Summary]) -> list[str]:
    """The k that have results, in ascending order; none if there is only one, since a curve needs two."""
    found = sorted(summary.study.k for summary in summaries if summary.on_model)
    return [f"{k:g}" for k in found] if len(found) > 1 else []


def draw_curves(summaries: Sequence[Summary], file: Path) -> None:
    """Plot metrics against the L0 of the exports, a panel for each."""
    figure, panels = plt.subplots(1, len(PANELS), figsize=(13, 4.2), layout="constrained")
    for axes, metric in zip(panels, PANELS, strict=True):
        draw_metric(axes, summaries, ARMS, metric)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=9, frameon=False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_metric(axes: Axes, summaries: Sequence[Summary], arms: Iterable[str], metric: str) -> None:
    """Plot one metric against the L0 of the exports: every SAE is a mark, lines join the means over seeds."""
    for arm in arms:
        _draw_arm(axes, summaries, arm, metric)
    axes.set(xlabel="L0 at inference", ylabel=PANELS[metric], xscale="log")
    axes.set_xticks(sorted(summary.study.k for summary in summaries))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _draw_arm(axes: Axes, summaries: Sequence[Summary], arm: str, metric: str) -> None:
    colour, mark = ARMS[arm]
    line = []
    for summary in summaries:
        l0, values = summary.values(arm, "l0"), summary.values(arm, metric)
        seeds = [seed for seed in values if seed in l0]
        axes.scatter(
            [l0[seed] for seed in seeds], [values[seed] for seed in seeds], s=12, color=colour, alpha=0.5, lw=0
        )
        if seeds:
            line.append([sum(of[seed] for seed in seeds) / len(seeds) for of in (l0, values)])
    if line:
        label = next(summary.label(arm) for summary in summaries if arm in summary.arms)
        axes.plot(*zip(*sorted(line), strict=True), color=colour, marker=mark, ms=5, lw=1.2, label=label)


def curve_table(summaries: Sequence[Summary]) -> str:
    """FVU and full absorption of the arms that have curves, by k, each with the number of SAEs in brackets."""
    by_k = sorted(summaries, key=lambda summary: summary.study.k)
    names = {"fvu": "FVU", "absorption_full": "full absorption"}
    columns = [(metric, summary) for metric in names for summary in by_k if summary.values(BASE, metric)]
    header = ["", *(f"{names[metric]}, k {summary.study.k:g}" for metric, summary in columns)]
    rows = []
    for arm in ARMS:
        values = [list(summary.values(arm, metric).values()) for metric, summary in columns]
        cells = [f"{sum(of_k) / len(of_k):.3f} ({len(of_k)})" if of_k else "-" for of_k in values]
        rows.append([next(summary.label(arm) for summary in by_k if arm in summary.arms), *cells])
    return markdown_table(header, rows)


def order_table(summaries: dict[str, Summary], columns: dict[str, str], base: str = BASE) -> str:
    """Means of the studies' arms, a row for each study and arm, and differences from `base` with intervals if there are
    at least three seeds. Columns that no study has measured are left out.
    """
    measured = {
        column: metric
        for column, metric in columns.items()
        if any(summary.mean(arm, metric) is not None for summary in summaries.values() for arm in summary.on_model)
    }
    rows = []
    for name, summary in summaries.items():
        for arm in summary.on_model:
            cells = [_cell(summary, arm, metric, base) for metric in measured.values()]
            rows.append([name, summary.label(arm), summary.n_evaluated(arm), *cells])
            name = ""
    return markdown_table(["", "", "SAEs", *measured], rows)


def _cell(summary: Summary, arm: str, metric: str, base: str) -> str:
    mean, difference = summary.mean(arm, metric), summary.difference(arm, base, metric)
    if mean is None:
        return "-"
    if arm == base or difference is None or difference.half is None or difference.n < 3:
        return f"{mean.mean:.3f}"
    return f"{mean.mean:.3f} ({interval_text(difference, signed=True)})"
