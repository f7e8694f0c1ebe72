"""The pages of studies: they show what was measured, and the committed ones the committed results."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

import pandas as pd
from study_helpers import EVAL, SMOKE, storage

from study import tables
from study.beside_batchtopk import decision_table, difference_table, differences, marks_of
from study.named_text import with_text_of_results
from study.plan import (
    absorption_units,
    arms,
    compared,
    synthetic_units,
    units,
)
from study.report import export_gaps, render_pages, render_tables, write_report
from study.storage import Storage
from study.studies import BLOCK_10, CURVE, SPLIT_10, STUDIES, TINY, smoke
from study.summary import Summary, committed, shown


@pytest.mark.parametrize("study", [smoke(study) for study in STUDIES.values()], ids=STUDIES)
def test_every_study_has_a_page_of_the_arms_that_it_has(study, tmp_path):
    page = write_report(storage(tmp_path, study), tmp_path).read_text()
    assert all(arm.label in page for arm in arms(study) if arm.name in ("batchtopk", "pool_5", "nested_10_then_plain"))
    assert ("topk" in {arm.name for arm in arms(study)}) == ("| TopK |" in page)


@pytest.mark.parametrize("study", [BLOCK_10, SPLIT_10], ids=lambda study: study.name)
def test_a_study_without_baseline_has_a_page(study, tmp_path):
    empty = storage(tmp_path, study)
    assert "## Sparse probing" in render_tables(empty)
    metrics = {"absorption_full": 0.5, "absorption_by_letter": {}}
    empty.absorption.append({"arm": "pool_10_groups_16", "seed": 3, "metrics": metrics})
    assert not re.search("## (Sparse probing|Thresholds|Seeds|How equally)", render_tables(empty))
    assert f"# All tables of the study `{study.name}`" in render_tables(empty)


def test_pages_of_incomplete_results_leave_out_what_is_not_there(tmp_path):
    for name in ("bench_training_step.json", "study_tiny"):
        (tmp_path / "results" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "results" / name).symlink_to(EVAL / "results" / name)
    page = render_pages(tmp_path)["RESULTS.md"]
    assert "Not decided: 7 of the 7 settings" in page
    assert "**Absorption**" not in page
    assert "**Exports**" not in page
    study = replace(storage(tmp_path, BLOCK_10), results=tmp_path / "results" / "study_smollm2-block10")
    study.absorption.append({"arm": "topk", "seed": 3, "metrics": {"absorption_full": 0.5, "absorption_by_letter": {}}})
    assert "**Absorption**" not in render_pages(tmp_path)["RESULTS.md"]


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_every_arm_is_in_a_table_of_means(study, tmp_path):
    summary = Summary(storage(tmp_path, study))
    shown_arms = {*tables.compared_arms(summary), *tables.nested_arms(), *tables.score_arms(summary)}
    shown_arms |= {*tables.order_arms(summary), *tables.global_arms(summary)}
    assert set(summary.arms) <= shown_arms


def committed_study(config):
    results = committed(config.name, EVAL)
    return Storage(with_text_of_results(config, results), results, Path("not_needed"))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *((TINY, name) for name in ("evaluate", "compare", "synthetic")),
        *((BLOCK_10, name) for name in ("evaluate", "compare", "absorption")),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_committed_results_have_a_row_for_each_unit_of_the_plan(config, name):
    study = committed_study(config)
    planned = {
        "evaluate": (study.evaluations, [unit.key for unit in units(config)]),
        "absorption": (study.absorption, [unit.key for unit in absorption_units(config)]),
        "synthetic": (study.synthetic, [unit.key for unit in synthetic_units(config)]),
        "compare": (study.comparisons, [(arm.name, other.name) for arm, other in compared(config)]),
    }
    table, keys = planned[name]
    frame = pd.read_json(table.file, lines=True)
    finished = list(table.load())
    assert finished == list(frame[list(table.key_fields)].itertuples(index=False, name=None))
    assert sorted(finished) == sorted(keys)  # arms may have been added later


def test_the_committed_pages_are_those_of_the_committed_results():
    for page, text in render_pages(EVAL).items():
        assert text == (EVAL / page).read_text()
    for config in (TINY, BLOCK_10, SPLIT_10, *CURVE):
        study = committed_study(config)
        assert render_tables(study) == (study.results / "RESULTS.md").read_text()


def test_differences_from_batchtopk_are_marked_after_correction(tmp_path):
    study = storage(tmp_path, replace(SMOKE, n_stability_seeds=3))
    values = {
        "batchtopk": {"fvu": [0.10, 0.20, 0.30], "dead": [0.5, 0.5, 0.6]},
        # FVU is lower by 0.02, with a standard error of 0.0115; dead share is higher by 0.1 in each pair.
        "pool_5": {"fvu": [0.10, 0.18, 0.26], "dead": [0.6, 0.6, 0.7]},
    }
    for arm, of_arm in values.items():
        for seed in range(3):
            metrics = {name: numbers[seed] for name, numbers in of_arm.items()}
            study.evaluations.append({"arm": arm, "seed": seed, "metrics": metrics, "pools": {}, "thresholds": {}})
    for arm, mmcs in {"batchtopk": (0.5, 0.5, 0.56), "pool_5": (0.3, 0.31, 0.3)}.items():
        seeds = [[0, 1], [0, 2], [1, 2]]
        pairs = [{"seeds": pair, "forward": {"mmcs": value}} for pair, value in zip(seeds, mmcs, strict=True)]
        study.comparisons.append({"arm": arm, "other_arm": arm, "pairs": pairs})
    summary = Summary(study)
    found = differences(summary)
    assert found["pool_5", "FVU"].error == pytest.approx(0.0115, abs=1e-4)
    # -0.2, -0.19 and -0.26: the jackknife error is 0.0437, so t is -4.96 with two degrees of freedom.
    assert found["pool_5", "MMCS"].p == pytest.approx(0.038, abs=1e-3)
    table = decision_table(summary, {"pool_5": 81.4})
    [base, pool] = [line for line in table.splitlines() if line.startswith(("| BatchTopK |", "| pool 5, one pool |"))]
    assert base == "| BatchTopK | 3 | 0.200 | - | - | - | 0.533 | 0.520 | - | - | - |"
    # Alone, MMCS would be marked; of three comparisons it has the second-smallest p-value, which is doubled.
    assert pool == "| pool 5, one pool | 3 | 0.180 | - | - | - | 0.633 ▼ | 0.303 | - | - | 81 s |"
    assert "| -0.020 [-0.070, +0.030] | - | - | - | **+0.100 [+0.100, +0.100]** |" in difference_table(summary)
    of_mmcs = {("pool_5", "MMCS"): found["pool_5", "MMCS"]}
    assert marks_of(of_mmcs) == {("pool_5", "MMCS"): " ▼"}
    better = {("pool_5", "absorption, full"): found["pool_5", "MMCS"]}
    assert marks_of(better) == {("pool_5", "absorption, full"): " ▲"}


def test_means_and_paired_differences_have_the_errors_of_their_seeds(tmp_path):
    study = storage(tmp_path, replace(SMOKE, n_stability_seeds=3))
    for arm, values in {"batchtopk": [0.1, 0.2, 0.6], "pool_5": [0.2, 0.4]}.items():
        for seed, value in enumerate(values):
            result = {"metrics": {"fvu": value}, "pools": {"starved_share": 0.25}, "thresholds": {"global": {"l0": 8}}}
            study.evaluations.append({"arm": arm, "seed": seed, **result})
    summary = Summary(study)
    assert shown(summary.mean("batchtopk", "fvu"), "fvu") == "0.300 ± 0.657"  # 4.303 std / sqrt(3)
    assert shown(summary.difference("pool_5", "batchtopk", "fvu"), "fvu", signed=True) == "+0.150 [-0.485, +0.785]"
    assert shown(summary.mean("pool_5", "starved_share")) == "0.250 ± 0.000"
    assert shown(summary.mean("pool_5", "global.l0"), "global.l0") == "8.0 ± 0.0"
    assert shown(summary.mean("topk", "fvu")) == "-"


def test_dictionaries_too_large_to_be_matched_leave_a_dash(tmp_path):
    study = storage(tmp_path)
    study.comparisons.append({"arm": "topk", "other_arm": "topk", "pairs": [{"matched": None, "seeds": [0, 1]}]})
    assert shown(Summary(study).similarity("topk", "topk", "matched")) == "-"


def test_absorption_is_shown_by_study_and_by_letter(tmp_path):
    study, split = (storage(tmp_path / name, smoke(config)) for name, config in (("3", BLOCK_10), ("10", SPLIT_10)))
    split.study.absorption["max_k_value"] = 10
    for seed, full in ((3, 0.25), (4, 0.75)):
        of_letter = {
            "full": full,
            "fraction": 0.5,
            "n_splits": 1 + seed,
            "recall_probe": 0.9,
            "recall_best_latent": 0.5,
        }
        letters = {"a": of_letter} | ({"b": of_letter} if seed == 4 else {})
        metrics = {"absorption_full": full, "absorption_by_letter": letters}
        study.absorption.append({"arm": "topk", "seed": seed, "metrics": metrics})
    split.absorption.append({"arm": "batchtopk", "seed": 3, "metrics": metrics})
    summary = Summary(study)
    *_, topk, batchtopk = tables.absorption_table(summary, Summary(split)).splitlines()
    assert topk.startswith("| TopK | 2 | 2 | 0.500 ± 3.177 | - |")  # 12.7 standard errors of 0.25
    assert batchtopk.startswith("| BatchTopK | 10 | 1 | 0.750 | - |")
    assert tables.letter_table(summary, "full").splitlines()[2:] == ["| a | 0.50 |", "| b | 0.75 |"]
    assert tables.letter_table(summary, "n_splits").splitlines()[2:] == ["| a | 4.50 |", "| b | 5.00 |"]


def test_the_gap_of_an_export_is_from_the_selection_of_training_on_the_same_tokens(tmp_path):
    study = storage(tmp_path)
    for arm, fvu in (("batchtopk", 0.20), ("pool_5", 0.21), ("pool_5_groups_16", 0.19), ("topk", 0.9)):
        metrics = {"fvu": fvu, "fvu_of_selection": 0.2, "l0": 8, "l0_of_selection": 10, "fvu_in_training": 9}
        study.evaluations.append({"arm": arm, "seed": 0, "metrics": metrics, "pools": {}})
    assert export_gaps(Summary(study)) == {
        "ours_l0": "-20.0% to -20.0%",
        "ours_fvu": "-5.0% to +5.0%",
        "batchtopk_l0": "-20.0% to -20.0%",
        "batchtopk_fvu": "+0.0% to +0.0%",
    }
