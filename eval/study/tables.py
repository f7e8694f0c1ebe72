"""The tables of the result page, as Markdown; all numbers are means over seeds with their standard errors."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from pages import markdown_table
from sae_lens_sampled.saebench.report.metrics import Estimate, estimate
from study import plan
from study.plan import GROUPED, pool_name, score_name
from study.summary import Summary, shown

ON_MODEL = {
    "FVU": "fvu",
    "FVU in training": "fvu_in_training",
    "L0": "l0",
    "loss recovered": "loss_recovered",
    "dead": "dead",
    "starved": "starved_share",
}
DOWNSTREAM = {
    "FVU": "fvu",
    "probing, top 1": "probing_1",
    "top 2": "probing_2",
    "top 5": "probing_5",
    "absorption, fraction": "absorption_fraction",
    "full": "absorption_full",
}
SYNTHETIC = {
    "FVU": "fvu",
    "FVU in training": "fvu_in_training",
    "L0": "l0",
    "MCC": "mcc",
    "F1": "f1",
    "uniqueness": "uniqueness",
    "dead": "dead",
}
DECISION = {
    "FVU": "fvu",
    "loss recovered": "loss_recovered",
    "probing, top 1": "probing_1",
    "top 5": "probing_5",
    "dead": "dead",
}
SMALLER_IS_BETTER = ("fvu", "dead")
BETTER, WORSE = "▲", "▼"
SIDES = {
    "batchtopk": "SAELens BatchTopK",
    "topk": "SAELens TopK",
    "matryoshka": "SAELens Matryoshka",
    "pool_5": "one pool, factor 5",
    "pool_5_groups_16": "groups of 16, factor 5",
    "pool_10_groups_16": "groups of 16, factor 10",
    "pool_20_groups_16": "groups of 16, factor 20",
    "nested_10": "nested groups of 16, factor 10",
    "nested_20": "nested groups of 16, factor 20",
}
"""Names of the arms in the benchmark of training steps."""
VARIANTS = {
    "as trained": "per_latent",
    "global": "global",
    "per latent, equal L0": "per_latent_at_equal_l0",
    "global, equal L0": "global_at_equal_l0",
}


def baselines() -> list[str]:
    return ["batchtopk", "topk", "matryoshka"]


def nested_arms() -> list[str]:
    return ["batchtopk", pool_name(10, GROUPED), "matryoshka", *plan.NESTED, plan.THEN_PLAIN]


def compared_arms(summary: Summary) -> list[str]:
    return [*baselines(), *controls(), *sweep(summary)]


def controls() -> list[str]:
    return [plan.narrow_name(factor) for factor in plan.NARROW]


def sweep(summary: Summary) -> list[str]:
    return [arm.name for arm in plan.sweep(summary.study)]


def order_arms(summary: Summary) -> list[str]:
    return [
        "batchtopk",
        "consecutive_batchtopk",
        pool_name(summary.study.fixed_pool_factor, GROUPED),
        "consecutive_groups",
    ]


def score_arms(summary: Summary) -> list[str]:
    """BatchTopK, and every score with one pool and with groups."""
    study = summary.study
    names = ["batchtopk"]
    for size in (None, GROUPED):
        names += [pool_name(study.fixed_pool_factor, size), *(score_name(score, size) for score in study.scores)]
    return planned(summary, names)


def planned(summary: Summary, names: Iterable[str]) -> list[str]:
    """Those that are arms of the study."""
    return [name for name in names if name in summary.arms]


def synthetic_arms(summary: Summary) -> list[str]:
    return [name for name in summary.arms if name in summary.on_synthetic]


def metric_table(summary: Summary, arms: Iterable[str], columns: dict[str, str], synthetic: bool = False) -> str:
    """Metrics, a row for each arm that the study has."""
    rows = [
        [summary.label(arm), *(shown(summary.mean(arm, metric, synthetic), metric) for metric in columns.values())]
        for arm in planned(summary, arms)
    ]
    return markdown_table(["", *columns], rows)


def decision_table(summary: Summary, step_seconds: dict[str, float]) -> str:
    """What to choose by, a row for each arm: metrics with marks for what differs from BatchTopK, seed agreement, time.

    Args:
        summary: of the study.
        step_seconds: seconds of training steps for a million tokens, by arm.
    """
    rows = []
    for arm in summary.arms:
        mmcs, base = (summary.similarity(name, name, "forward", "mmcs") for name in (arm, "batchtopk"))
        seconds = step_seconds.get(arm)
        rows.append(
            [
                summary.label(arm),
                *(
                    shown(summary.mean(arm, metric), metric)
                    + mark(summary.difference(arm, "batchtopk", metric), metric in SMALLER_IS_BETTER)
                    for metric in DECISION.values()
                ),
                shown(mmcs) + mark(difference_of(mmcs, base)),
                shown(summary.mean(arm, "absorption_fraction")),
                "-" if seconds is None else f"{seconds:.0f} s",
            ]
        )
    return markdown_table(["", *DECISION, "MMCS", "absorption", "time for 1M tokens"], rows)


def mark(difference: Estimate | None, smaller_is_better: bool = False) -> str:
    """Whether a difference is more than two of its standard errors, and which way."""
    if difference is None or difference.error is None or abs(difference.mean) <= 2 * difference.error:
        return ""
    return f" {BETTER if (difference.mean < 0) == smaller_is_better else WORSE}"


def difference_of(a: Estimate | None, b: Estimate | None) -> Estimate | None:
    """Difference of two means that have no SAEs in common."""
    if a is None or b is None or a is b or a.error is None or b.error is None:
        return None
    return Estimate(a.mean - b.mean, math.hypot(a.error, b.error), min(a.n, b.n))


def step_seconds(benchmark: Path) -> dict[str, float]:
    """Seconds of training steps for a million tokens at the size of the study on SmolLM2, by arm."""
    rows = json.loads(benchmark.read_text())["sections"]["smollm2"]
    by_side = {side: ms / row["case"]["tokens"] * 1000 for row in reversed(rows) for side, ms in row["step_ms"].items()}
    seconds = {arm: by_side[side] for arm, side in SIDES.items()}
    return seconds | {plan.THEN_PLAIN: (seconds["nested_10"] + seconds["pool_10_groups_16"]) / 2}


def probing_table(summary: Summary) -> str:
    """Accuracy of probes on one latent, for each labelled set."""
    arms = [arm for arm in compared_arms(summary) + nested_arms()[3:] if arm in summary.on_model]
    results = {arm: list(summary.on_model[arm].values()) for arm in arms}
    sets = list(next(iter(results.values()))[0]["metrics"].get("probing_sets", {})) if results else []
    rows = [
        [
            summary.label(arm),
            *(shown(estimate([r["metrics"]["probing_sets"][name][0] for r in of_arm])) for name in sets),
        ]
        for arm, of_arm in results.items()
    ]
    return markdown_table(["", *(name.removesuffix("_results").replace("_", " ") for name in sets)], rows)


def threshold_table(summary: Summary) -> str:
    """L0 and FVU on unseen text of exports that differ in the thresholds alone."""
    header = ["", *(f"{name}: {metric}" for name in VARIANTS for metric in ("L0", "FVU"))]
    rows = [
        [
            summary.label(arm),
            *(
                shown(summary.mean(arm, f"{variant}.{metric}"), metric)
                for variant in VARIANTS.values()
                for metric in ("l0", "fvu")
            ),
        ]
        for arm in sweep(summary)
    ]
    return markdown_table(header, rows)


def global_arms(summary: Summary) -> list[str]:
    """Every SAE that was also exported with a global threshold, and that export."""
    derived = [arm for arm in summary.arms.values() if arm.exported_from is not None]
    return [name for arm in derived for name in (str(arm.exported_from), arm.name)]


def stability_table(summary: Summary) -> str:
    """What the seeds of an arm have in common, a row for each arm; means over pairs of seeds."""
    columns = {
        "MMCS": ("forward", "mmcs"),
        "back": ("backward", "mmcs"),
        "random directions": ("forward", "baseline"),
        "of all latents": ("forward", "mmcs_of_all"),
        "matched": ("matched",),
        "share above 0.7": ("forward", "share_above_0_7"),
        "overlap of pools": ("pool_overlap",),
    }
    names = [a for a, b in summary.comparisons if a == b]
    rows = [
        [
            summary.label(name),
            live(summary, name),
            *(shown(summary.similarity(name, name, *path)) for path in columns.values()),
        ]
        for name in names
    ]
    return markdown_table(["", "live latents", *columns], rows)


def live(summary: Summary, arm: str) -> str:
    """Mean number of the arm's live latents."""
    pairs = summary.comparisons[arm, arm]["pairs"]
    counts = [n for pair in pairs for n in pair["n_live"]]
    return f"{sum(counts) / len(counts):.0f}" if counts else "-"


