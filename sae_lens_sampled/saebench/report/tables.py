"""The tables of the report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from sae_lens_sampled.saebench.report.metrics import SECTIONS, Group, Metric, best_mean
from sae_lens_sampled.saebench.report.results import SAEResults

ARROWS = {"higher": "\N{NO-BREAK SPACE}↑", "lower": "\N{NO-BREAK SPACE}↓", None: ""}
MISSING = "-"
MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "\\|", "\n": " "})
"""Characters with a meaning in Markdown tables, and their replacements."""
CAPTIONS = {
    "Sparsity": "L0 and Gini have no better direction; compare the other metrics only at about the same L0.",
    "Reconstruction": "Of the exported SAE, and with the training-time selection if the training SAE was given.",
    "Sparse probing": "Test accuracy of probes on the best 1, 2 or 5 latents, or on all, averaged over data sets.",
    "Absorption": "How much of a first letter other latents carry, and how often one does while its own are silent.",
    "Similarity of seeds": "Each pair of seeds enters the MMCS of both, so values are not independent: no interval.",
}


@dataclass(frozen=True)
class Cell:
    """Text of one cell, and how to display it."""

    text: str
    is_number: bool = True
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header of the same length."""

    title: str
    caption: str
    header: list[str]
    rows: list[list[Cell]]


def group_tables(groups: Sequence[Group]) -> list[Table]:
    """Means over seeds ± half of their 95 % intervals, with the best of each metric marked; one table per section."""

    def cells(group: Group, metrics: Sequence[Metric]) -> list[Cell]:
        return [_estimate_cell(group, metric, groups) for metric in metrics]

    def names(group: Group) -> list[Cell]:
        return [Cell(group.sae_class, False), Cell(group.name, False), Cell(str(len(group.saes)))]

    saes = [sae for group in groups for sae in group.saes]
    return _tables(saes, ["Class", "Group", "Seeds"], groups, names, cells)


def sae_tables(saes: Sequence[SAEResults]) -> list[Table]:
    """The values of each SAE; one table per section."""

    def cells(sae: SAEResults, metrics: Sequence[Metric]) -> list[Cell]:
        return [Cell(_number(metric.of(sae), metric)) for metric in metrics]

    def names(sae: SAEResults) -> list[Cell]:
        return [Cell(sae.sae_class, False), Cell(sae.label, False)]

    return _tables(saes, ["Class", "SAE"], saes, names, cells)


def markdown_table(table: Table) -> str:
    """The table in Markdown, under a heading, with best values in bold."""
    rows = [[f"**{_plain(cell.text)}**" if cell.is_best else _plain(cell.text) for cell in row] for row in table.rows]
    text = tabulate(
        rows,
        [_plain(name) for name in table.header],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["right" if cell.is_number else "left" for cell in table.rows[0]],
    )
    return f"### {table.title}\n\n{table.caption}\n\n{text}"


def _tables(
    saes: Sequence[SAEResults],
    name_header: list[str],
    items: Sequence[Group] | Sequence[SAEResults],
    names: Callable[..., list[Cell]],
    cells: Callable[..., list[Cell]],
) -> list[Table]:
    """One table per section, with the metrics that at least one SAE has."""
    tables = []
    for title, metrics in SECTIONS.items():
        shown = [metric for metric in metrics if any(metric.of(sae) is not None for sae in saes)]
        if shown:
            header = name_header + [metric.name + ARROWS[metric.better] for metric in shown]
            rows = [names(item) + cells(item, shown) for item in items]
            tables.append(Table(title, CAPTIONS[title], header, rows))
    return tables


def _estimate_cell(group: Group, metric: Metric, groups: Sequence[Group]) -> Cell:
    estimate = group.estimate(metric)
    if estimate is None:
        return Cell(MISSING)
    text = _number(estimate.mean, metric)
    if estimate.half is not None:
        text += f" ± {_number(estimate.half, metric)}"
    if estimate.n < len(group.saes):
        text += f" (n={estimate.n})"
    return Cell(text, is_best=round(estimate.mean, metric.digits) == best_mean(metric, groups))


def _number(value: float | None, metric: Metric) -> str:
    return MISSING if value is None else f"{value:.{metric.digits}f}"


def _plain(text: str) -> str:
    return text.translate(MARKDOWN)
