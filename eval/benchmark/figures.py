"""The picture on the page about known features."""

from pathlib import Path

import matplotlib.pyplot as plt

from benchmark.report import BenchmarkSummary

COLOURS = {
    "batchtopk": "k",
    "topk": "0.6",
    "matryoshka": "#e69f00",
    "matryoshka_32": "#f0e442",
    "groups": "#d55e00",
    "groups_then_all": "#cc79a7",
    "winsorised_10_then_all": "#0072b2",
    "winsorised_20_then_all": "#56b4e9",
    "nested_light": "#009e73",
    "then_plain": "#7a5195",
}
"""Colours of the plotted arms; the arm with one pool is left out, because its FVU is far from theirs."""


def draw_f1_against_fvu(summary: BenchmarkSummary, file: Path) -> None:
    """Plot F1 against FVU, a panel for each k; error bars are 95 % intervals over dictionaries."""
    ks = summary.benchmark.ks
    figure, panels = plt.subplots(1, len(ks), figsize=(12, 4.3), layout="constrained", sharey=True)
    for axes, k in zip(panels, ks, strict=True):
        for arm, colour in COLOURS.items():
            fvu, f1 = summary.interval(arm, k, "fvu"), summary.interval(arm, k, "f1")
            if fvu and f1:
                axes.errorbar(
                    fvu.mean,
                    f1.mean,
                    yerr=f1.high - f1.mean if f1.high is not None else None,
                    xerr=fvu.high - fvu.mean if fvu.high is not None else None,
                    fmt="o",
                    color=colour,
                    ms=6,
                    lw=1,
                    label=summary.benchmark.arms[arm].label,
                )
        axes.set(title=f"k {k}", xlabel="FVU (lower is better)")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("F1 (higher is better)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=4
    )
    figure.savefig(file, dpi=110)
    plt.close(figure)
