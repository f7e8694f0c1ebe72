"""The recommendation rule, on results with a known verdict."""

import re
from dataclasses import replace

import pytest

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from scipy import stats
from study_helpers import SMOKE, storage

from sae_lens_sampled.confidence import Interval
from study import decision
from study.curves import order_table
from study.summary import Summary
from study.tables import firing_table

N = 5
NOISE = (0.0, 0.001, -0.001, 0.002, -0.002)
GOOD = {"fvu": 0.200, "dead": 0.050, "absorption_full": 0.200, "probing_1": 0.800, "mmcs": 0.500}


WORSE = {"fvu": 0.1, "dead": 0.5, "absorption_full": 0.5, "probing_1": -0.1, "mmcs": -0.1}
"""Changes of the settings that a test does not name: worse in everything."""


def summary_of(folder, **changes):
    """A study with five seeds; `changes` gives, by arm, the differences of its metrics from BatchTopK's."""
    study = storage(folder, replace(SMOKE, n_seeds=N, n_stability_seeds=N))
    for arm, change in {"batchtopk": {}, **dict.fromkeys(decision.CANDIDATES, WORSE), **changes}.items():
        values = {name: value + change.get(name, 0) for name, value in GOOD.items()}
        mmcs = values.pop("mmcs")
        for seed in range(N):
            # Each arm has its own noise, so differences vary.
            noise = NOISE[(seed + len(arm)) % N]
            metrics = {name: value + noise * (0.2 if name == "fvu" else 1) for name, value in values.items()}
            tasks = {f"{task}_split0_results": [metrics["probing_1"] + NOISE[task]] for task in range(N)}
            metrics["probing_sets"] = tasks
            study.evaluations.append({"arm": arm, "seed": seed, "metrics": metrics, "pools": {}})
        pairs = [
            {"seeds": [a, b], "forward": {"mmcs": mmcs + NOISE[(a + b + len(arm)) % N]}}
            for a in range(N)
            for b in range(a + 1, N)
        ]
        study.comparisons.append({"arm": arm, "other_arm": arm, "pairs": pairs})
    return Summary(study)


def test_a_setting_that_is_no_worse_and_better_in_one_thing_is_recommended(tmp_path):
    summary = summary_of(tmp_path, pool_10_groups_16={"mmcs": 0.05}, pool_5={"mmcs": 0.05, "fvu": 0.1, "dead": 0.5})
    groups, *others, one_pool = decision.verdicts(summary)
    assert [verdict.is_recommended for verdict in others] == [False] * 4
    assert (groups.arm, groups.no_worse, groups.better) == ("pool_10_groups_16", {*decision.MARGINS}, {"mmcs"})
    assert (one_pool.no_worse, one_pool.better) == ({"absorption_full"}, {"mmcs"})
    assert decision.recommended(summary) == groups
    assert decision.verdict_text(summary) == "**Recommended: pool 10, groups of 16**."
    row = decision.verdict_table(summary).splitlines()[2]
    assert row.startswith("| pool 10, groups of 16 | **")
    assert row.endswith("| yes |")


def test_the_verdict_names_the_one_of_several_that_is_better_in_most(tmp_path):
    good = {"pool_10_groups_16": {"mmcs": 0.05}, "pool_5": {"mmcs": 0.05, "probing_1": 0.1}}
    assert decision.verdict_text(summary_of(tmp_path / "two", **good)) == (
        "**Recommended: pool 5, one pool** (of 2 that pass)."
    )
    none = decision.verdict_text(summary_of(tmp_path / "none"))
    assert none == "**No setting of pools passes: BatchTopK by this package's step is what to take.**"


@pytest.mark.parametrize(
    ("change", "no_worse", "better"),
    [
        ({}, {*decision.MARGINS}, set()),  # equal is not better
        ({"fvu": 0.02, "mmcs": 0.05}, {"absorption_full", "dead"}, {"mmcs"}),
        ({"dead": 0.0195, "mmcs": 0.05}, {"absorption_full", "fvu"}, {"mmcs"}),  # not significantly below the margin
        ({"absorption_full": 0.1, "probing_1": 0.1}, {"dead", "fvu"}, {"probing_1"}),
        ({"absorption_full": -0.1}, {*decision.MARGINS}, {"absorption_full"}),
        ({"probing_1": -0.1, "mmcs": -0.1}, {*decision.MARGINS}, set()),  # a change for the worse is not a gain
    ],
    ids=["as good", "FVU", "not excluded", "absorption", "absorbs less", "the other way"],
)
def test_each_condition_counts(change, no_worse, better, tmp_path):
    verdict, *_ = decision.verdicts(summary_of(tmp_path, pool_10_groups_16=change))
    assert (verdict.no_worse, verdict.better) == (no_worse, better)
    assert verdict.is_recommended == (no_worse == {*decision.MARGINS} and better != set())


def test_margins_are_shown_by_one_sided_tests_that_are_corrected_together(tmp_path):
    summary = summary_of(tmp_path, pool_10_groups_16={"dead": 0.01})
    verdict, *_ = decision.verdicts(summary)
    base, ours = (list(summary.values(arm, "dead").values()) for arm in ("batchtopk", "pool_10_groups_16"))
    margin = [a - b - decision.MARGINS["dead"] for a, b in zip(ours, base, strict=True)]
    p = stats.ttest_1samp(margin, 0, alternative="less").pvalue
    assert verdict.differences["dead"].p_at_least(decision.MARGINS["dead"]) == pytest.approx(p)
    # All tests of the other settings fail, so the largest of this setting's three p-values has a factor of 16.
    assert ("dead" in verdict.no_worse) == (16 * p <= 0.025)
    base, ours = (summary.values(arm, "fvu") for arm in ("batchtopk", verdict.arm))
    ratio = [ours[seed] / base[seed] - 1 for seed in range(N)]
    assert verdict.differences["fvu"].mean == pytest.approx(sum(ratio) / N)


