"""Colours, marks and axes that all figures share."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from sae_lens_sampled.saebench.report.metrics import Group

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f4f24", "#444444")
"""Okabe and Ito's colours, which the colour-blind can tell apart, with other colours for yellow and black."""
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
PLAIN = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
"""Characters that plotly would parse as tags or entities, and the entities that it displays as these characters."""
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"
"""The page's font, as in `page.css`."""
GRID = "#e6e6e6"
MAX_NARROW = 6


@dataclass(frozen=True)
class Style:
    """Look of a group: its colour, and the symbol of its architecture."""

    colour: str
    symbol: str


def styles(groups: Sequence[Group]) -> dict[Group, Style]:
    """Styles by group; colours and symbols repeat when they run out."""
    classes = sorted({group.sae_class for group in groups})
    return {
        group: Style(COLOURS[i % len(COLOURS)], SYMBOLS[classes.index(group.sae_class) % len(SYMBOLS)])
        for i, group in enumerate(groups)
    }


def shown(name: str) -> str:
    """Escape a name so that plotly displays it literally."""
    return name.translate(PLAIN)


def is_wide(n_entries: int) -> bool:
    """Whether a figure with this many SAEs takes the whole width of the page."""
    return n_entries > MAX_NARROW


def finish(plot: go.Figure, x_title: str, y_title: str, n_entries: int = 0) -> go.Figure:
    """Add axis titles, grid, fonts and a legend (above the plot, or beside a wide one); the page sets the width."""
    height = max(430, 110 + 21 * n_entries)
    legend = {"x": 1.01, "y": 1} if is_wide(n_entries) else {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    axis = {
        "gridcolor": GRID,
        "linecolor": "#999",
        "showline": True,
        "zeroline": False,
        "ticks": "outside",
        "tickcolor": "#999",
        "automargin": True,
        "title": {"standoff": 12, "font": {"size": 13}},
    }
    plot.update_xaxes(**axis, title_text=x_title)
    plot.update_yaxes(**axis, title_text=y_title)
    plot.update_layout(
        template="none",
        height=height,
        autosize=True,
        margin={"l": 64, "r": 16, "t": 24, "b": 56},
        font={"family": FONT, "size": 13, "color": "#222"},
        paper_bgcolor="white",
        plot_bgcolor="white",
        showlegend=True,
        legend=legend | {"font": {"size": 12}},
        hoverlabel={"bgcolor": "white", "font": {"size": 12}},
    )
    return plot
