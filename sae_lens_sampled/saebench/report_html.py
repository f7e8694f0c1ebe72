"""The report as one page of HTML that needs nothing but itself."""

from collections.abc import Sequence
from html import escape
from typing import Any

from sae_lens_sampled.saebench.report_data import SAEResults
from sae_lens_sampled.saebench.report_figures import Figure
from sae_lens_sampled.saebench.report_metrics import OURS
from sae_lens_sampled.saebench.report_style import FONT
from sae_lens_sampled.saebench.report_tables import Table, html_table

MARK_HINT = "Bold on green is the best mean of its column as shown, not a significant difference."
CONTEXTS_HINT = (
    "The latents that carry most of the activation without firing on more than a tenth of the tokens, each with the "
    "text around its largest activations and the token marked (⏎ is a new line, ␣ a lone space); look for what the "
    "marked tokens share, which largest activations alone cannot prove."
)
CSS = f"""
body {{ font: 15px/1.5 {FONT}; color: #222; background: #fff; max-width: 1180px; margin: 0 auto; padding: 24px; }}
h1 {{ font-size: 26px; margin: 0 0 8px; }}
h2 {{ font-size: 20px; margin: 40px 0 8px; padding-top: 12px; border-top: 1px solid #ddd; }}
h3 {{ font-size: 15px; margin: 20px 0 6px; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; }}
dt {{ color: #666; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
.notes {{ background: #fff8e1; border-left: 4px solid #e6b422; padding: 8px 16px 8px 32px; margin: 16px 0 0; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13.5px; }}
th, td {{ padding: 5px 9px; text-align: left; vertical-align: bottom; border-bottom: 1px solid #e4e4e4; }}
td {{ min-width: 100px; overflow-wrap: anywhere; vertical-align: baseline; }}
td.number {{ min-width: 0; white-space: nowrap; }}
th {{ border-bottom: 2px solid #999; font-weight: 600; max-width: 125px; }}
tbody tr:hover {{ background: #f6f8fa; }}
.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
.best {{ font-weight: 700; background: #e3f4e3; }}
.caption, figcaption {{ color: #555; font-size: 13.5px; margin: 6px 0 0; max-width: 900px; }}
.figures {{ display: grid; grid-template-columns: minmax(0, 1fr); gap: 28px 32px; }}
@media (min-width: 960px) {{ .figures {{ grid-template-columns: repeat(2, minmax(0, 1fr)); }} }}
figure {{ margin: 0; min-width: 0; }}
.wide {{ grid-column: 1 / -1; }}
summary {{ cursor: pointer; font-weight: 600; padding: 4px 0; }}
.contexts {{ width: 100%; table-layout: fixed; font-size: 14px; }}
.contexts td {{ white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; padding: 2px 0; border: 0; }}
.contexts .value {{ width: 56px; color: #777; text-align: right; font-variant-numeric: tabular-nums; }}
.contexts .before {{ width: 44%; text-align: right; padding-left: 16px; }}
.latent {{ margin: 10px 0 14px 12px; }}
.latent b {{ font-size: 14px; }}
.latent small {{ color: #666; font-size: 13px; margin-left: 8px; }}
mark {{ background: #ffe08a; border-radius: 3px; padding: 1px 0; }}
"""


def page(
    title: str,
    facts: dict[str, str],
    notes: Sequence[str],
    means: Sequence[Table],
    singles: Sequence[Table],
    figures: Sequence[Figure],
    saes: Sequence[SAEResults],
) -> str:
    """The whole page; plotly.js is in it once if there are figures."""
    facts_html = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    notes_html = "".join(f"<li>{escape(note)}</li>" for note in notes)
    parts = [
        f"<h1>{escape(title)}</h1>\n<dl>{facts_html}</dl>",
        f'<ul class="notes">{notes_html}</ul>' if notes else "",
        _section("Means over seeds", *(html_table(table, True) for table in means), hint=MARK_HINT),
        _section("Figures", _figures(figures)) if figures else "",
        _section("Single SAEs", *(html_table(table, False) for table in singles)),
        _contexts(saes),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def _section(title: str, *parts: str, hint: str = "") -> str:
    hint = f'<p class="caption">{escape(hint)}</p>\n' if hint else ""
    return f"<h2>{escape(title)}</h2>\n{hint}" + "\n".join(parts)


def _figures(figures: Sequence[Figure]) -> str:
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    parts = []
    for i, figure in enumerate(figures):
        plot = figure.plot.to_html(
            full_html=False, include_plotlyjs=i == 0, include_mathjax=False, div_id=f"plot-{figure.key}", config=config
        )
        wide = ' class="wide"' if figure.is_wide else ""
        parts.append(
            f'<figure id="{figure.key}"{wide}>\n<h3>{escape(figure.title)}</h3>\n{plot}\n'
            f"<figcaption>{escape(figure.caption)}</figcaption>\n</figure>"
        )
    return '<div class="figures">\n' + "\n".join(parts) + "\n</div>"


def _contexts(saes: Sequence[SAEResults]) -> str:
    """Leading latents of every SAE that has them; the first SAE's are unfolded."""
    parts = []
    for sae in saes:
        latents = sae.get(*OURS, "top_contexts")
        if latents:
            opened = " open" if not parts else ""
            inner = "\n".join(map(_latent, latents))
            parts.append(f"<details{opened}><summary>{escape(sae.label)}</summary>\n{inner}\n</details>")
    return _section("What leading latents fire on", *parts, hint=CONTEXTS_HINT) if parts else ""


def _latent(latent: dict[str, Any]) -> str:
    lines = "\n".join(
        f'<tr><td class="value">{context["activation"]:.1f}</td><td class="before">{_text(context["before"])}</td>'
        f"<td><mark>{_text(context['token'], alone=True)}</mark>{_text(context['after'])}</td></tr>"
        for context in latent["contexts"]
    )
    return (
        f'<div class="latent"><b>Latent {latent["latent"]}</b><small>active on {latent["density"]:.1%} of tokens, '
        f"{latent['mass_share']:.1%} of the activation</small>\n"
        f'<table class="contexts">\n{lines}\n</table></div>'
    )


def _text(text: str, alone: bool = False) -> str:
    """Escaped, on one line; with `alone`, a text of nothing but spaces is made visible."""
    if alone and not text.strip(" "):
        text = "␣" * len(text)
    for space, shown in (("\r\n", "⏎"), ("\n", "⏎"), ("\r", "⏎"), ("\t", "⇥")):
        text = text.replace(space, shown)
    return escape(text)