def test_nothing_is_judged_before_every_setting_has_every_result(tmp_path):
    """A table of what is there would be looked at while seeds come in, with another correction each time."""
    better = {"pool_10_groups_16": {"mmcs": 0.05}}
    summary = summary_of(tmp_path / "whole", **better)
    assert decision.missing(summary) == []
    assert len(decision.verdicts(summary)) == len(decision.CANDIDATES)
    del summary.on_model["pool_5"][4]
    assert decision.missing(summary) == ["pool_5"]
    assert decision.verdicts(summary) == []
    assert decision.recommended(summary) is None
    summary = summary_of(tmp_path / "absorption", **better)
    del summary.on_model["batchtopk"][0]["metrics"]["absorption_full"]
    assert decision.missing(summary) == ["batchtopk"]
    summary = summary_of(tmp_path / "pair", **better)
    summary.comparisons["nested_10_then_plain", "nested_10_then_plain"]["pairs"].pop()
    assert decision.missing(summary) == ["nested_10_then_plain"]
    two_seeds = Summary(storage(tmp_path / "two", SMOKE))
    assert decision.missing(two_seeds) == ["batchtopk", *decision.CANDIDATES]


def test_a_gain_in_probing_counts_if_it_holds_for_other_tasks(tmp_path):
    """One task of five brings the whole gain, alike in every seed."""
    summary = summary_of(tmp_path, pool_10_groups_16={"probing_1": 0.02})
    gains, *_ = decision.verdicts(summary)
    assert gains.better == {"probing_1"}
    for seed, result in summary.on_model["pool_10_groups_16"].items():
        base = summary.on_model["batchtopk"][seed]["metrics"]["probing_sets"]
        result["metrics"]["probing_sets"] = base | {"0_split0_results": [base["0_split0_results"][0] + 0.1]}
    gains, *_ = decision.verdicts(summary)
    assert gains.differences["probing_1"].mean == pytest.approx(0.02)
    assert gains.better == set()


def test_the_first_step_of_the_correction_is_the_quantile_of_all_tests(tmp_path):
    needed = decision.standard_errors_needed(summary_of(tmp_path))
    assert stats.t.sf(needed, N - 1) == pytest.approx(0.025 / (6 * 3))


def test_orders_elsewhere_have_intervals_from_three_seeds_on(tmp_path):
    summary = summary_of(tmp_path, pool_5={"fvu": 0.1, "mmcs": -0.2})
    header, _, base, *others = order_table(
        {"elsewhere": summary}, {"FVU": "fvu", "not measured": "absorption_fraction", "MMCS": "mmcs"}
    ).splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == ["", "", "SAEs", "FVU", "MMCS"]
    [pool] = [row for row in others if "one pool" in row]
    assert base.startswith("| elsewhere | BatchTopK | 5 | 0.200 | 0.500 |")
    assert re.fullmatch(r"\|  \| pool 5, one pool \| 5 \| 0.300 \(\+0.100 \[.*\]\) \| 0.300 \(-0.200 \[.*\]\) \|", pool)
    for arm in ("batchtopk", "pool_5"):
        for seed in (2, 3, 4):
            del summary.on_model[arm][seed]
    assert "| pool 5, one pool | 2 | 0.300 |" in order_table({"two seeds": summary}, {"FVU": "fvu"})


def test_latents_are_counted_by_how_often_they_fire(tmp_path):
    study = storage(tmp_path, SMOKE)
    for seed, counts in enumerate([[1, 2, 4, 8], [3, 2, 4, 10]]):
        edges = {"density_edges": [-4.5, -3.0, -1.0, -0.25, 0.0], "density_counts": counts}
        result = {"arm": "topk", "seed": seed, "metrics": {"gini": 0.5, "dead": 0.25}, "pools": {}}
        study.evaluations.append(result | edges)
    # By seed: 1 and 3 fire on less than a thousandth of the tokens, 12 and 14 on a tenth or more; 15 and 19 are live.
    assert "| TopK | 0.500 ± 0.000 | 0.250 ± 0.000 | 17 | 13 | 2 |" in firing_table(Summary(study))


@pytest.mark.parametrize(
    ("p_values", "shown"),
    [((0.004, 0.006, 0.02), 3), ((0.004, 0.006, 0.03), 2), ((0.02, 0.02, 0.02), 0)],
    ids=["all", "one-sided 2.5 %", "corrected"],
)
def test_margins_are_kept_at_a_level_of_two_and_a_half_percent_after_correction(p_values, shown, monkeypatch):
    def interval(mean):
        return Interval(mean, 1.0, mean - 3, mean + 3, 1.0, N)

    below = {
        name: interval(bound + stats.t.ppf(p, N - 1))
        for (name, bound), p in zip(decision.MARGINS.items(), p_values, strict=True)
    }
    found = {name: interval(0.0) for name in decision.NAMES} | below
    monkeypatch.setattr(decision, "CANDIDATES", ("pool_5",))
    monkeypatch.setattr(decision, "missing", lambda _summary: [])
    monkeypatch.setattr(decision, "differences", lambda _summary, _arm: found)
    [verdict] = decision.verdicts(None)
    assert len(verdict.no_worse) == shown
