"""Differences in probing: what counts as a repeat, and what the tables show."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from study_helpers import SMOKE, storage

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from study.evaluation import metrics
from study.probing_tables import (
    accuracies,
    adjusted_p_values,
    comparisons,
    difference_table,
    probed_ks,
    task_table,
    verdict,
)
from study.summary import Summary

TASKS, N_SPLITS, KS = ("authors", "decades_1850s", "tense"), 2, (1, 2, 5, 20)


def result(arm: str, seed: int, sets: dict[str, list[float]], ks=KS) -> dict:
    probing = {f"probing_{k}": float(np.mean([by_k[i] for by_k in sets.values()])) for i, k in enumerate(ks)}
    return {"arm": arm, "seed": seed, "metrics": probing | {"probing_sets": sets}, "pools": {}}


def filled(tmp_path, values: dict[str, np.ndarray]) -> Summary:
    """A study with accuracies of shape (n_seeds, n_tasks, n_splits, n_ks) for each arm."""
    study = storage(tmp_path, replace(SMOKE, n_stability_seeds=3))
    for arm, of_arm in values.items():
        for seed, of_seed in enumerate(of_arm):
            sets = {
                f"{task}_split{split}_results": of_seed[i, split].tolist()
                for i, task in enumerate(TASKS)
                for split in range(N_SPLITS)
            }
            study.evaluations.append(result(arm, seed, sets))
    return Summary(study)


@pytest.fixture
def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (3, len(TASKS), N_SPLITS, len(KS))
    return {arm: rng.uniform(0.5, 0.9, shape).round(3) for arm in ("batchtopk", "pool_5", "pool_5_groups_16")}


def test_seeds_and_tasks_are_repeats_and_splits_are_none(tmp_path, values):
    found = comparisons(filled(tmp_path, values))
    for i, k in enumerate(KS):
        difference = (values["pool_5"] - values["batchtopk"])[..., i]
        for interval, means in (
            (found["pool_5", k].over_seeds, difference.mean(axis=(1, 2))),
            (found["pool_5", k].over_tasks, difference.mean(axis=(0, 2))),
        ):
            test = stats.ttest_1samp(means, 0)
            assert interval.n == 3
            assert [interval.mean, interval.p] == pytest.approx([difference.mean(), test.pvalue])
            assert [interval.low, interval.high] == pytest.approx(list(test.confidence_interval(0.95)))
        accuracy = found["pool_5", k].accuracy
        assert [accuracy.mean, accuracy.n] == pytest.approx([values["pool_5"][..., i].mean(), 3])
        assert found["batchtopk", k].over_seeds is None


def test_pairs_are_the_cells_that_both_arms_have(tmp_path, values):
    """A seed that BatchTopK lacks says nothing about the difference."""
    values["batchtopk"] = values["batchtopk"][:2]
    found = comparisons(filled(tmp_path, values))
    assert found["pool_5", 1].over_seeds.n == 2
    difference = values["pool_5"][:2, ..., 0] - values["batchtopk"][..., 0]
    assert found["pool_5", 1].over_tasks.mean == pytest.approx(difference.mean())
    assert found["pool_5", 1].accuracy.n == 3


def test_a_difference_must_hold_for_other_seeds_and_for_other_tasks(tmp_path, values):
    base = values["batchtopk"]
    noise = np.random.default_rng(1).normal(0, 1e-3, base.shape)
    of_one_task = np.zeros(base.shape)
    of_one_task[:, 0] = 0.3
    gains = {"batchtopk": 0, "pool_5": 0.1 + noise, "pool_5_groups_16": of_one_task + noise}
    summary = filled(tmp_path, {arm: base + gain for arm, gain in gains.items()})
    found = comparisons(summary)
    assert found["pool_5_groups_16", 1].over_seeds.p < 1e-3
    assert found["pool_5_groups_16", 1].p == found["pool_5_groups_16", 1].over_tasks.p > 0.3
    adjusted = adjusted_p_values(found)
    assert len(adjusted) == 2 * len(KS)  # corrected over all arms and k together
    assert all(adjusted["pool_5", k] < 0.05 for k in KS)
    assert adjusted["pool_5", 1] >= 5 * found["pool_5", 1].p  # five are left: the other arm's four and this one
    text = verdict(summary)
    assert text.endswith(
        "of 8 differences from BatchTopK, those of controls among them, 4 stand out. "
        "Better (with so many latents): pool 5, one pool (1, 2, 5, 20)."
    )


def test_tables_show_what_was_computed(tmp_path, values):
    summary = filled(tmp_path, values)
    [header, _, base, pool, _] = difference_table(summary, 20).splitlines()
    assert header == "|  | accuracy | difference, over seeds | over tasks | p, adjusted |"
    assert base.endswith("| - | - | - |")
    found = comparisons(summary)["pool_5", 20]
    assert f"| {found.accuracy.mean:.3f} [{found.accuracy.low:.3f}, {found.accuracy.high:.3f}] |" in pool
    assert f"| {found.over_tasks.mean:+.3f} [{found.over_tasks.low:+.3f}, {found.over_tasks.high:+.3f}] | 1 |" in pool
    lines = task_table(summary, 5, ["pool_5", "batchtopk", "topk"]).splitlines()
    assert lines[0] == "|  | pool 5, one pool | BatchTopK |"
    means = [values[arm][:, 1, :, 2].mean() for arm in ("pool_5", "batchtopk")]
    assert lines[3] == f"| decades 1850s | {means[0]:.3f} | {means[1]:.3f} |"
    assert len(lines) == 2 + len(TASKS)


def test_one_sae_for_each_arm_has_no_interval(tmp_path, values):
    summary = filled(tmp_path, {arm: of_arm[:1] for arm, of_arm in values.items()})
    assert verdict(summary) == "One SAE for each arm, or one task, says nothing about others."
    assert "pool 5" in difference_table(summary, 1)
    assert difference_table(filled(tmp_path / "none", {}), 1).count("\n") == 1


def test_older_results_with_one_set_for_each_task_are_read():
    older = result("topk", 0, {"authors_results": [0.5, 0.6, 0.7], "speech_results": [0.4, 0.5, 0.6]}, ks=(1, 2, 5))
    assert probed_ks([older]) == [1, 2, 5]
    assert accuracies({0: older}, 5) == {(0, "authors", 0): 0.7, (0, "speech", 0): 0.6}
    assert probed_ks([older, result("topk", 1, {"a": [0.1] * 4})]) == [1, 2, 5]
    assert probed_ks([older, {"metrics": {"fvu": 0.1, "probing_sets": {}}}]) == []


def test_every_k_that_was_probed_is_kept():
    details = [
        {"dataset_name": f"{name}_results", **{f"sae_top_{k}_test_accuracy": k / 100 + i for k in KS}}
        for i, name in enumerate(("tense_split0", "tense_split1"))
    ]
    probing = {
        "eval_config": {"k_values": [20, 1, 2, 5]},
        "eval_result_metrics": {"sae": {f"sae_top_{k}_test_accuracy": k / 10 for k in KS} | {"sae_top_10": None}},
        "eval_result_details": details,
    }
    kept = metrics({"sparse_probing": probing})
    assert kept.pop("probing_sets") == {
        "tense_split0_results": [0.01, 0.02, 0.05, 0.2],
        "tense_split1_results": [1.01, 1.02, 1.05, 1.2],
    }
    assert kept == {"probing_1": 0.1, "probing_2": 0.2, "probing_5": 0.5, "probing_20": 2.0}
