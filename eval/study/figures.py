"""The pictures of the result page; error bars are 95 % intervals over seeds."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from study.plan import GROUPED, GROUPS_10, pool_name
from study.summary import Summary
from study.tables import baselines, controls, nested_arms, planned, score_arms

COLOURS = {None: "#0072b2", 16: "#d55e00", 64: "#009e73", 256: "#cc79a7"}
MARKS = {
    "batchtopk": ("k", "s"),
    "topk": ("0.45", "v"),
    "matryoshka": ("#e69f00", "D"),
    "narrow_3": ("#56b4e9", "P"),
    "narrow_5": ("#56b4e9", "X"),
}
METRICS = {
    "fvu": "FVU (lower is better)",
    "probing_1": "top-1 probing accuracy (higher is better)",
    "absorption_fraction": "absorption fraction (lower is better)",
    "dead": "dead latents",
}


def draw_pareto(summary: Summary, file: Path) -> None:
    """Plot probing and absorption against FVU."""
    metrics = [name for name in METRICS if name not in ("fvu", "dead")]
    figure, panels = plt.subplots(1, len(metrics), figsize=(11, 4.4), layout="constrained")
    for axes, metric in zip(panels, metrics, strict=True):
        for size in (None, *summary.study.group_sizes):
            names = [pool_name(factor, size) for factor in summary.study.pool_factors]
            means = [(summary.mean(name, "fvu"), summary.mean(name, metric)) for name in names]
            points = [(x, y) for x, y in means if x and y]
            label = "one pool" if size is None else f"groups of {size}"
            axes.errorbar(
                [x.mean for x, _ in points],
                [y.mean for _, y in points],
                xerr=[x.half or 0 for x, _ in points],
                yerr=[y.half or 0 for _, y in points],
                color=COLOURS.get(size, "0.3"),
                marker="o",
                ms=4,
                lw=1,
                capsize=2,
                label=label,
            )
        for name in (*baselines(), *controls()):
            x, y = summary.mean(name, "fvu"), summary.mean(name, metric)
            if x and y:
                colour, marker = MARKS[name]
                axes.errorbar(
                    x.mean, y.mean, x.half and y.half, x.half, fmt=marker, color=colour, label=summary.label(name)
                )
        axes.set(xlabel=METRICS["fvu"], ylabel=METRICS[metric], xscale="log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value in (0.08, 0.2, 0.3, 0.5) else "")
    panels[1].legend(fontsize=8, frameon=False, loc="lower left")
    _save(figure, file)


def draw_pool_factor(summary: Summary, file: Path) -> None:
    """Plot each metric against the pool factor."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained", sharex=True)
    for axes, (metric, title) in zip(panels.flat, METRICS.items(), strict=True):
        _plot_over_pool_factors(axes, summary, metric)
        axes.set(ylabel=title)
    for axes in panels[1]:
        axes.set_xlabel("pool factor")
    panels[0, 0].legend(fontsize=8, frameon=False)
    _save(figure, file)


def draw_densities(summary: Summary, file: Path) -> None:
    """Plot how often latents fire, means over seeds: pools on the left, scores (without any: levels) on the right."""
    fixed = summary.study.fixed_pool_factor
    smallest = min(summary.study.pool_factors)
    pools = [pool_name(smallest, None), pool_name(fixed, None), pool_name(fixed, GROUPED), GROUPS_10]
    left = ["batchtopk", *dict.fromkeys(pools)]
    scores = [name for name in score_arms(summary) if name.endswith(f"groups_{GROUPED}")]
    right = scores if summary.study.scores else nested_arms()[2:]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, names in zip(panels, (left, right), strict=True):
        for i, name in enumerate(names):
            results = list(summary.on_model.get(name, {}).values())
            if results:
                edges = np.array(results[0]["density_edges"])
                counts = np.mean([result["density_counts"] for result in results], axis=0)
                label = f"{summary.label(name)}: {counts.sum():.0f} live"
                axes.stairs(counts, edges, lw=1.6, color=f"C{i}", label=label)
        axes.set(xlabel="log10 of the share of tokens a latent fires on")
        axes.legend(fontsize=8, frameon=False, loc="upper left")
    panels[0].set_ylabel("latents")
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low, 1.35 * high)
    _save(figure, file)


def draw_similarity(summary: Summary, file: Path) -> None:
    """Plot MMCS of live latents between seeds; the diagonal compares arms with themselves."""
    names = planned(summary, [*baselines(), *controls(), *score_arms(summary)[1:]])
    values = np.full((len(names), len(names)), np.nan)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            if mmcs := summary.similarity(a, b, "forward", "mmcs"):
                values[i, j] = mmcs.mean
    figure, axes = plt.subplots(figsize=(10.5, 9), layout="constrained")
    image = axes.imshow(values, cmap="Blues")
    for i, j in np.argwhere(np.isfinite(values)):
        dark = values[i, j] > np.nanquantile(values, 0.8)
        axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k")
    labels = [summary.label(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    axes.set(xlabel="found in another seed of", ylabel="live latents of")
    figure.colorbar(image, shrink=0.7, label="MMCS")
    _save(figure, file, spines=True)


def draw_synthetic(summary: Summary, file: Path) -> None:
    """Plot FVU, MCC and F1 on synthetic data against the pool factor."""
    panels_of = {"fvu": "FVU (lower is better)", "mcc": "MCC (higher is better)", "f1": "F1 (higher is better)"}
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for axes, (metric, title) in zip(panels, panels_of.items(), strict=True):
        _plot_over_pool_factors(axes, summary, metric, synthetic=True)
        axes.set(xlabel="pool factor", ylabel=title)
    panels[0].legend(fontsize=8, frameon=False)
    _save(figure, file)


FIGURES = {
    "pareto": draw_pareto,
    "pool_factor": draw_pool_factor,
    "densities": draw_densities,
    "similarity": draw_similarity,
    "synthetic": draw_synthetic,
}


def _plot_over_pool_factors(axes: Axes, summary: Summary, metric: str, synthetic: bool = False) -> None:
    """Plot a line for each group size, and the baselines as horizontal lines with error bands."""
    factors = summary.study.pool_factors
    for size in (None, *summary.study.group_sizes):
        means = [(factor, summary.mean(pool_name(factor, size), metric, synthetic)) for factor in factors]
        points = [(factor, interval) for factor, interval in means if interval]
        axes.errorbar(
            [factor for factor, _ in points],
            [interval.mean for _, interval in points],
            [interval.half or 0 for _, interval in points],
            color=COLOURS.get(size, "0.3"),
            marker="o",
            ms=4,
            capsize=2,
            label="one pool" if size is None else f"groups of {size}",
        )
    for name in baselines():
        if interval := summary.mean(name, metric, synthetic):
            colour, error = MARKS[name][0], interval.half or 0
            axes.axhline(interval.mean, color=colour, ls="--", lw=1, label=summary.label(name))
            axes.axhspan(interval.mean - error, interval.mean + error, color=colour, alpha=0.12, lw=0)
    axes.set_xscale("log")
    axes.set_xticks(factors, [f"{factor:g}" for factor in factors])
    axes.minorticks_off()


def _save(figure: plt.Figure, file: Path, spines: bool = False) -> None:
    for axes in figure.axes:
        if not spines and isinstance(axes, Axes):
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)
