"""Stage `report`: the result page, from a template whose numbers are all looked up in the results."""

import os
from pathlib import Path

from pages import render
from study import tables
from study.figures import FIGURES
from study.storage import Storage
from study.summary import Summary, shown

TEMPLATES = Path(__file__).parent / "templates"


def write_report(storage: Storage, eval_folder: Path) -> Path:
    """Draw the pictures, beside the results, and write the page."""
    summary = Summary(storage)
    storage.results.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(summary, storage.results / f"{name}.png")
    page = page_file(storage, eval_folder)
    page.write_text(render_page(storage, eval_folder))
    return page


def page_file(storage: Storage, eval_folder: Path) -> Path:
    """`eval/RESULTS.md` for the tiny study, else beside the results."""
    return (eval_folder if storage.study.name == "tiny" else storage.results) / "RESULTS.md"


def render_page(storage: Storage, eval_folder: Path) -> str:
    """The page. Text that interprets numbers is in the template of its study; others get tables and pictures alone."""
    summary = Summary(storage)
    own_template = TEMPLATES / f"{storage.study.name}.md"

    def number(arm: str, metric: str, synthetic: bool = False) -> str:
        return shown(summary.mean(arm, metric, synthetic), metric)

    def difference(arm: str, other: str, metric: str, synthetic: bool = False) -> str:
        return shown(summary.difference(arm, other, metric, synthetic), metric, signed=True)

    def similar(arm: str, other: str, *path: str) -> str:
        return shown(summary.similarity(arm, other, *path))

    return render(
        own_template if own_template.exists() else TEMPLATES / "tables.md",
        study=storage.study,
        summary=summary,
        tables=tables,
        number=number,
        difference=difference,
        similar=similar,
        pictures=Path(os.path.relpath(storage.results, page_file(storage, eval_folder).parent)).as_posix(),
    )
