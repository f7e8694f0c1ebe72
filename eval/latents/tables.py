"""Results on the latents of each SAE, as Markdown."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from latents.rating import Answer, agreements, score, told_share
from pages import interval_text, markdown_table
from sae_lens_sampled.confidence import Interval, mean_interval

COLUMNS = {
    "share of the token itself": "own_share",
    "effective tokens": "n_tokens",
    "coherence": "coherence",
    "at random": "chance",
}
TOKEN_COLUMNS = {
    "firing rate": "density",
    "share of the commonest token": "commonest_share",
    "average precision of the token alone": "token_precision",
    "balanced accuracy": "token_accuracy",
}


def table(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Means over the latents of each SAE, with half of their 95 % intervals; `names` maps SAEs to labels."""
    lines = []
    for name, label in names.items():
        of_sae = [row for row in rows if row["sae"] == name]
        means = [mean_interval([row[field] for row in of_sae]) for field in COLUMNS.values()]
        errors = [row["completeness_error"] for row in of_sae]
        error = f"{statistics.median(errors):.1g} (largest {max(errors):.1g})"
        lines.append([label, str(len(of_sae)), *map(_with_half, means), error])
    return markdown_table(["SAE", "latents", *COLUMNS, "completeness error"], lines)


def _with_half(interval: Interval) -> str:
    return f"{interval.mean:.3f}" + ("" if interval.half is None else f" ± {interval.half:.3f}")


def token_table(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """How well the token alone predicts where the latents of each SAE fire: means over latents with 95 % intervals.

    Balanced accuracy is given for all places in the second half of the text (rates by token are learnt on the first)
    and for the passages on the page. If a row lacks passages, returns an empty string.
    """
    if not all("token_fires" in row for row in rows):
        return ""
    lines = []
    for name, label in names.items():
        of_sae = [row for row in rows if row["sae"] == name]
        columns = [[row[field] for row in of_sae] for field in TOKEN_COLUMNS.values()]
        columns.append([told_share(row, row["token_fires"]) for row in of_sae])
        lines.append([label, str(len(of_sae)), *(interval_text(mean_interval(column)) for column in columns)])
    return markdown_table(["SAE", "latents", *TOKEN_COLUMNS, "in the page's passages"], lines)


def rating_table(
    rows: Sequence[Mapping[str, Any]], readers: Mapping[str, Mapping[str, Answer]], names: Mapping[str, str]
) -> str:
    """Each reader's results by SAE; columns on passages only if a reader answered some."""
    results = sorted(score(rows, readers), key=lambda result: list(names).index(result["sae"]))
    header = ["SAE", "reader", "rated", "mean of 1 to 4", "one clear thing"]
    if any(result["told"] for result in results):
        header += ["passages of", "balanced accuracy", "above the token alone"]
    lines = [
        [
            names[result["sae"]],
            result["reader"],
            str(result["rated"]),
            interval_text(result["rating"], 2),
            "-" if result["clear"] is None else f"{result['clear']:.0%}",
            str(result["told"]),
            interval_text(result["accuracy"], 2),
            interval_text(result["over_token"], 2, signed=True),
        ][: len(header)]
        for result in results
    ]
    return markdown_table(header, lines)


def means_text(
    rows: Sequence[Mapping[str, Any]], readers: Mapping[str, Mapping[str, Answer]], names: Mapping[str, str]
) -> str:
    """Each reader's mean rating by SAE, in a line: "BatchTopK: 3.74 and 3.62; ..."."""
    results = score(rows, readers)
    of_sae = {name: [f"{result['rating'].mean:.2f}" for result in results if result["sae"] == name] for name in names}
    return "; ".join(f"{label}: {' and '.join(of_sae[name])}" for name, label in names.items())


def agreement_texts(readers: Mapping[str, Mapping[str, Answer]]) -> list[str]:
    """How far each pair of readers agrees, as a sentence."""
    return [
        f"Latents rated by both {one} and {other}: {agreement.n}; the same rating: {agreement.exact:.1%}; "
        f"quadratic kappa: {'not defined' if math.isnan(agreement.kappa) else f'{agreement.kappa:.2f}'}."
        for (one, other), agreement in agreements(readers).items()
    ]
