"""Figures of the report, with titles and captions. Figures for which no SAE has the numbers are left out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from markupsafe import Markup

from sae_lens_sampled.saebench.report.metrics import FRACTION, FVU, L0, TOP_1, Group
from sae_lens_sampled.saebench.report.plots import decile_plot, density_plot, mmcs_plot, pareto_plot, with_model_line
from sae_lens_sampled.saebench.report.results import SAEResults
from sae_lens_sampled.saebench.report.style import is_wide

PER_SAE = ("densities", "deciles", "mmcs")
"""Keys of the figures with a line or a row for every SAE."""


@dataclass(frozen=True)
class Figure:
    """A plot with its title and caption."""

    key: str
    title: str
    caption: str
    plot: go.Figure
    is_wide: bool
    """Whether the figure needs the whole width of the page."""

    def html(self, with_plotly: bool) -> Markup:
        """The plot as an HTML element; a page needs plotly.js once, with its first plot."""
        config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
        return Markup(
            self.plot.to_html(
                full_html=False,
                include_plotlyjs=with_plotly,
                include_mathjax=False,
                div_id=f"plot-{self.key}",
                config=config,
            )
        )


def figures(saes: Sequence[SAEResults], groups: Sequence[Group]) -> list[Figure]:
    """The figures for which `saes` have the numbers, in the order of the page. `groups` are the groups of `saes`."""
    seeds = "Small marks are seeds; large marks are their means, with 95 % intervals if there are three seeds or more."
    kinds: list[tuple[str, str, str, Callable[[], go.Figure | None]]] = [
        (
            "fvu-probing",
            "Reconstruction and sparse probing",
            f"Up and to the left is better; neither axis says how interpretable a latent is. {seeds}",
            lambda: with_model_line(pareto_plot(groups, FVU, TOP_1), saes),
        ),
        (
            "fvu-absorption",
            "Reconstruction and absorption",
            f"Down and to the left is better; absorption is measured on first letters of words only. {seeds}",
            lambda: pareto_plot(groups, FVU, FRACTION),
        ),
        (
            "l0-fvu",
            "Sparsity and reconstruction",
            f"Compare FVU only at about the same L0, because more active latents mostly reconstruct better. {seeds}",
            lambda: pareto_plot(groups, L0, FVU),
        ),
        (
            "densities",
            "How often latents fire",
            "Look for latents at the far right, which fire almost everywhere; that a latent fires rarely does not make "
            "it a bad latent. Dead latents (never active on the evaluation text) are counted only in the legend.",
            lambda: density_plot(saes, groups),
        ),
        (
            "deciles",
            "Which latents carry the activation",
            "Look at how steep the curves are: latents that fire often carry more in any SAE, so only differences "
            "between curves at the same L0 are informative.",
            lambda: decile_plot(saes, groups),
        ),
        (
            "mmcs",
            "Mean max cosine similarity of decoders",
            "Look for pairs far above chance; a value is the mean, over latents of the row's SAE, of the largest "
            "cosine with a latent of the column's SAE, so it is neither one-to-one nor symmetric.",
            lambda: mmcs_plot(saes),
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
    """A sentence with the baseline of the MMCS figure; empty for other figures."""
    if key != "mmcs":
        return ""
    baselines = [value for sae in saes if (value := sae.number("mmcs", "eval_result_metrics", "decoder", "baseline"))]
    if not baselines:
        return ""
    low, high = f"{min(baselines):.3f}", f"{max(baselines):.3f}"
    return f" Random directions reach {low if low == high else f'{low} to {high}'}."
