"""Renders eval/SPEED.md, all tables and the picture from the benchmarks' results; no measured number is typed.

Run it after `training_step.py`, `kept_sets.py`, `allocator.py`, `data_parallel.py`, `end_to_end.py` (also with `--model
smollm2`) and `eval/gpu.sh`: `python eval/bench/speed.py`. Results on a GPU may be missing, and are then reported as not
measured or left out; all other results are needed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # instead of this script's folder, so that the packages in eval can be imported

from bench.cases import BATCHTOPK, NOT_ALIKE, OTHER_PACKAGES, Setting, libraries, plan
from pages import markdown_table
from pages import render as render_page
from sae_lens_sampled.step import kept_entries, reduced_scan

RESULTS = EVAL / "results"
TEMPLATES = {"SPEED.md": "SPEED.md", "results/speed.md": "speed_tables.md"}
BASE = BATCHTOPK.name
Row = dict[str, Any]
WIDE = {"d_in": 4096, "d_sae": 131_072, "k": 64, "gpus": 8}
"""A size that is trained on several GPUs."""
BANDWIDTHS = {"NVLink": 460e9, "RoCE": 35e9}
"""Published bandwidth of an all-reduce, in bytes per second, between GPUs of one machine and of several."""
HISTOGRAM_BYTES = 4 * (2048 + 2048 + 512)
"""Bytes of the histograms that are exchanged to find the cutoff, at any size."""


def table(rows: list[Row]) -> str:
    """Markdown table: a line for each case of each row, with the time of the row's SAELens BatchTopK over its own."""
    lines = []
    for row in rows:
        for side in row["step_ms"]:
            scan = row["scans"].get(side, {})
            extracted = f"{scan['extracted_per_kept']:.1f}" if scan.get("path") == "kept" else ""
            state = {"": state_of(row["case"]), "dead": f"{row['case']['dead']:.0%}", "side": side}
            lines.append(state | costs(row, side) | {"extracted per kept": extracted})
    return markdown_table(list(lines[0]), [list(line.values()) for line in lines])


def summary_table(rows: list[Row]) -> str:
    """Markdown table: speedup over BatchTopK after training, a line per pool, a column per share of dead latents."""
    trained = [row for row in rows if row["case"]["trained"]]
    sides = [side for side in trained[0]["step_ms"] if all(side in row["step_ms"] for row in trained)]
    header = [f"{row['case']['dead']:.0%} of the latents dead" for row in trained]
    base = [BASE, *(f"{row['step_ms'][BASE]:,.0f} ms" for row in trained)]
    ratios = [
        [side, *(f"{row['step_ms'][BASE] / row['step_ms'][side]:.1f}x" for row in trained)]
        for side in sides
        if side not in (BASE, "product")
    ]
    return markdown_table(["", *header], [base, *ratios])


def state_of(setting: Setting) -> str:
    """The state in which steps are measured, as text; for steps on a GPU it includes the precision."""
    state = "after 200 steps" if setting["trained"] else "at initialisation"
    if "tf32" not in setting:
        return state
    return f"{'autocast' if setting['autocast'] else 'TF32' if setting['tf32'] else 'float32'}, {state}"


def costs(row: Row, side: str) -> dict[str, str]:
    """Texts by column: a case's time, BatchTopK's time over it, and its memory."""
    milliseconds, base = row["step_ms"][side], row["step_ms"].get(BASE)
    memory = row.get("memory_mib", {}).get(side)
    return {
        "step": f"{milliseconds:,.{0 if milliseconds >= 10 else 2}f} ms",
        "BatchTopK over it": "" if base is None else f"{base / milliseconds:.1f}x",
        "memory": "" if memory is None else f"{memory:,.0f} MiB",
    }


def libraries_table(rows: list[Row]) -> str:
    """Markdown table: a step in each library, and how it differs."""
    lines = []
    for row in rows:
        size = f"{row['case']['d_in']} / {row['case']['d_sae']:,} / {row['case']['k']}"
        for case in libraries(row["case"]["d_sae"], row["case"]["dead"]):
            if case.name in row["step_ms"]:
                state = {"d_in / d_sae / k": size, "dead": f"{row['case']['dead']:.0%}", "step of": case.name}
                lines.append(state | costs(row, case.name) | {"differences": NOT_ALIKE[case.name]})
    return markdown_table(list(lines[0]), [list(line.values()) for line in lines])


