"""Plots: one metric against another, statistics of each SAE's latents, and similarities between SAEs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sae_lens_sampled.saebench.report.metrics import OURS, PROBING, Group, Metric, estimate
from sae_lens_sampled.saebench.report.results import SAEResults
from sae_lens_sampled.saebench.report.style import DASHES, finish, shown, styles

BINS_PER_DECADE = 5
LEAST_SEEDS = 3
"""Fewest seeds for error bars: with two, the interval is a dozen times as wide as the distance between the two."""
MAX_NUMBERED = 16
"""Largest number of SAEs for which the cells of the heat map show numbers."""


def pareto_plot(groups: Sequence[Group], x: Metric, y: Metric) -> go.Figure | None:
    """Plot `y` against `x`: a mark for each SAE, and the mean of each group, with error bars for three and more."""
    plot, look = go.Figure(), styles(groups)
    for group in groups:
        every = [(sae.label, x.of(sae), y.of(sae)) for sae in group.saes]
        points = [point for point in every if None not in point]
        if not points:
            continue
        labels, xs, ys = zip(*points, strict=True)
        mark: dict[str, Any] = {"color": look[group].colour, "symbol": look[group].symbol}
        several = len(points) > 1
        plot.add_scatter(
            x=xs,
            y=ys,
            mode="markers",
            name=shown(group.name),
            legendgroup=group.name + group.sae_class,
            marker=mark | {"size": 7 if several else 11, "opacity": 0.6 if several else 1},
            text=[shown(label) for label in labels],
            hovertemplate=f"%{{text}}<br>{x.name} %{{x:.{x.digits}f}}<br>{y.name} %{{y:.{y.digits}f}}<extra></extra>",
        )
        if several:
            _add_mean(plot, group, x, y, xs, ys, mark)
    return finish(plot, x.axis_title, y.axis_title) if plot.data else None


def _add_mean(
    plot: go.Figure,
    group: Group,
    x: Metric,
    y: Metric,
    xs: Sequence[float],
    ys: Sequence[float],
    mark: dict[str, Any],
) -> None:
    """Add the mean of the plotted marks; a seed that lacks one of the two numbers has no mark."""
    mean_x, mean_y = estimate(xs, x.independent), estimate(ys, y.independent)
    halves = [(mean.half or 0) if mean.n >= LEAST_SEEDS else 0 for mean in (mean_x, mean_y)]
    bars = [{"array": [half], "thickness": 1.5, "width": 4} for half in halves]
    plot.add_scatter(
        x=[mean_x.mean],
        y=[mean_y.mean],
        error_x=bars[0],
        error_y=bars[1],
        mode="markers",
        marker=mark | {"size": 11, "line": {"width": 1.5, "color": "white"}},
        legendgroup=group.name + group.sae_class,
        showlegend=False,
        hovertemplate=f"mean of {shown(group.name)}<br>%{{x:.{x.digits}f}}<br>%{{y:.{y.digits}f}}<extra></extra>",
    )


def with_model_line(plot: go.Figure | None, saes: Sequence[SAEResults]) -> go.Figure | None:
    """Add a line at the accuracy of a probe on the model's best single coordinate, if it is the same in all results."""
    accuracies = {sae.number(*PROBING[:2], "llm", "llm_top_1_test_accuracy") for sae in saes} - {None}
    if plot is not None and len(accuracies) == 1:
        plot.add_hline(
            y=accuracies.pop(),
            line={"dash": "dot", "color": "#777", "width": 1.5},
            name="best coordinate of the model itself",
            showlegend=True,
        )
    return plot


def density_plot(saes: Sequence[SAEResults], groups: Sequence[Group]) -> go.Figure | None:
    """Outlined histograms of log10 density, in shares of all latents: an SAE's bars sum to its live share."""
    densities = {sae: np.array(known) for sae in saes if (known := _densities(sae))}
    live = {sae: np.log10(density[density > 0]) for sae, density in densities.items()}
    if not any(map(len, live.values())):
        return None
    lowest = min(values.min() for values in live.values() if len(values))
    edges = np.arange(np.floor(lowest * BINS_PER_DECADE), 1) / BINS_PER_DECADE
    plot, lines = go.Figure(), _lines(groups)
    for sae, values in live.items():
        n_latents = len(densities[sae])
        shares = np.histogram(np.clip(values, edges[0], 0), edges)[0] / n_latents
        # A step extends from its point to the next point; the outline starts and ends at zero.
        plot.add_scatter(
            x=[edges[0], *edges],
            y=[0, *shares, 0],
            line=lines[sae] | {"shape": "hv"},
            mode="lines",
            name=f"{shown(sae.label)}: {n_latents - len(values)} of {n_latents} dead",
            hovertemplate="%{y:.1%} of latents in the bin from 10^%{x:.1f}<extra></extra>",
        )
    plot.update_yaxes(tickformat=".0%", rangemode="tozero")
    return finish(plot, "log10 of the share of tokens on which a latent is active", "share of latents", len(saes))


