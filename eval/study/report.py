"""Stage `report`: the result pages, from templates whose numbers are all looked up in the results."""

import json
from functools import partial
from pathlib import Path

from latents import tables as latents
from latents.rating import read_answers
from pages import interval_text, render
from sae_lens_sampled.confidence import Interval, rank_correlation
from study import beside_batchtopk, decision, tables
from study.figures import FIGURES
from study.named_text import TITLES
from study.storage import Storage
from study.studies import BLOCK_10, SMOLLM2, TINY
from study.summary import Summary, committed, committed_summary

TEMPLATES = Path(__file__).parent / "templates"
PAGE = "RESULTS.md"
"""Name of each study's page of tables, and of the page in `eval/`."""
PAGES = {PAGE: "results.md", "results/bundled.md": "bundled.md"}
"""Templates of the pages about all studies, by file in `eval/`."""
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
        titles=titles(storage.results),
    )


def render_pages(eval_folder: Path) -> dict[str, str]:
    """Pages with the findings of the studies, in words, by file."""
    summaries = {study.name: committed_summary(study, eval_folder) for study in (TINY, SMOLLM2, BLOCK_10)}
    decided = summaries[BLOCK_10.name]
    real, texts = summaries[SMOLLM2.name], titles(committed(SMOLLM2.name, eval_folder))
    years = [int(text[-5:-1]) for text in texts["train"]]  # "Author, Title (1853)"
    seconds = beside_batchtopk.step_seconds(eval_folder / "results" / "bench_training_step.json")
    values = {
        "tiny": summaries[TINY.name],
        "real": real,
        "tables": tables,
        "beside": beside_batchtopk,
        "step_seconds": seconds,
        "time": {arm: f"{of_arm / seconds['batchtopk']:.2f}" for arm, of_arm in seconds.items()},
        "export": export_gaps(real),
        "decision": decision,
        "decided": decided,
        "verdicts": decision.verdict_table(decided) if decision.verdicts(decided) else "",
        "firing": partial(tables.firing, real),
        "excluded": probing_excluded(summaries[TINY.name]),
        "correlated": partial(rank_correlation_of, summaries[TINY.name]),
        "interval": partial(interval_text, digits=2, signed=True),
        "titles": texts,
        "years": f"{min(years)} to {max(years)}",
        "latents": latents_table(eval_folder / "results" / "latents_smollm2" / "latents.json"),
        "latents_readers": latents_readers(eval_folder / "results" / "latents_smollm2"),
        "devices": " and ".join(sorted({r["device"] for rs in real.on_model.values() for r in rs.values()})),
    }
    return {page: render(TEMPLATES / template, **values) for page, template in PAGES.items()}


def latents_table(file: Path) -> str:
    """Table of what drives the latents, by SAE; empty if not measured."""
    return latents.table(json.loads(file.read_text()), LATENTS_OF) if file.exists() else ""


def latents_readers(folder: Path) -> str:
    """Readers' results on the latents, by SAE; empty without ratings."""
    files = sorted(folder.glob("ratings_*.csv"))
    if not files:
        return ""
    rows = json.loads((folder / "latents.json").read_text())
    readers = {f"reader {n}": read_answers(file) for n, file in enumerate(files, start=1)}
    return latents.readers_text(rows, readers, LATENTS_OF)


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
    """How far exports are from the selection of training, for our arms (no baselines or controls) and for BatchTopK."""

    def gaps(metric: str, arms: list[str]) -> list[float]:
        metrics = [result["metrics"] for arm in arms for result in summary.on_model.get(arm, {}).values()]
        return [of_one[metric] / of_one[f"{metric}_in_training"] - 1 for of_one in metrics]

    ours = [arm for arm in summary.arms if arm not in tables.baselines() + tables.controls()]
    text = {}
    for name, arms in {"ours": ours, "batchtopk": ["batchtopk"]}.items():
        for metric in ("l0", "fvu"):
            values = gaps(metric, arms)
            text[f"{name}_{metric}"] = f"{min(values):+.1%} to {max(values):+.1%}"
    text["n"] = str(len(gaps("l0", ours)))
    text["n_within"] = str(sum(abs(gap) <= 0.03 for gap in gaps("l0", ours)))
    return text
