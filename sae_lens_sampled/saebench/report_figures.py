"""The figures of the report. One is left out where no SAE has what it shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from sae_lens_sampled.saebench.report_data import SAEResults
from sae_lens_sampled.saebench.report_latents import decile_figure, density_figure, mmcs_figure
from sae_lens_sampled.saebench.report_metrics import FRACTION, FVU, L0, PROBING, TOP_1, Group, Metric
from sae_lens_sampled.saebench.report_style import finish, is_wide, styles

PER_SAE = ("densities", "deciles", "mmcs")
"""Figures with a line or a row for every SAE."""


@dataclass(frozen=True)
class Figure:
    """A plot with its words."""

    key: str
    title: str
    caption: str
    plot: go.Figure
    is_wide: bool
    """Whether it needs the whole width of the page."""


def figures(saes: Sequence[SAEResults], groups: Sequence[Group]) -> list[Figure]:
    """Those that `saes` have the numbers for, in order. `groups` are theirs."""
    seeds = "Small marks are seeds, large ones their means with standard errors."
    kinds: list[tuple[str, str, str, Callable[[], go.Figure | None]]] = [
        (
            "fvu-probing",
            "Reconstruction and sparse probing",
            f"Up and to the left is better; neither axis says how interpretable a latent is. {seeds}",
            lambda: _with_model_line(_pareto(groups, FVU, TOP_1), saes),
        ),
        (
            "fvu-absorption",
            "Reconstruction and absorption",
            f"Down and to the left is better; absorption is measured on first letters of words only. {seeds}",
            lambda: _pareto(groups, FVU, FRACTION),
        ),
        (
            "l0-fvu",
            "Sparsity and reconstruction",
            f"Compare the FVU of marks at about the same L0: more active latents mostly reconstruct better. {seeds}",
            lambda: _pareto(groups, L0, FVU),
        ),
        (
            "densities",
            "How often latents fire",
            "Look for latents at the far right, which fire almost everywhere; a rare latent is not a bad one, and the "
            "legend alone counts the dead (never active on the evaluation text).",
            lambda: density_figure(saes, groups),
        ),
        (
            "deciles",
            "Which latents carry the activation",
            "Look for how steep the curves are: latents that fire often carry more in any SAE, so only differences "
            "between curves at the same L0 say something.",
            lambda: decile_figure(saes, groups),
        ),
        (
            "mmcs",
            "Mean max cosine similarity of decoders",
            "Look for pairs far above chance; a value is the mean, over latents of the row's SAE, of the largest "
            "cosine with a latent of the column's SAE, so it is neither one-to-one nor symmetric.",
            lambda: mmcs_figure(saes),
        ),
    ]
    wide = PER_SAE if is_wide(len(saes)) else ()
    plots = [(key, title, caption, make()) for key, title, caption, make in kinds]
    return [
        Figure(key, title, caption + _chance(key, saes), plot, key in wide)
        for key, title, caption, plot in plots
        if plot is not None
    ]


def _chance(key: str, saes: Sequence[SAEResults]) -> str:
    """The baseline of the heat map, in words."""
    if key != "mmcs":
        return ""
    found = [value for sae in saes if (value := sae.number("mmcs", "eval_result_metrics", "decoder", "baseline"))]
    if not found:
        return ""
    low, high = f"{min(found):.3f}", f"{max(found):.3f}"
    return f" Random directions reach {low if low == high else f'{low} to {high}'}."


def _pareto(groups: Sequence[Group], x: Metric, y: Metric) -> go.Figure | None:
    """One mark per SAE, and per group its mean with error bars."""
    plot, look = go.Figure(), styles(groups)
    for group in groups:
        every = [(sae.label, x.of(sae), y.of(sae)) for sae in group.saes]
        found = [one for one in every if None not in one]
        if not found:
            continue
        labels, xs, ys = zip(*found, strict=True)
        mark: dict[str, Any] = {"color": look[group].colour, "symbol": look[group].symbol}
        several = len(found) > 1
        plot.add_scatter(
            x=xs,
            y=ys,
            mode="markers",
            name=escape(group.name),
            legendgroup=group.name + group.sae_class,
            marker=mark | {"size": 7 if several else 11, "opacity": 0.6 if several else 1},
            text=[escape(label) for label in labels],
            hovertemplate=f"%{{text}}<br>{x.name} %{{x:.{x.digits}f}}<br>{y.name} %{{y:.{y.digits}f}}<extra></extra>",
        )
        if several:
            _add_mean(plot, group, x, y, mark)
    return finish(plot, x.axis_title, y.axis_title) if plot.data else None


def _add_mean(plot: go.Figure, group: Group, x: Metric, y: Metric, mark: dict[str, Any]) -> None:
    mean_x, mean_y = group.estimate(x), group.estimate(y)
    if mean_x is None or mean_y is None:
        return
    bars = [{"array": [one.error or 0], "thickness": 1.5, "width": 4} for one in (mean_x, mean_y)]
    plot.add_scatter(
        x=[mean_x.mean],
        y=[mean_y.mean],
        error_x=bars[0],
        error_y=bars[1],
        mode="markers",
        marker=mark | {"size": 11, "line": {"width": 1.5, "color": "white"}},
        legendgroup=group.name + group.sae_class,
        showlegend=False,
        hovertemplate=f"mean of {escape(group.name)}<br>%{{x:.{x.digits}f}}<br>%{{y:.{y.digits}f}}<extra></extra>",
    )


def _with_model_line(plot: go.Figure | None, saes: Sequence[SAEResults]) -> go.Figure | None:
    """What probing the model's own coordinates gives, where that is one number for all."""
    found = {sae.number(*PROBING[:2], "llm", "llm_top_1_test_accuracy") for sae in saes} - {None}
    if plot is not None and len(found) == 1:
        plot.add_hline(
            y=found.pop(),
            line={"dash": "dot", "color": "#777", "width": 1.5},
            name="best coordinate of the model itself",
            showlegend=True,
        )
    return plot
