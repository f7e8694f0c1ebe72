"""Renders eval/SPEED.md and its picture from the results of the benchmarks; no number in the page is typed.

Run it after `bench_training_step.py` and `bench_end_to_end.py`: `python eval/speed.py`.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from pages import markdown_table
from pages import render as render_page
from sae_lens_sampled import kept_entries

EVAL = Path(__file__).parent
BASE = "SAELens BatchTopK"
Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """Markdown: a line for each side of each row, times beside SAELens' BatchTopK of the same row."""
    lines = []
    for row in rows:
        case, base = row["case"], row["step_ms"][BASE]
        state = "after 200 steps" if case["trained"] else "at initialisation"
        for side, milliseconds in row["step_ms"].items():
            scan, memory = row["scans"].get(side, {}), row.get("memory_mib", {}).get(side)
            lines.append(
                {
                    "": state,
                    "dead": f"{case['dead']:.0%}",
                    "side": side,
                    "step": f"{milliseconds:,.0f} ms",
                    "BatchTopK over it": f"{base / milliseconds:.1f}x",
                    "memory": "" if memory is None else f"{memory:,.0f} MiB",
                    "extracted per kept": f"{scan['extracted_per_kept']:.1f}" if scan.get("path") == "kept" else "",
                }
            )
    return markdown_table(list(lines[0]), [list(line.values()) for line in lines])


def crossing_table(rows: list[Row], what: str) -> str:
    """Markdown: the ways of doing a step beside each other, over what is varied."""
    lines = []
    for row in rows:
        ways = {side.rstrip(")").rpartition("(")[2]: ms for side, ms in row["step_ms"].items() if side != "product"}
        factor = next(iter(row["step_ms"])).partition(", factor ")[2].partition(" ")[0]
        lines.append({what: factor or row["case"][what], **{way: f"{ms:.1f} ms" for way, ms in ways.items()}})
    return markdown_table(list(lines[0]), [list(line.values()) for line in lines])


def draw(rows: list[Row], file: Path) -> None:
    """Time of a step against d_sae, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    widths = [row["case"]["d_sae"] for row in rows]
    for side in rows[0]["step_ms"]:
        style = {"color": "0.6", "linestyle": "--"} if side == "product" else {"marker": "o"}
        label = "bare encoder product" if side == "product" else side
        axes.plot(widths, [row["step_ms"][side] for row in rows], label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="d_sae", ylabel="training step, ms")
    axes.set_xticks(widths, [f"{width // 1024}k" for width in widths])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def runs_table(results: dict[str, Any]) -> str:
    """Markdown: whole runs, beside SAELens' BatchTopK with SAELens' store."""
    [base] = [run["tokens_per_second"] for run in results["runs"] if (run["side"], run["source"]) == (BASE, "store")]
    lines = [
        [
            run["side"],
            run["source"],
            f"{run['tokens_per_second']:,.0f}",
            f"{run['tokens_per_second'] / base:.1f}x",
            *(f"{run[share]:.0%}" for share in ("sae_share", "model_share")),
        ]
        for run in results["runs"]
    ]
    header = ["side", "activations from", "tokens/s", "over BatchTopK", "SAE's share", "model's share"]
    return markdown_table(header, lines)


def render(steps: dict[str, Any], runs: dict[str, dict[str, Any]]) -> str:
    """The page, from the JSON of `bench_training_step.py` and, by model, of `bench_end_to_end.py`."""

    def times(section: str, side: str, dead: float = 0.0, trained: bool = True) -> str:
        """BatchTopK's time over that of a side."""
        [row] = [
            row
            for row in steps["sections"][section]
            if row["case"]["dead"] == dead and row["case"]["trained"] == trained
        ]
        return f"{row['step_ms'][BASE] / row['step_ms'][side]:.1f}"

    return render_page(
        EVAL / "templates" / "SPEED.md",
        steps=steps,
        runs=runs,
        sections=steps["sections"],
        table=table,
        crossing_table=crossing_table,
        runs_table=runs_table,
        times=times,
        limits=kept_entries,
    )


def main() -> None:
    steps = read("bench_training_step")
    runs = {"bundled": read("bench_end_to_end"), "smollm2": read("bench_end_to_end_smollm2")}
    (EVAL / "SPEED.md").write_text(render(steps, runs))
    draw(steps["sections"]["d_sae"], EVAL / "results" / "bench_training_step.png")


def read(name: str) -> dict[str, Any]:
    return json.loads((EVAL / "results" / f"{name}.json").read_text())


if __name__ == "__main__":
    main()
