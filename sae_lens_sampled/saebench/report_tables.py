"""The tables of the report, as HTML and as Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from sae_lens_sampled.saebench.report_data import SAEResults
from sae_lens_sampled.saebench.report_metrics import SECTIONS, Group, Metric, best_mean

ARROWS = {"higher": "\N{NO-BREAK SPACE}↑", "lower": "\N{NO-BREAK SPACE}↓", None: ""}
MISSING = "-"
CAPTIONS = {
    "Sparsity": "L0 and Gini have no better direction; compare the other metrics only at about the same L0.",
    "Reconstruction": "Of the exported SAE, and with the selection of training where the training SAE was given.",
    "Sparse probing": "Test accuracy of probes on the 1, 2 or 5 best latents or on all of them, mean over data sets.",
    "Absorption": "How much of a first letter other latents than its own carry, and how often its own are silent.",
    "Similarity of seeds": "Seeds of one pair share its MMCS, so their spread is no standard error and none is given.",
}


@dataclass(frozen=True)
class Cell:
    """Text of one cell."""

    text: str
    is_number: bool = True
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; every row has the header's length."""

    title: str
    caption: str
    header: list[str]
    rows: list[list[Cell]]


def group_tables(groups: Sequence[Group]) -> list[Table]:
    """Means and standard errors over seeds, the best mean of each metric marked; one table per kind of metric."""

    def cells(group: Group, metrics: Sequence[Metric]) -> list[Cell]:
        return [_estimate_cell(group, metric, groups) for metric in metrics]

    def names(group: Group) -> list[Cell]:
        return [Cell(group.sae_class, False), Cell(group.name, False), Cell(str(len(group.saes)))]

    saes = [sae for group in groups for sae in group.saes]
    return _tables(saes, ["Class", "Group", "Seeds"], groups, names, cells)


def sae_tables(saes: Sequence[SAEResults]) -> list[Table]:
    """The values of every single SAE."""

    def cells(sae: SAEResults, metrics: Sequence[Metric]) -> list[Cell]:
        return [Cell(_number(metric.of(sae), metric)) for metric in metrics]

    def names(sae: SAEResults) -> list[Cell]:
        return [Cell(sae.sae_class, False), Cell(sae.label, False)]

    return _tables(saes, ["Class", "SAE"], saes, names, cells)


def html_table(table: Table, with_caption: bool) -> str:
    """The table in a box of its own, which scrolls if it is too wide."""
    n_names = sum(not cell.is_number for cell in table.rows[0])
    classes = [""] * n_names + [' class="number"'] * (len(table.header) - n_names)
    head = "".join(f"<th{one}>{escape(text)}</th>" for one, text in zip(classes, table.header, strict=True))
    rows = "\n".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>" for row in table.rows)
    caption = f'<p class="caption">{escape(table.caption)}</p>' if with_caption else ""
    return (
        f'<h3>{escape(table.title)}</h3>\n<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>\n{caption}"
    )


def markdown_table(table: Table) -> str:
    """The table under a heading; best values are bold."""
    lines = [
        "| " + " | ".join(map(_markdown, table.header)) + " |",
        "|" + "".join("---:|" if cell.is_number else "---|" for cell in table.rows[0]),
    ]
    for row in table.rows:
        texts = (f"**{_markdown(cell.text)}**" if cell.is_best else _markdown(cell.text) for cell in row)
        lines.append("| " + " | ".join(texts) + " |")
    return f"### {table.title}\n\n{table.caption}\n\n" + "\n".join(lines)


def _tables(
    saes: Sequence[SAEResults],
    name_header: list[str],
    items: Sequence[Group] | Sequence[SAEResults],
    names: Callable[..., list[Cell]],
    cells: Callable[..., list[Cell]],
) -> list[Table]:
    """One table per section, of the metrics that any SAE has."""
    tables = []
    for title, metrics in SECTIONS.items():
        shown = [metric for metric in metrics if any(metric.of(sae) is not None for sae in saes)]
        if shown:
            header = name_header + [metric.name + ARROWS[metric.better] for metric in shown]
            rows = [names(item) + cells(item, shown) for item in items]
            tables.append(Table(title, CAPTIONS[title], header, rows))
    return tables


def _estimate_cell(group: Group, metric: Metric, groups: Sequence[Group]) -> Cell:
    found = group.estimate(metric)
    if found is None:
        return Cell(MISSING)
    text = _number(found.mean, metric)
    if found.error is not None:
        text += f" ± {_number(found.error, metric)}"
    if found.n < len(group.saes):
        text += f" (n={found.n})"
    return Cell(text, is_best=round(found.mean, metric.digits) == best_mean(metric, groups))


def _number(value: float | None, metric: Metric) -> str:
    return MISSING if value is None else f"{value:.{metric.digits}f}"


def _html_cell(cell: Cell) -> str:
    classes = " ".join(name for name, on in (("number", cell.is_number), ("best", cell.is_best)) if on)
    return f'<td class="{classes}">{escape(cell.text)}</td>' if classes else f"<td>{escape(cell.text)}</td>"


def _markdown(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")
