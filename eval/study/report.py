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
    """Pictures beside the results; the page in `eval/RESULTS.md` for the tiny study, else beside the results too.

    Text that interprets numbers is in the template of that study; the others get tables and pictures alone.
    """
    summary = Summary(storage)
    storage.results.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(summary, storage.results / f"{name}.png")
    has_text = (TEMPLATES / f"{storage.study.name}.md").exists()
    page = (eval_folder if storage.study.name == "tiny" else storage.results) / "RESULTS.md"

    def number(arm: str, metric: str, synthetic: bool = False) -> str:
        return shown(summary.mean(arm, metric, synthetic), metric)

    def difference(arm: str, other: str, metric: str, synthetic: bool = False) -> str:
        return shown(summary.difference(arm, other, metric, synthetic), metric, signed=True)

    def similar(a: str, b: str, *path: str) -> str:
        return shown(summary.similarity(a, b, *path))

    page.write_text(
        render(
            TEMPLATES / (f"{storage.study.name}.md" if has_text else "tables.md"),
            study=storage.study,
            summary=summary,
            tables=tables,
            number=number,
            difference=difference,
            similar=similar,
            pictures=Path(os.path.relpath(storage.results, page.parent)).as_posix(),
        )
    )
    return page
