"""The page that a reader fills in: latents in random order, without the SAEs' names and without the answers."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from latents.places import N_BANDS, N_POSITIVE
from latents.rating import SCALE

TEMPLATE = Path(__file__).parent / "templates" / "page.html"
LINE_BREAK = "↵"


def blind(rows: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The rows in random order, each with an `id` that reveals nothing."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    return [{"id": f"{number:03}", **row} for number, row in enumerate(order, start=1)]


def write_page(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write the page; it keeps the reader's answers in the browser, and saves them as `ratings.csv` on request."""
    shown = [
        {
            "id": row["id"],
            "contexts": [visible(context, ("before", "token", "after")) for context in row["contexts"]],
            "passages": [visible(passage, ("before", "text")) for passage in row["passages"]],
        }
        for row in rows
    ]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = template.render(latents=shown, scale=SCALE, n_read=N_BANDS, n_positive=N_POSITIVE, line_break=LINE_BREAK)
    file.write_text(page, encoding="utf-8")


def visible(texts: Mapping[str, Any], parts: Sequence[str]) -> dict[str, str]:
    """The given parts of the texts, with a mark at every line break."""
    return {part: texts[part].replace("\n", f"{LINE_BREAK}\n") for part in parts}
