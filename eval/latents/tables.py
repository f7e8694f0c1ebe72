"""What was found of the latents of each SAE, as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pages import markdown_table
from sae_lens_sampled.confidence import mean_interval

COLUMNS = {
    "share of the token itself": "own_share",
    "effective tokens": "n_tokens",
    "coherence": "coherence",
    "at random": "chance",
}


def table(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """Means over the latents of each SAE, with half of their 95 % intervals; `names` says how the SAEs are shown."""
    lines = []
    for name, label in names.items():
        of_sae = [row for row in rows if row["sae"] == name]
        means = [mean_interval([row[field] for row in of_sae]) for field in COLUMNS.values()]
        errors = [row["completeness_error"] for row in of_sae]
        error = f"{statistics.median(errors):.1g} (largest {max(errors):.1g})"
        lines.append([label, str(len(of_sae)), *(f"{m.mean:.3f} ± {m.half or 0:.3f}" for m in means), error])
    return markdown_table(["SAE", "latents", *COLUMNS, "completeness error"], lines)


def rating_table(results: Sequence[Mapping[str, Any]]) -> str:
    """What a reader found."""
    rows = [
        [row["sae"], str(row["rated"]), f"{row['mean']:.2f} ± {row['error']:.2f}", f"{row['clear']:.0%}"]
        for row in results
    ]
    return markdown_table(["SAE", "rated", "mean rating", "one clear thing"], rows)