def decile_plot(saes: Sequence[SAEResults], groups: Sequence[Group]) -> go.Figure | None:
    """Shares of the summed activations by tenths of the latents, from those that fire least often on."""
    plot, lines = go.Figure(), _lines(groups)
    for sae in saes:
        shares = sae.get(*OURS, "exported", "mass_by_density_decile")
        if shares:
            plot.add_scatter(
                x=list(range(1, len(shares) + 1)),
                y=shares,
                mode="lines+markers",
                line=lines[sae],
                marker={"size": 6},
                name=shown(sae.label),
                hovertemplate="%{y:.1%} in tenth %{x}<extra></extra>",
            )
    if not plot.data:
        return None
    plot.update_xaxes(dtick=1)
    plot.update_yaxes(tickformat=".0%", rangemode="tozero")
    title = "tenth of the latents, starting with those that fire least often"
    return finish(plot, title, "share of the summed activation", len(saes))


def mmcs_plot(saes: Sequence[SAEResults]) -> go.Figure | None:
    """Heat map of decoder MMCS for all ordered pairs; white is chance level, and the diagonal is blank."""
    compared = [sae for sae in saes if sae.get("mmcs", "eval_result_details")]
    if len(compared) < 2:
        return None
    pairs = {
        (sae.name, detail["partner"]): detail for sae in compared for detail in sae.get("mmcs", "eval_result_details")
    }
    matrix = [[pairs.get((row.name, column.name)) for column in compared] for row in compared]
    values = [[None if pair is None else pair["decoder"]["mmcs"] for pair in row] for row in matrix]
    labels = [shown(sae.label) for sae in compared]
    baselines = [pair["decoder"]["baseline"] for row in matrix for pair in row if pair]
    if not baselines:
        return None
    plot = go.Figure(
        go.Heatmap(
            z=values,
            x=labels,
            y=labels,
            text=[["" if pair is None else _pair_text(pair) for pair in row] for row in matrix],
            hovertemplate="%{y} in %{x}<br>%{text}<extra></extra>",
            texttemplate="%{z:.3f}" if len(compared) <= MAX_NUMBERED else None,
            hoverongaps=False,
            zmin=min(baselines),
            zmax=max(value for row in values for value in row if value is not None),
            colorscale=[[0, "#ffffff"], [1, "#4f9bd0"]],
            colorbar={"title": {"text": "MMCS", "font": {"size": 13}}, "thickness": 14, "outlinewidth": 0},
            xgap=2,
            ygap=2,
        )
    )
    finish(plot, "found in the latents of", "latents of")
    plot.update_layout(height=max(430, 26 * len(compared) + 8 * max(map(len, labels))))  # with room for vertical labels
    plot.update_xaxes(showgrid=False, type="category", constrain="domain")
    plot.update_yaxes(showgrid=False, type="category", autorange="reversed")
    return plot


def _pair_text(pair: dict) -> str:
    kind = "same configuration" if pair["same_group"] else "other configuration"
    decoder, encoder = pair["decoder"], pair["encoder"]
    return f"{kind}<br>decoder {decoder['mmcs']:.3f}, encoder {encoder['mmcs']:.3f}<br>chance {decoder['baseline']:.3f}"


def _densities(sae: SAEResults) -> list[float]:
    """Densities of the latents; empty if SAEBench was not asked to compute them."""
    details = sae.get("core", "eval_result_details") or []
    return [latent["feature_density"] for latent in details if latent.get("feature_density") is not None]


def _lines(groups: Sequence[Group]) -> dict[SAEResults, dict]:
    """Line styles by SAE: the SAEs of a group share a colour and differ in their dashes."""
    look = styles(groups)
    return {
        sae: {"color": look[group].colour, "dash": DASHES[i % len(DASHES)], "width": 2}
        for group in groups
        for i, sae in enumerate(group.saes)
    }
