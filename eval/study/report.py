"""Stage `report`: the result pages, from templates whose numbers are all looked up in the results."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

from latents import tables as latents
from latents.rating import read_answers
from pages import interval_text, render
from sae_lens_sampled.confidence import Interval, rank_correlation
from study import beside_batchtopk, curves, decision, plan, probing_tables, tables
from study.figures import FIGURES
from study.first_screen import PICTURE, draw_first_screen
from study.named_text import TITLES
from study.storage import Storage
from study.studies import BLOCK_10, LONG, OTHER_BLOCKS, SPLIT_10, TINY
from study.summary import Summary, committed, committed_summary

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "RESULTS.md"
"""Name of each study's page of tables, and of the page in `eval/`."""
LATENTS_PAGE = "results/latents.md"
PAGES = {PAGE: "results.md", "results/bundled.md": "bundled.md", LATENTS_PAGE: "latents.md"}
"""Templates of the pages about all studies, by file in `eval/`."""
CURVES = Path("results") / "curves.png"
"""The picture that the page leads with, in `eval/`."""
ELSEWHERE = {"FVU": "fvu", "dead": "dead", "MMCS": "mmcs", "absorption, full": "absorption_full"}
"""Columns of the table of other blocks and of longer training."""
LATENTS_OF = {
    "batchtopk": "BatchTopK",
    "one_pool_5": "pool 5, one pool",
    "groups_16_factor_10": "pool 10, groups of 16",
}
"""Labels of the SAEs whose latents were examined."""


def write_report(storage: Storage, eval_folder: Path) -> Path:
    """Write pictures and tables next to the results, and the pages in `eval/` if these are the committed ones."""
    summary = Summary(storage)
    storage.results.mkdir(parents=True, exist_ok=True)
    for name in storage.study.pictures:
        FIGURES[name](summary, storage.results / f"{name}.png")
    page = storage.results / PAGE
    page.write_text(render_tables(storage))
    if storage.results.resolve() != committed(storage.study.name, eval_folder).resolve():
        return page
    of_curve = curves.summaries_of_curve(eval_folder)
    if curves.measured(of_curve):
        curves.draw_curves(of_curve, eval_folder / CURVES)
        draw_first_screen(eval_folder, eval_folder / PICTURE)
    for name, text in render_pages(eval_folder).items():
        (eval_folder / name).write_text(text)
    return eval_folder / PAGE


def render_tables(storage: Storage) -> str:
    """Page with everything that one study measured."""
    summary = Summary(storage)
    return render(
        TEMPLATES / "tables.md",
        study=storage.study,
        summary=summary,
        tables=tables,
        beside=beside_batchtopk,
        probing=probing_tables,
        titles=titles(storage.results),
    )


def render_pages(eval_folder: Path) -> dict[str, str]:
    """Pages with the findings of the studies, in words, by file."""
    tiny, real, split = (committed_summary(study, eval_folder) for study in (TINY, BLOCK_10, SPLIT_10))
    texts = {"train": [], "held_out": []} | titles(committed(BLOCK_10.name, eval_folder))
    years = [int(text[-5:-1]) for text in texts["train"]]  # "Author, Title (1853)"
    others = {f"block {study.hook.split('.')[1]}": committed_summary(study, eval_folder) for study in OTHER_BLOCKS}
    others["ten million tokens"] = committed_summary(LONG, eval_folder)
    of_curve = curves.summaries_of_curve(eval_folder)
    values = {
        "tiny": tiny,
        "real": real,
        "split": split,
        "tables": tables,
        "beside": beside_batchtopk,
        "probing": probing_tables if probing_tables.comparisons(real) else None,
        "curves": curves,
        "curve": curves.measured(of_curve),
        "curve_table": curves.curve_table(of_curve),
        "elsewhere": {name: summary for name, summary in others.items() if summary.on_model},
        "elsewhere_columns": ELSEWHERE,
        "step_seconds": beside_batchtopk.step_seconds(eval_folder / "results" / "bench_training_step.json"),
        "export": export_gaps(real),
        "decision": decision,
        "verdicts": decision.verdict_table(real) if decision.verdicts(real) else "",
        "excluded": probing_excluded(tiny),
        "correlated": partial(rank_correlation_of, tiny),
        "interval": partial(interval_text, digits=2, signed=True),
        "titles": texts,
        "years": f"{min(years, default='?')} to {max(years, default='?')}",
        "latents": latents_texts(eval_folder / "results" / "latents_smollm2"),
        "easy": latents_texts(eval_folder / "results" / "latents_smollm2_easy"),
        "devices": " and ".join(sorted({r["device"] for rs in real.on_model.values() for r in rs.values()})),
    }
    pages = [page for page in PAGES if page != LATENTS_PAGE or values["latents"]]
    return {page: render(TEMPLATES / PAGES[page], **values) for page in pages}


def latents_texts(folder: Path) -> dict[str, str]:
    """Tables and sentences on the latents of some SAEs and what readers said of them, by name; none if not measured."""
    if not (folder / "latents.json").exists():
        return {}
    rows = json.loads((folder / "latents.json").read_text())
    files = enumerate(sorted(folder.glob("ratings_*.csv")), start=1)
    readers = {f"reader {n}": read_answers(file) for n, file in files}
    return {
        "count": str(len(rows)),
        "most_of_one_sae": str(max(Counter(row["sae"] for row in rows).values())),
        "table": latents.table(rows, LATENTS_OF),
        "by_token": latents.token_table(rows, LATENTS_OF),
        "ratings": latents.rating_table(rows, readers, LATENTS_OF),
        "means": latents.means_text(rows, readers, LATENTS_OF),
        "agreement": " ".join(latents.agreement_texts(readers)),
    }


def titles(results: Path) -> dict[str, list[str]]:
    """Titles of the texts, by part; empty if the study has a Hub data set or the bundled text."""
    file = results / TITLES
    return json.loads(file.read_text()) if file.exists() else {}


def probing_excluded(summary: Summary) -> int:
    """Number of the six probing comparisons, of the paper's pools with BatchTopK, whose interval excludes 0."""
    found = [summary.difference(f"pool_{n}", "batchtopk", f"probing_{k}") for n in (3, 5) for k in (1, 2, 5)]
    return sum(difference is not None and (difference.p or 1) <= beside_batchtopk.ALPHA for difference in found)


def rank_correlation_of(summary: Summary, metric: str, other: str, other_is_synthetic: bool = False) -> Interval | None:
    """Rank correlation of the means of two metrics over all arms that have both; None without any."""
    means = [(summary.mean(arm, metric), summary.mean(arm, other, other_is_synthetic)) for arm in summary.arms]
    known = [(x.mean, y.mean) for x, y in means if x and y]
    return rank_correlation(*zip(*known, strict=True)) if known else None


def export_gaps(summary: Summary) -> dict[str, str]:
    """How far exports are from the selection of training on the same tokens, for our arms and for BatchTopK."""
    text = {}
    for name, arms in {"ours": decision.CANDIDATES, "batchtopk": [plan.BASE]}.items():
        metrics = [result["metrics"] for arm in arms for result in summary.on_model.get(arm, {}).values()]
        for metric in ("l0", "fvu"):
            gaps = [of_one[metric] / of_one[f"{metric}_of_selection"] - 1 for of_one in metrics]
            text[f"{name}_{metric}"] = f"{min(gaps):+.1%} to {max(gaps):+.1%}" if gaps else "-"
    return text
