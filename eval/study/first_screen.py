"""The README's picture: the time of a training step, and what a pool costs in reconstruction."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from study.curves import draw_metric, summaries_of_curve

PICTURE = Path("results") / "first_screen.png"
"""Path in `eval/`."""
SIDES = {
    "SAELens BatchTopK": ("SAELens BatchTopK", "k", "s"),
    "all latents": ("ours: BatchTopK's selection", "#009e73", "^"),
    "groups of 16, factor 10": ("ours: pool 10, groups of 16", "#d55e00", "o"),
    "one pool, factor 5": ("ours: pool 5, one pool (the paper's)", "#0072b2", "o"),
}
"""Label, colour and mark of the sides of the benchmark of training steps; colours as in the other panel."""


def draw_first_screen(eval_folder: Path, file: Path) -> None:
    """Draw both panels from the committed results."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw_step_times(left, eval_folder / "results" / "bench_training_step.json")
    draw_metric(right, summaries_of_curve(eval_folder), ("batchtopk", "pool_10_groups_16", "pool_5"), "fvu")
    right.set_title("SmolLM2-135M, block 10: exported SAEs", fontsize=10)
    right.legend(fontsize=9, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_step_times(axes: Axes, benchmark: Path) -> None:
    """Median time of a training step against d_sae, both axes logarithmic."""
    rows = json.loads(benchmark.read_text())["sections"]["d_sae"]
    widths, case = [row["case"]["d_sae"] for row in rows], rows[0]["case"]
    for side, (label, colour, mark) in SIDES.items():
        axes.plot(widths, [row["step_ms"][side] for row in rows], color=colour, marker=mark, ms=5, lw=1.2, label=label)
    axes.set(xscale="log", yscale="log", xlabel="d_sae", ylabel="training step, ms (lower is better)")
    axes.set_xticks(widths, [f"{width // 1024}k" for width in widths])
    axes.minorticks_off()
    axes.set_title(f"2 CPU cores, d_in {case['d_in']}, k {case['k']}, {case['tokens']:,} tokens per step", fontsize=10)
    axes.legend(fontsize=9, frameon=False)