def partner_table(summary: Summary) -> str:
    """Share of the live latents of the row's arm with a partner above 0.7 in another seed of the column's arm."""
    names = score_arms(summary)
    rows = [
        [
            f"{i}. {summary.label(a)}",
            *(shown(summary.similarity(a, b, "forward", "share_above_0_7"), "share_above_0_7") for b in names),
        ]
        for i, a in enumerate(names, start=1)
    ]
    return markdown_table(["", *(f"{i}" for i in range(1, len(names) + 1))], rows)


def context_list(summary: Summary, a: str, b: str, n_contexts: int = 2) -> str:
    """Latents of `b` without a partner in another seed of `a`, with the text where they are largest."""
    comparison = summary.comparisons.get((a, b), {"unmatched": []})
    return "\n".join(
        f"- latent {latent['latent']}, on {latent['density']:.1%} of tokens: "
        + " / ".join(f"`{_one_line(context)}`" for context in latent["contexts"][:n_contexts])
        for latent in comparison["unmatched"]
    )


def _one_line(context: dict[str, str], n_before: int = 40, n_after: int = 20) -> str:
    """Text with the token in brackets; a line break is a return sign."""
    text = f"{context['before'][-n_before:]}[{context['token']}]{context['after'][:n_after]}"
    return " ".join(text.replace("\n", "⏎").replace("`", "'").split())
