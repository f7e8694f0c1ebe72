"""The human half: a page of latents in random order, without names, and what a reader's ratings say of each SAE."""

import csv
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

TEMPLATE = Path(__file__).parent / "templates" / "page.html"
SCALE = {
    1: "no pattern",
    2: "a pattern in some places",
    3: "a pattern in most places",
    4: "one clear thing, in every place",
}
"""What a reader answers of a latent."""


def blind(rows: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """The rows in random order, each with an `id` that tells nothing; the page has ids and contexts alone."""
    order = list(rows)
    random.Random(seed).shuffle(order)
    return [{"id": f"{number:03}", **row} for number, row in enumerate(order, start=1)]


def write_page(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Write the page; ratings are kept in the browser and saved as `ratings.csv`."""
    shown = [{"id": row["id"], "contexts": row["contexts"]} for row in rows]
    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), autoescape=True, undefined=jinja2.StrictUndefined)
    file.write_text(template.render(latents=shown, scale=SCALE), encoding="utf-8")


def read_ratings(file: Path) -> dict[str, int]:
    """Ratings by id.

    Raises:
        ValueError: if a column is missing, or a rating is not of the scale.
    """
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or not {"id", "rating"} <= rows[0].keys():
        raise ValueError(f"{file} must have the columns id and rating, and a line at least.")
    for row in rows:
        if row["rating"] not in map(str, SCALE):
            raise ValueError(f"{file}: rating {row['rating']!r} of latent {row['id']} must be of {list(SCALE)}.")
    return {row["id"]: int(row["rating"]) for row in rows}


def score(rows: Sequence[Mapping[str, Any]], ratings: Mapping[str, int]) -> list[dict[str, Any]]:
    """For each SAE the number of rated latents, their mean rating with its standard error, and the share at the top.

    Raises:
        ValueError: if a rating is of a latent that is not among the rows.
    """
    known = {row["id"]: row["sae"] for row in rows}
    if unknown := ratings.keys() - known.keys():
        raise ValueError(f"there are ratings of latents that are not of this page: {', '.join(sorted(unknown))}.")
    results = []
    for name in dict.fromkeys(row["sae"] for row in sorted(rows, key=lambda row: row["sae"])):
        of_sae = [rating for latent, rating in ratings.items() if known[latent] == name]
        n = len(of_sae)
        results.append(
            {
                "sae": name,
                "rated": n,
                "mean": statistics.mean(of_sae) if n else math.nan,
                "error": statistics.stdev(of_sae) / math.sqrt(n) if n > 1 else math.nan,
                "clear": sum(rating == max(SCALE) for rating in of_sae) / n if n else math.nan,
            }
        )
    return results
