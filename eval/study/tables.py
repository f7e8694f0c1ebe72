"""The tables of the result page, as Markdown; numbers are means over seeds ± half of their 95 % intervals."""

import math
import statistics
from collections.abc import Iterable

from pages import markdown_table
from sae_lens_sampled.confidence import mean_interval
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
    "recall with a child": "recall_with_child",
    "absorbed": "absorbed",
}
ABSORPTION = {
    "full": "absorption_full",
    "fraction": "absorption_fraction",
    "splits": "absorption_n_splits",
    "recall": "absorption_recall_best_latent",
}
"""Means over letters."""
LETTERS = {
    "Full absorption": "full",
    "Absorption fraction": "fraction",
    "Splits": "n_splits",
    "Recall of the probe": "recall_probe",
    "Recall of the best latent": "recall_best_latent",
}
"""Fields of one letter."""
FIRING = {"live": (-math.inf, 0.0), "often": (-1.0, 0.0), "rarely": (-math.inf, -3.0)}
"""From and to which log10 of the share of tokens latents are counted, as edges of the histogram."""
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
    """Baselines, controls and pool factors, then all arms that are in none of the other tables."""
    derived = [arm.name for arm in summary.arms.values() if arm.exported_from is not None]
    elsewhere = {*nested_arms(), *order_arms(summary), *score_arms(summary), *derived}
    first = [*baselines(), *controls(), *sweep(summary)]
    return list(dict.fromkeys([*first, *(arm for arm in summary.arms if arm not in elsewhere)]))


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
    """Those names that are arms of the study."""
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


def firing_table(summary: Summary, arms: Iterable[str] | None = None) -> str:
    """How equally the latents of the arms (None: of every arm) fire."""
    header = ["", "Gini", "dead", "live latents", "on more than 10 % of tokens", "on less than 0.1 %"]
    rows = [
        [summary.label(arm)]
        + [summary.number(arm, metric) for metric in ("gini", "dead")]
        + [firing(summary, arm, which) for which in FIRING]
        for arm in (summary.on_model if arms is None else arms)
        if arm in summary.on_model
    ]
    return markdown_table(header, rows)


def firing(summary: Summary, arm: str, which: str) -> str:
    """Mean number of an arm's latents that fire as often as one of `FIRING` says."""
    low, high = FIRING[which]
    counts = [
        sum(n for n, edge in zip(result["density_counts"], result["density_edges"], strict=False) if low <= edge < high)
        for result in summary.on_model[arm].values()
    ]
    return f"{statistics.fmean(counts):,.0f}"


def absorption_table(summary: Summary, *others: Summary) -> str:
    """Absorption by SAEBench, a row for each arm of each study; `max_k_value` is the most latents for one letter."""
    rows = [
        [summary_of.label(arm), str(summary_of.study.absorption["max_k_value"]), str(len(summary_of.absorption[arm]))]
        + [shown(summary_of.mean(arm, metric), metric) for metric in ABSORPTION.values()]
        for summary_of in (summary, *others)
        for arm in summary_of.absorption
    ]
    return markdown_table(["", "`max_k_value`", "SAEs", *ABSORPTION], rows)


def letter_table(summary: Summary, field: str) -> str:
    """One field of absorption by letter, means over the SAEs of each arm in which the letter has a result."""
    found = {
        arm: [result["metrics"]["absorption_by_letter"] for result in by_seed.values()]
        for arm, by_seed in summary.absorption.items()
    }
    letters = sorted({letter for of_arm in found.values() for of_sae in of_arm for letter in of_sae})
    rows = [
        [
            letter,
            *(
                shown_mean([of_sae[letter][field] for of_sae in of_arm if letter in of_sae])
                for of_arm in found.values()
            ),
        ]
        for letter in letters
    ]
    return markdown_table(["", *(summary.label(arm) for arm in found)], rows)


def shown_mean(values: list[float]) -> str:
    """A mean without an interval; "-" of nothing."""
    return f"{statistics.fmean(values):.2f}" if values else "-"


def probing_table(summary: Summary) -> str:
    """Accuracy of probes on one latent, for each labelled set."""
    arms = [arm for arm in compared_arms(summary) + nested_arms()[3:] if arm in summary.on_model]
    results = {arm: list(summary.on_model[arm].values()) for arm in arms}
    sets = list(next(iter(results.values()))[0]["metrics"].get("probing_sets", {})) if results else []
    rows = [
        [
            summary.label(arm),
            *(shown(mean_interval([r["metrics"]["probing_sets"][name][0] for r in of_arm])) for name in sets),
        ]
        for arm, of_arm in results.items()
    ]
    return markdown_table(["", *(name.removesuffix("_results").replace("_", " ") for name in sets)], rows)


def threshold_table(summary: Summary) -> str:
    """L0 and FVU of exports that differ in the thresholds alone, on unseen text."""
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
    """Similarity of the dictionaries of an arm's seeds, a row for each arm; means over pairs of seeds."""
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