def gpu_sections(gpu: dict[str, Any]) -> dict[str, list[Row]]:
    """Measured rows by section; sections without any are left out."""
    sections = {name: [row for row in rows if row.get("step_ms")] for name, rows in gpu.get("sections", {}).items()}
    return {name: rows for name, rows in sections.items() if rows}


def failures(gpu: dict[str, Any], section: str) -> list[str]:
    """A sentence about each failed case of a section."""
    return [
        f"{side}, {state_of(row['case'])}, {row['case']['dead']:.0%} dead, was not measured: {reason}"
        for row in gpu["sections"][section]
        for side, reason in row["failed"].items()
    ]


def repeats_table(repeats: dict[str, dict[str, bool | str]]) -> str:
    """Markdown table: whether steps are bitwise reproducible."""
    sides = list(next(iter(repeats.values())))
    answers = {True: "yes", False: "no"}
    lines = [[name, *(answers.get(of[side], of[side]) for side in sides)] for name, of in repeats.items()]
    return markdown_table(["", *sides], lines)


def profile_table(profile: dict[str, Any], n: int = 8) -> str:
    """Markdown table: the kernels that take most of a step."""
    share = [f"{kernel['ms'] / profile['kernels_ms']:.0%}" for kernel in profile["kernels"]]
    lines = [
        [f"`{kernel['kernel'][:70]}`", f"{kernel['calls']}", f"{kernel['ms']:.2f} ms", of_all]
        for kernel, of_all in zip(profile["kernels"][:n], share, strict=False)
    ]
    return markdown_table(["kernel", "calls", "time", "share"], lines)


def crossing_table(sections: dict[str, list[Row]], section: str, what: str) -> str:
    """Markdown table: times of the ways to compute a step, against the varied size or pool factor."""
    lines = []
    for row, (setting, cases) in zip(sections[section], plan("cpu")[section], strict=True):
        varied = setting.get(what, cases[0].fields["pool_factor"])
        lines.append({what: varied, **{case.way: f"{row['step_ms'][case.name]:.1f} ms" for case in cases}})
    return markdown_table(list(lines[0]), [list(line.values()) for line in lines])


def draw(rows: list[Row], file: Path) -> None:
    """Plot the time of a step against d_sae, on logarithmic axes."""
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
    """Markdown table: whole runs, relative to SAELens' BatchTopK with SAELens' store."""
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


def run_gain(results: dict[str, Any], source: str) -> str:
    """Speedup of a whole run with a pool of all latents over one with SAELens' BatchTopK."""
    speed = {run["side"]: run["tokens_per_second"] for run in results["runs"] if run["source"] == source}
    return f"{speed['all latents'] / speed[BASE]:.1f}"


def ranks_table(results: dict[str, Any]) -> str:
    """Markdown table: what several processes exchange, and how far they are from a single one."""
    lines = [
        [
            row["case"],
            f"{row['processes']}",
            "yes" if row["ranks_equal"] else "no",
            f"{row['other_selections']:,} of {row['selections']:,}",
            f"{row['largest_difference']:.0e}",
            f"{row['gradient_bytes'] / 1e6:,.2f} MB",
            f"{row['other_bytes'] / 1e6:,.2f} MB",
            f"{row['one_over_it']:.2f}x" if "one_over_it" in row else "",
        ]
        for row in results["rows"]
    ]
    header = [
        "",
        "processes",
        "ranks bit-equal",
        "other entries kept",
        "largest difference",
        "gradients",
        "rest",
        "time",
    ]
    return markdown_table(header, lines)


def active_latents(fields: dict[str, Any], d_sae: int, k: int) -> int:
    """Largest number of latents whose gradients are exchanged: pool and dead latents, or all with groups."""
    if "pool_group_size" in fields:
        return d_sae
    return min(int(fields["pool_factor"] * k + fields.get("dead", 0) * d_sae), d_sae)


def gradient_bytes(n_latents: int, d_in: int) -> int:
    """Bytes of the float32 gradients of `n_latents` latents and of the decoder bias."""
    return 4 * (n_latents * (2 * d_in + 1) + d_in)


