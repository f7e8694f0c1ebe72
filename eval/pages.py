"""Pages rendered from templates: numbers are looked up in results, never typed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from tabulate import tabulate


def render(template: Path, **values: Any) -> str:
    """A Markdown page; a name that is not among `values` is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    return environment.get_template(template.name).render(**values)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table without padding: where a number changes, its line alone does."""
    return tabulate(rows, header, tablefmt="github", stralign=None, numalign=None, disable_numparse=True)
