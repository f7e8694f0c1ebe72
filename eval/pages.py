"""Pages rendered from templates: numbers are looked up in results, never typed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from tabulate import tabulate

from sae_lens_sampled.confidence import Interval


def render(template: Path, **values: Any) -> str:
    """Render a Markdown page; a name missing from `values` is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = lambda share: f"{share:.0%}".replace("%", " %")
    return environment.get_template(template.name).render(**values)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without padding, so that a changed number changes only its own line."""
    return tabulate(rows, header, tablefmt="github", stralign=None, numalign=None, disable_numparse=True)


def interval_text(interval: Interval | None, digits: int = 3, signed: bool = False) -> str:
    """Format a mean with its 95 % interval, or without if it has none; None as "-"."""
    if interval is None:
        return "-"
    form = f"{'+' if signed else ''}.{digits}f"
    if interval.low is None or interval.high is None:
        return f"{interval.mean:{form}}"
    return f"{interval.mean:{form}} [{interval.low:{form}}, {interval.high:{form}}]"
