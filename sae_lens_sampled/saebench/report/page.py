"""`write_report`: writes the HTML page, from the template `page.html`, and the Markdown."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from sae_lens_sampled.files import atomic_write
from sae_lens_sampled.saebench.report.facts import facts, notes
from sae_lens_sampled.saebench.report.figures import figures
from sae_lens_sampled.saebench.report.metrics import OURS, groups_of
from sae_lens_sampled.saebench.report.results import read_results, unreadable
from sae_lens_sampled.saebench.report.tables import Table, group_tables, markdown_table, sae_tables

TITLE = "SAEBench report"
MARK_HINT = (
    "± is half of the 95 % interval (Student's t over seeds). {} marks the best displayed mean of a column, which need "
    "not differ significantly from the others."
)


def write_report(output_dir: str | Path) -> Path:
    """Write `report.html`, a self-contained file, and `report.md` into `output_dir`; return the path of `report.html`.

    Args:
        output_dir: output folder of `run_evals`, or a folder of SAEBench's own results. SAEs may lack results of evals.

    Raises:
        ValueError: if the folder does not exist or holds no readable result.
    """
    saes = read_results(output_dir)
    groups = groups_of(saes)
    means, singles, described = group_tables(groups), sae_tables(saes), facts(saes)
    remarks = notes(saes, unreadable(output_dir))
    html = _template().render(
        title=TITLE,
        facts=described,
        notes=remarks,
        mark_hint=MARK_HINT.format("Bold on green"),
        means=means,
        figures=figures(saes, groups),
        singles=singles,
        contexts=[(sae.label, latents) for sae in saes if (latents := sae.get(*OURS, "top_contexts"))],
    )
    path = Path(output_dir) / "report.html"
    atomic_write(path, html)
    atomic_write(path.with_suffix(".md"), _markdown(described, remarks, means, singles))
    return path


def one_line(text: str) -> str:
    """`text` with line breaks and tabs replaced by visible symbols."""
    for space, sign in (("\r\n", "⏎"), ("\n", "⏎"), ("\r", "⏎"), ("\t", "⇥")):
        text = text.replace(space, sign)
    return text


def visible(token: str) -> str:
    """`token`, or visible symbols if it consists only of spaces."""
    return token if token.strip(" ") else "␣" * len(token)


def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"one_line": one_line, "visible": visible}
    return environment.get_template("page.html")


def _markdown(described: dict[str, str], remarks: list[str], means: list[Table], singles: list[Table]) -> str:
    parts = [
        f"# {TITLE}",
        "\n".join(f"- {name}: {value}" for name, value in described.items()),
        "\n".join(f"> - {note}" for note in remarks),
        "## Means over seeds",
        MARK_HINT.format("Bold"),
        *map(markdown_table, means),
        "## Single SAEs",
        *map(markdown_table, singles),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"
