"""Figures of what the latents of each SAE do, and of how alike the SAEs' latents are."""

from collections.abc import Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go

from sae_lens_sampled.saebench.report_data import SAEResults
from sae_lens_sampled.saebench.report_metrics import OURS, Group
from sae_lens_sampled.saebench.report_style import DASHES, finish, styles

BINS_PER_DECADE = 5
MAX_NUMBERED = 16
"""SAEs up to which the cells of the heat map have their numbers written in."""


def density_figure(saes: Sequence[SAEResults], groups: Sequence[Group]) -> go.Figure | None:
    """Histograms of log10 density, as outlines; shares of all latents, so with the dead ones each adds up to 1."""
    densities = {sae: np.array(found) for sae in saes if (found := _densities(sae))}
    live = {sae: np.log10(density[density > 0]) for sae, density in densities.items()}
    if not any(map(len, live.values())):
        return None
    lowest = min(values.min() for values in live.values() if len(values))
    edges = np.arange(np.floor(lowest * BINS_PER_DECADE), 1) / BINS_PER_DECADE
    plot, lines = go.Figure(), _lines(groups)
    for sae, values in live.items():
        n_latents = len(densities[sae])
        shares = np.histogram(np.clip(values, edges[0], 0), edges)[0] / n_latents
        # A step holds from its point to the next one: the outline starts and ends at zero.
        plot.add_scatter(
            x=[edges[0], *edges],
            y=[0, *shares, 0],
            line=lines[sae] | {"shape": "hv"},
            mode="lines",
            name=f"{escape(sae.label)}: {n_latents - len(values)} of {n_latents} dead",
            hovertemplate="%{y:.1%} of latents from 10^%{x:.1f} on<extra></extra>",
        )
    plot.update_yaxes(tickformat=".0%", rangemode="tozero")
    return finish(plot, "log10 of the share of tokens that a latent is active on", "share of latents", len(saes))


def decile_figure(saes: Sequence[SAEResults], groups: Sequence[Group]) -> go.Figure | None:
    """Shares of the summed activations, by tenths of the latents from rare to frequent."""
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
                name=escape(sae.label),
                hovertemplate="%{y:.1%} in tenth %{x}<extra></extra>",
            )
    if not plot.data:
        return None
    plot.update_xaxes(dtick=1)
    plot.update_yaxes(tickformat=".0%", rangemode="tozero")
    title = "tenth of the latents, from those that fire least often"
    return finish(plot, title, "share of the summed activation", len(saes))


def mmcs_figure(saes: Sequence[SAEResults]) -> go.Figure | None:
    """Decoder MMCS of all ordered pairs; white is chance, the diagonal is blank."""
    shown = [sae for sae in saes if sae.get("mmcs", "eval_result_details")]
    if len(shown) < 2:
        return None
    pairs = {
        (sae.name, detail["partner"]): detail for sae in shown for detail in sae.get("mmcs", "eval_result_details")
    }
    found = [[pairs.get((row.name, column.name)) for column in shown] for row in shown]
    values = [[None if pair is None else pair["decoder"]["mmcs"] for pair in row] for row in found]
    labels = [escape(sae.label) for sae in shown]
    baselines = [pair["decoder"]["baseline"] for row in found for pair in row if pair]
    if not baselines:
        return None
    plot = go.Figure(
        go.Heatmap(
            z=values,
            x=labels,
            y=labels,
            text=[["" if pair is None else _pair_text(pair) for pair in row] for row in found],
            hovertemplate="%{y} in %{x}<br>%{text}<extra></extra>",
            texttemplate="%{z:.3f}" if len(shown) <= MAX_NUMBERED else None,
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
    plot.update_layout(height=max(430, 26 * len(shown) + 8 * max(map(len, labels))))  # with labels on end
    plot.update_xaxes(showgrid=False, type="category", constrain="domain")
    plot.update_yaxes(showgrid=False, type="category", autorange="reversed")
    return plot


def _pair_text(pair: dict) -> str:
    kind = "same configuration" if pair["same_group"] else "other configuration"
    decoder, encoder = pair["decoder"], pair["encoder"]
    return f"{kind}<br>decoder {decoder['mmcs']:.3f}, encoder {encoder['mmcs']:.3f}<br>chance {decoder['baseline']:.3f}"


def _densities(sae: SAEResults) -> list[float]:
    """By latent; SAEBench writes them only if it is asked to."""
    details = sae.get("core", "eval_result_details") or []
    return [latent["feature_density"] for latent in details if latent.get("feature_density") is not None]


def _lines(groups: Sequence[Group]) -> dict[SAEResults, dict]:
    """A group's SAEs have its colour and dashes of their own."""
    look = styles(groups)
    return {
        sae: {"color": look[group].colour, "dash": DASHES[i % len(DASHES)], "width": 2}
        for group in groups
        for i, sae in enumerate(group.saes)
    }
