"""Renders the page about known features, `eval/KNOWN_FEATURES.md`, its picture and the tables that do not fit on it."""

from pathlib import Path

from benchmark import factorial
from benchmark.configs import BENCHMARKS, PUBLISHED_16K
from benchmark.factorial import Cell, cells
from benchmark.figures import draw_f1_against_fvu
from benchmark.report import BenchmarkSummary, result_table
from pages import interval_text, render
from study import tables
from study.plan import GROUPED, WINSORISED, pool_name
from study.studies import BLOCK_10, TINY
from study.summary import committed_summary, shown

TEMPLATES = {"KNOWN_FEATURES.md": "known_features.md", "results/known_features.md": "known_features_tables.md"}
PICTURE = "results/known_features.png"
K = 4
"""The k of the page's sentences and table."""


def write_pages(eval_folder: Path) -> Path:
    """Write the picture and all pages; returns the path of the main page."""
    draw_f1_against_fvu(_summary("dictionaries", eval_folder / "results"), eval_folder / PICTURE)
    for page, text in render_pages(eval_folder / "results").items():
        (eval_folder / page).write_text(text)
    return eval_folder / next(iter(TEMPLATES))


def render_pages(results: Path) -> dict[str, str]:
    """Page texts by file."""
    names = ("dictionaries", "factorial", "factorial_check", "small", "tuning", "synth-sae-bench-16k-cpu")
    dictionaries, of_sizes, of_check, small, tuning, large = (_summary(name, results) for name in names)
    model, smollm2 = (committed_summary(study, results.parent) for study in (TINY, BLOCK_10))
    found, on_check = list(cells(of_sizes)), list(cells(of_check))
    checked = [cell for cell in on_check if is_predicted(cell)]

    def less(arm: str, other: str, metric: str) -> str:
        return interval_text(dictionaries.interval_of_difference(arm, other, K, metric), signed=True)

    def differences(arm: str, other: str, metric: str) -> str:
        """The difference for each k."""
        means = [small.difference(arm, other, k, metric) for k in small.benchmark.ks]
        return ", ".join(shown(difference, metric, signed=True) for difference in means)

    def check_range(metric: str) -> str:
        means = [cell.differences[metric].mean for cell in checked]
        return f"{min(means):+.3f} to {max(means):+.3f}"

    values = {
        "dictionaries": dictionaries,
        "factorial": of_sizes,
        "factorial_rule": factorial,
        "small": small,
        "tuning": tuning,
        "large": large,
        "at_16k": lambda arm, metric: shown(large.mean(arm, large.benchmark.ks[0], metric, ("features_42",)), metric),
        "cells": found,
        "check_cells": checked,
        "other_cells": [cell for cell in on_check if cell not in checked],
        "check_range": check_range,
        "wins": lambda score: sum(cell.wins for cell in found if cell.score == score),
        "won_factors": [cell.pool_factor for cell in found if cell.wins and cell.score == "winsorised"],
        "published": PUBLISHED_16K,
        "shuffled_groups": pool_name(model.study.fixed_pool_factor, GROUPED),
        "model": model,
        "winsorised": WINSORISED,
        "tables": tables,
        "k": K,
        "less": less,
        "differences": differences,
        "number": lambda arm, k, metric: shown(small.mean(arm, k, metric), metric),
        "smollm2": smollm2,
    }
    folder = Path(__file__).parent / "templates"
    return {page: render(folder / template, **values) for page, template in TEMPLATES.items()}


def is_predicted(cell: Cell) -> bool:
    """Whether the page predicted, before `FACTORIAL_CHECK` was run, that this cell would win on it."""
    return cell.score == "winsorised" and 9 <= cell.pool_factor <= 13 and cell.d_sae <= 256


def _summary(name: str, results: Path) -> BenchmarkSummary:
    benchmark = BENCHMARKS[name]
    return BenchmarkSummary(benchmark, result_table(benchmark, results / f"benchmark_{name}").load())