def groups_share(results: dict[str, Any]) -> float:
    """Bytes of gradients that a pool per group exchanged, as counted, over those of all latents' gradients."""
    counted, *_ = [row["gradient_bytes"] for row in results["rows"] if "pool_group_size" in row["fields"]]
    return counted / gradient_bytes(results["size"]["d_sae"], results["size"]["d_in"])


def arithmetic_table(results: dict[str, Any]) -> str:
    """Markdown table: bytes exchanged per step at `WIDE`, and the time they would take."""
    lines = []
    for row in results["rows"]:
        if row["processes"] != 2:
            continue
        all_latents = row["fields"]["pool_factor"] * results["size"]["k"] >= results["size"]["d_sae"]
        n_latents = WIDE["d_sae"] if all_latents else active_latents(row["fields"], WIDE["d_sae"], WIDE["k"])
        gradients = gradient_bytes(n_latents, WIDE["d_in"])
        rest = HISTOGRAM_BYTES + (row["other_bytes"] - HISTOGRAM_BYTES) // results["size"]["d_sae"] * WIDE["d_sae"]
        on_the_wire = (gradients + rest) * 2 * (WIDE["gpus"] - 1) / WIDE["gpus"]  # ring all-reduce
        times = [f"{1e3 * on_the_wire / bandwidth:.1f} ms" for bandwidth in BANDWIDTHS.values()]
        lines.append([row["case"], f"{gradients / 1e6:,.1f} MB", f"{rest / 1e6:,.1f} MB", *times])
    return markdown_table(["", "gradients", "rest", *BANDWIDTHS], lines)


def render(
    steps: dict[str, Any], runs: dict[str, dict[str, Any]], ranks: dict[str, Any], gpu: dict[str, Any] | None
) -> dict[str, str]:
    """Page texts by file, from the benchmarks' results; `runs` are by model, with those on a GPU, if any, as "gpu"."""
    kept_sets, allocator = read("kept_sets"), read("bench_allocator")

    def allocator_ratio(side: str) -> str:
        """A step's time without glibc's variables over its time with them."""
        return f"{allocator['step_ms']['default'][side] / allocator['step_ms']['kept'][side]:.2f}"

    def autocast_ratio(side: str) -> str:
        """A step's time in float32 over its time under autocast."""
        return (
            f"{steps['sections']['small'][0]['step_ms'][side] / steps['sections']['autocast'][0]['step_ms'][side]:.2f}"
        )

    values = {
        "steps": steps,
        "runs": runs,
        "ranks": ranks,
        "gpu": gpu,
        "kept_sets": kept_sets,
        "allocator": allocator,
        "allocator_ratio": allocator_ratio,
        "autocast_ratio": autocast_ratio,
        "optional_packages": OTHER_PACKAGES,
        "libraries_table": libraries_table,
        "gpu_sections": gpu_sections,
        "failures": failures,
        "state_of": state_of,
        "repeats_table": repeats_table,
        "profile_table": profile_table,
        "ranks_table": ranks_table,
        "arithmetic_table": arithmetic_table,
        "groups_share": groups_share,
        "wide": WIDE,
        "bandwidths": BANDWIDTHS,
        "sections": steps["sections"],
        "table": table,
        "summary_table": summary_table,
        "crossing_table": crossing_table,
        "runs_table": runs_table,
        "run_gain": run_gain,
        "limits": kept_entries,
        "reduced": reduced_scan,
    }
    folder = Path(__file__).parent / "templates"
    return {page: render_page(folder / template, **values) for page, template in TEMPLATES.items()}


def pages() -> dict[str, str]:
    """Page texts from the committed results, by file."""
    runs = {"bundled": read("bench_end_to_end"), "smollm2": read("bench_end_to_end_smollm2")}
    gpu = None
    if (RESULTS / "bench_gpu.json").exists():
        gpu = read("bench_gpu")
    if (RESULTS / "bench_end_to_end_gpu.json").exists():
        runs["gpu"] = read("bench_end_to_end_gpu")
    return render(read("bench_training_step"), runs, read("bench_data_parallel"), gpu)


def main() -> None:
    for page, text in pages().items():
        (EVAL / page).write_text(text)
    draw(read("bench_training_step")["sections"]["d_sae"], RESULTS / "bench_training_step.png")


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


if __name__ == "__main__":
    main()
