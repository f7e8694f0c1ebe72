"""Renders EXPORT.md, all tables and the picture from the results of `check_export.py`."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from pages import markdown_table, render

Setting = dict[str, Any]
TEMPLATES = {"EXPORT.md": "EXPORT.md", "results/export.md": "export_tables.md"}
PICTURE = "results/export.png"
KINDS = {
    "l2_norm": "k",
    "entropy": "#d55e00",
    "perplexity": "#009e73",
    "nested levels": "#0072b2",
    "drawn at random": "0.7",
}
"""Colours by kind of pool."""


def gaps(row: Setting) -> tuple[float, float]:
    """Relative differences of the default export from training, first in L0, then in FVU."""
    return row["per_latent_L0"] / row["L0"] - 1, row["per_latent_FVU"] / row["FVU"] - 1


def levels_of(row: Setting) -> str:
    """Nested widths as text."""
    widths = row.get("matryoshka_widths")
    return "-" if widths is None else ", ".join(map(str, widths))


COLUMNS: dict[str, Callable[[Setting], str]] = {
    "data": lambda row: row["data"],
    "pool": lambda row: row.get("pool_sampling", "top"),
    "groups of": lambda row: str(row.get("pool_group_size") or "-"),
    "score": lambda row: row["score"],
    "levels": levels_of,
    "pool factor": lambda row: f"{row['pool_factor']:.3g}",
    "L0 train": lambda row: f"{row['L0']:.2f}",
    "L0 export": lambda row: f"{row['per_latent_L0']:.2f}",
    "L0 global": lambda row: f"{row['global_L0']:.1f}",
    "FVU train": lambda row: f"{row['FVU']:.3f}",
    "FVU export": lambda row: f"{row['per_latent_FVU']:.3f}",
    "FVU global": lambda row: f"{row['global_FVU']:.3f}",
    "L0 gap": lambda row: f"{gaps(row)[0]:+.1%}",
    "FVU gap": lambda row: f"{gaps(row)[1]:+.1%}",
    "FVU best": lambda row: f"{row['best_FVU']:.3f}" if "best_FVU" in row else "-",
}


def table(rows: list[Setting], leave_out: Collection[str] = ()) -> str:
    """Markdown table of `rows`."""
    columns = {name: cell for name, cell in COLUMNS.items() if name not in leave_out}
    return markdown_table(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def summary(rows: list[Setting]) -> dict[str, Any]:
    """How far the exports of `rows` are from training."""
    l0_gaps, fvu_gaps = zip(*map(gaps, rows), strict=True)
    return {
        "n": len(rows),
        "n_l0_within": {f"{most:.0%}": sum(abs(gap) <= most for gap in l0_gaps) for most in (0.03, 0.05)},
        "n_fvu_within": {"2%": sum(gap <= 0.02 for gap in fvu_gaps)},
        "n_fvu_lower": {"2%": sum(gap < -0.02 for gap in fvu_gaps)},
        "n_fvu_higher": {"2%": sum(gap > 0.02 for gap in fvu_gaps)},
        "largest_l0_gap": f"{max(map(abs, l0_gaps)):.0%}",
        "lowest_fvu_gap": f"{-min(fvu_gaps):.0%} lower",
        "highest_fvu_gap": f"{max(fvu_gaps):.0%} higher",
        "largest_fvu_ratio": f"{1 + max(fvu_gaps):.0f}",
    }


def kind_of(row: Setting) -> str:
    """The row's key in `KINDS`."""
    if row.get("pool_sampling") == "proportional":
        return "drawn at random"
    return "nested levels" if "matryoshka_widths" in row else row["score"]


def draw(rows: list[Setting], file: Path) -> None:
    """Plot L0 and FVU of each SAE's default export as ratios to those of training."""
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for kind, colour in reversed(KINDS.items()):
        of_kind = [row for row in rows if kind_of(row) == kind]
        x, y = ([1 + gaps(row)[i] for row in of_kind] for i in (0, 1))
        axes.scatter(x, y, s=18, color=colour, alpha=0.8, lw=0, label=kind)
    for line in (axes.axhline, axes.axvline):
        line(1, color="0.8", lw=1, zorder=0)
    axes.set(xlabel="L0 of the export / of training", ylabel="FVU of the export / of training", yscale="log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def write_pages(rows: list[Setting], setup: dict[str, int], eval_folder: Path) -> Path:
    """Write the picture and all pages; returns the path of the main page."""
    draw(rows, eval_folder / PICTURE)
    for page, text in pages(rows, setup).items():
        (eval_folder / page).write_text(text)
    return eval_folder / next(iter(TEMPLATES))


def pages(rows: list[Setting], setup: dict[str, int]) -> dict[str, str]:
    """Page texts by file; `setup` says how the SAEs were trained."""
    top = [row for row in rows if row.get("pool_sampling", "top") == "top"]
    nested = [row for row in rows if "matryoshka_widths" in row]
    plain = [row for row in top if row not in nested]
    l2_norm = [row for row in plain if row["data"] == "tiny_lm" and row["score"] == "l2_norm"]
    by_groups = sorted(l2_norm, key=lambda row: (row.get("pool_group_size") or 0, row["pool_factor"]))
    misses = [row for row in top if abs(gaps(row)[0]) > 0.03 or gaps(row)[1] > 0.02]
    same = ("data", "pool", "score", "levels", "L0 gap", "FVU gap", "FVU best")
    values = setup | {
        "l2_norm_table": table(by_groups, leave_out=same),
        "misses_table": table(misses, leave_out=["L0 global", "FVU global"]),
        "all_table": table(rows),
        "nested_table": table(nested, leave_out=["pool", "score", "FVU best"]),
        "top": summary(plain),
        "l2_norm": summary([row for row in plain if row["score"] == "l2_norm"]),
        "nested": summary(nested),
        "proportional": summary([row for row in rows if row.get("pool_sampling") == "proportional"]),
        "n_rows": len(rows),
    }
    folder = Path(__file__).parent / "templates"
    return {page: render(folder / template, **values) for page, template in TEMPLATES.items()}
