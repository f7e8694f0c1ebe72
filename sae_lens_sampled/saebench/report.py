"""`write_report`: the results of an output folder as a page to look at and as Markdown."""

import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sae_lens_sampled.saebench.report_data import SAEResults, evals_of, notes, read_results
from sae_lens_sampled.saebench.report_figures import figures
from sae_lens_sampled.saebench.report_html import MARK_HINT, page
from sae_lens_sampled.saebench.report_metrics import groups_of
from sae_lens_sampled.saebench.report_tables import group_tables, markdown_table, sae_tables

TITLE = "SAEBench report"


def write_report(output_dir: str | Path) -> Path:
    """Write `report.html`, one file that needs no network, and `report.md` into `output_dir`; the path of the former.

    Args:
        output_dir: that of `run_evals`, or a folder of SAEBench's own results. Any eval may be missing for any SAE.

    Raises:
        ValueError: if there are no results.
    """
    saes = read_results(output_dir)
    groups = groups_of(saes)
    means, singles = group_tables(groups), sae_tables(saes)
    described = facts(saes)
    remarks = notes(saes)
    markdown = [
        f"# {TITLE}",
        "\n".join(f"- {name}: {value}" for name, value in described.items()),
        "\n".join(f"> - {note}" for note in remarks),
        "## Means over seeds",
        MARK_HINT.replace("Bold on green", "Bold"),
        *map(markdown_table, means),
        "## Single SAEs",
        *map(markdown_table, singles),
    ]
    path = Path(output_dir) / "report.html"
    _write(path, page(TITLE, described, remarks, means, singles, figures(saes, groups), saes))
    _write(path.with_suffix(".md"), "\n\n".join(filter(None, markdown)) + "\n")
    return path


def facts(saes: Sequence[SAEResults]) -> dict[str, str]:
    """What was evaluated on what and when, by name; only what the results say."""
    evals = evals_of(saes)
    counts = {name: sum(name in sae.results for sae in saes) for name in evals}
    times = [time for sae in saes for name in evals if (time := sae.number(name, "datetime_epoch_millis"))]
    days = sorted({datetime.fromtimestamp(time / 1000, timezone.utc).date().isoformat() for time in times})
    n_tokens = _distinct(saes, "core", "eval_result_metrics", "token_stats", "total_tokens_eval_sparsity_variance")
    found = {
        "Model": ", ".join(
            sorted({one for name in evals for one in _distinct(saes, name, "eval_config", "model_name")})
        ),
        "Hook": ", ".join(
            sorted({hook for name in evals for hook in _distinct(saes, name, "sae_cfg_dict", "metadata", "hook_name")})
        ),
        "SAEs": f"{len(saes)} in {len(groups_of(saes))} groups",
        "Evals": ", ".join(f"{name} ({n} SAEs)" for name, n in counts.items()),
        "Text of core": ", ".join(_short(text) for text in _distinct(saes, "core", "eval_config", "dataset")),
        "Tokens of core": ", ".join(f"{int(n):,}" for n in n_tokens),
        "Probing data": ", ".join(
            dict.fromkeys(
                _short(name)
                for names in _distinct(saes, "sparse_probing", "eval_config", "dataset_names")
                for name in names
            )
        ),
        "Date": " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "",
    }
    return {name: value for name, value in found.items() if value}


def _distinct(saes: Sequence[SAEResults], *path: str) -> list[Any]:
    """The different values at `path`, as they come."""
    found: list[Any] = []
    for sae in saes:
        value = sae.get(*path)
        if value is not None and value not in found:
            found.append(value)
    return found


def _short(name: str) -> str:
    """The last parts of a path on somebody's machine; a Hub name as it is."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def _write(path: Path, text: str) -> None:
    """In one step that cannot be interrupted."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)
