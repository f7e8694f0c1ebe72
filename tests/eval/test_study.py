"""The study in eval/: its plan, its computations and its pages."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

import pandas as pd
from sae_lens import ActivationsStore
from study_helpers import EVAL, SMOKE, storage, unit_of

from sae_lens_sampled import load_checkpoint
from sae_lens_sampled.runners.parts import Part
from study import evaluation, run, training
from study.beside_batchtopk import decision_table, difference_table, differences, marks_of
from study.costs import format_plan, probing_scratch, products_of
from study.dictionaries import overlap
from study.evaluation import batches_of_training, halves, in_training
from study.named_text import TITLES, keep_titles, with_text, with_text_of_results
from study.plan import (
    absorption_units,
    arms,
    compared,
    runs,
    sae_config,
    synthetic_config,
    synthetic_units,
    units,
)
from study.report import render_pages, render_tables, write_report
from study.stages import STAGES, planned, to_do
from study.storage import Storage
from study.studies import LONG, PYTHIA, SMOLLM2, STUDIES, TINY, smoke
from study.summary import Summary, committed, shown
from study.training import new_sae, train


@pytest.mark.parametrize("study", [*STUDIES.values(), smoke(PYTHIA)], ids=lambda study: study.name)
def test_every_export_has_an_sae_that_is_trained_once(study):
    trained = [unit.name for run in runs(study) for unit in run]
    assert len(trained) == len(set(trained))
    assert {unit.trained for unit in units(study)} == set(trained)
    assert len({unit.name for unit in units(study)}) == len(units(study))
    assert all(len({(unit.seed, unit.arm.shuffled) for unit in run}) == 1 for run in runs(study))


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_the_smoke_run_has_the_plan_of_the_study_it_stands_for(study):
    def plan(study):
        return [(arm.name, arm.config, arm.fields.get("score")) for arm in arms(study)]

    assert plan(smoke(study)) == plan(study)
    assert [(a.name, b.name) for a, b in compared(smoke(study))] == [(a.name, b.name) for a, b in compared(study)]


def test_the_dry_run_says_what_it_would_take():
    text = format_plan(PYTHIA)
    trained = sum(len(run) for run in runs(PYTHIA))
    assert f"{trained} SAEs in {len(runs(PYTHIA))} runs" in text
    assert f"{len(units(PYTHIA))} exports" in text
    assert f"{len(synthetic_units(PYTHIA))} SAEs, each trained on 512,000 samples" in text
    assert f"{50_000 * 4096 * trained:,} through SAEs" in text
    assert all(f"\n{arm.name} " in text for arm in arms(PYTHIA))
    assert "GPU hours" in text
    once = f"{SMOLLM2.steps * SMOLLM2.batch_size:,}"
    assert f"{once} tokens per run, {once} through the language model" in format_plan(SMOLLM2)


def test_costs_count_the_products_of_the_way_a_step_takes():
    def products(study, name):
        return products_of(study, unit_of(name, study=study))

    assert products(PYTHIA, "batchtopk") == products(PYTHIA, "pool_5_groups_16") == 6  # dense on a GPU
    assert products(PYTHIA, "pool_5") == pytest.approx(1 + 5 * 320 / 16_384)
    assert products(PYTHIA, "narrow_5") == pytest.approx(6 * 320 / 16_384)


def test_arms_that_are_exports_of_another_arm_bring_its_training_and_no_probing_takes_no_disk(tmp_path):
    [arm] = {run[0].arm.name for run in planned(STAGES["train"], storage(tmp_path), ["pool_5_global"])}
    assert arm == "pool_5"
    assert probing_scratch(STUDIES["smollm2-block3"]) == 0 < probing_scratch(STUDIES["smollm2-block10"])


def test_an_sae_is_the_same_in_whichever_run_it_is_trained(tmp_path):
    together, alone = storage(tmp_path / "together"), storage(tmp_path / "alone")
    train(together, [unit_of("batchtopk"), unit_of("pool_5"), unit_of("pool_all")])
    train(alone, [unit_of("pool_5")])
    files = [study.sae(unit_of("pool_5")) / "sae_weights.safetensors" for study in (together, alone)]
    weights = [file.read_bytes() for file in files]
    assert weights[0] == weights[1]


def test_saes_on_activations_from_a_file_share_one_pass_of_the_model(tmp_path, monkeypatch):
    study = storage(tmp_path, smoke(SMOLLM2))
    n_read, run_model = [], ActivationsStore.get_activations

    def counted(store, tokens):
        n_read.append(len(tokens))
        return run_model(store, tokens)

    monkeypatch.setattr(ActivationsStore, "get_activations", counted)
    monkeypatch.setattr(ActivationsStore, "get_multi_hook_activations", lambda *_: pytest.fail("not from the file"))
    seeds, shuffled = [], training.shuffled_batches

    def noted(activations, batch_size, seed):
        seeds.append(seed)
        return shuffled(activations, batch_size, seed)

    monkeypatch.setattr(training, "shuffled_batches", noted)
    units = [unit_of(name, seed, study.study) for seed in (0, 1) for name in ("batchtopk", "pool_5")]
    train(study, units[:2])
    n_passes = len(n_read)
    assert n_passes > 0
    train(study, units[2:])
    assert len(n_read) == n_passes
    assert seeds == [0, 1]
    saes = [load_checkpoint(study.sae(unit)) for unit in units]
    assert [sae.cfg.metadata.hook_name for sae in saes] == [study.study.hook] * 4
    assert not torch.equal(saes[1].W_dec, saes[3].W_dec)


@pytest.mark.parametrize("study", [smoke(study) for study in STUDIES.values()], ids=STUDIES)
def test_every_study_has_a_page_of_the_arms_that_it_has(study, tmp_path):
    page = write_report(storage(tmp_path, study), tmp_path).read_text()
    assert all(arm.label in page for arm in arms(study) if arm.name in ("batchtopk", "pool_5", "nested_10_then_plain"))
    assert ("topk" in {arm.name for arm in arms(study)}) == ("| TopK |" in page)


def test_a_named_text_is_split_by_file_and_known_by_its_content(tmp_path):
    for i in range(40):
        novel = tmp_path / "novels" / f"Author{i:02}_Some_Title_{1850 + i}.txt"
        novel.parent.mkdir(exist_ok=True)
        novel.write_text("\ufeff" + f"Line of novel {i:02}, which is not long.\n" * 200, encoding="utf-8")
    config = replace(SMOLLM2, probing_splits=0)  # these are not the novels of the probing tasks
    study = with_text(config, str(tmp_path / "novels"), tmp_path / "work")
    titles = json.loads((Path(study.dataset).parent / TITLES).read_text())
    assert titles["held_out"] == ["Author19, Some Title (1869)", "Author39, Some Title (1889)"]
    assert len(titles["train"]) == 38
    rows = {
        part: [json.loads(line)["text"] for line in (Path(folder) / "train.jsonl").read_text().splitlines()]
        for part, folder in (("train", study.dataset), ("held_out", study.held_out))
    }
    assert {row[14:16] for row in rows["held_out"]} == {"19", "39"}
    assert sum(map(len, rows["train"])) == 38 * 200 * 37  # nothing is lost but the byte order mark
    first = [row[14:16] for row in rows["train"][:10]]
    assert first != sorted(first)  # passages of all novels are mixed
    (tmp_path / "novels").rename(tmp_path / "elsewhere")
    again = with_text(config, str(tmp_path / "elsewhere"), tmp_path / "other_work")
    assert again.settings() == study.settings()
    assert not any(str(tmp_path) in str(value) for value in study.settings().values())
    # Titles and fingerprint are kept with the results, so they can be shown without the text.
    study_of_text = Storage(study, tmp_path / "results", tmp_path / "work")
    assert with_text_of_results(config, study_of_text.results) == config
    keep_titles(study, study_of_text.results)
    study_of_text.evaluations.append({"arm": "topk", "seed": 0, "metrics": {}})
    shown_later = with_text_of_results(config, study_of_text.results)
    assert shown_later.settings() == study.settings()
    assert json.loads((study_of_text.results / TITLES).read_text()) == titles
    assert list(Storage(shown_later, study_of_text.results, tmp_path).evaluations.load()) == [("topk", 0)]
    (tmp_path / "elsewhere" / "Author00_Some_Title_1850.txt").write_text("changed")
    assert with_text(config, str(tmp_path / "elsewhere"), tmp_path).settings() != study.settings()


def test_titles_of_results_stay_if_another_text_is_given(tmp_path):
    for text in ("one", "other"):
        (tmp_path / text).mkdir()
        for i in range(2):
            (tmp_path / text / f"Author{i}_Novel_{text}_1850.txt").write_text(f"Line {text} of novel {i}.\n" * 200)
    config = replace(LONG, probing_splits=0)
    results = tmp_path / "results"
    kept = Storage(with_text(config, str(tmp_path / "one"), tmp_path / "work"), results, tmp_path / "work")
    keep_titles(kept.study, results)
    kept.evaluations.append({"arm": "topk", "seed": 0, "metrics": {}})
    before = (results / TITLES).read_text()
    arguments = ["--config", "smollm2-10m", "--text", str(tmp_path / "other"), "--work-dir", str(tmp_path / "again")]
    with pytest.raises(SystemExit, match="has results of this study with other settings"):
        run.main([*arguments, "--results-dir", str(results), "--stages", "train"])
    assert (results / TITLES).read_text() == before


def test_a_text_of_one_file_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(ValueError, match=r"must have at least two \.txt files, one of which is held out"):
        with_text(SMOLLM2, str(tmp_path), tmp_path)
    assert with_text(SMOLLM2, "monology/pile-uncopyrighted", tmp_path).dataset == "monology/pile-uncopyrighted"


def test_a_pool_of_all_latents_is_batchtopk_in_the_study_too(tmp_path):
    study = storage(tmp_path)
    train(study, [unit_of("batchtopk"), unit_of("topk"), unit_of("pool_all")])
    saes = [load_checkpoint(study.sae(unit_of(name))) for name in ("batchtopk", "pool_all", "topk")]
    torch.testing.assert_close(saes[0].W_dec, saes[1].W_dec, rtol=1e-3, atol=1e-5)  # bit-identical with step="dense"
    assert not torch.equal(saes[0].W_dec, saes[2].W_dec)


def test_an_sae_with_nan_is_left_out_of_the_evaluation_and_named(tmp_path, monkeypatch):
    study, good, bad = storage(tmp_path), unit_of("batchtopk"), unit_of("topk")
    new_sae(SMOKE, good).save_model(study.sae(good))
    sae = new_sae(SMOKE, bad)
    sae.W_enc.data[:3, 0] = math.nan
    sae.save_model(study.sae(bad))
    monkeypatch.setattr(
        evaluation, "run_evals", lambda saes, *_, **__: {"core": {f"{n}_custom_sae": {} for n, _ in saes}}
    )
    monkeypatch.setattr(evaluation, "metrics", lambda _results: {})
    monkeypatch.setattr(evaluation, "density", lambda _core: {})
    [fault] = evaluation.evaluate(study, [bad, good])
    entries = sae.W_enc.numel()
    assert fault.startswith(f"3 of {entries:,} entries of W_enc are not finite, so '{study.sae(bad)}' is unusable: ")
    assert list(study.evaluations.load()) == [("batchtopk", 0)]


def test_absorption_in_a_stage_of_its_own_is_of_the_saes_that_were_chosen(tmp_path, monkeypatch):
    """On SmolLM2, where it takes minutes per SAE: only planned SAEs, each once, shown beside the other results."""
    study = storage(tmp_path, replace(smoke(SMOLLM2), n_stability_seeds=3))
    for unit in units(study.study):
        new_sae(study.study, unit).save_model(study.sae(unit))
        study.evaluations.append({"arm": unit.arm.name, "seed": unit.seed, "metrics": {"fvu": 0.1}, "pools": {}})
    asked = []

    def absorption(saes, evals, *_, overrides, **__):
        asked.extend(name for name, _ in saes)
        assert (evals, overrides) == (["absorption"], {"absorption": study.study.absorption})
        means = {"mean_absorption_fraction_score": 0.25, "mean_full_absorption_score": 0.125}
        numbers = {"full_absorption_rate": 0.5, "mean_absorption_fraction": 0.5}
        details = [{"first_letter": letter, "num_split_features": 1 + (letter == "a"), **numbers} for letter in "abcd"]
        recall = {letter: {"recall_probe": 0.75, "recall_best_latent": 0.25} for letter in "abcd"}
        result = {"eval_result_metrics": {"mean": means}, "eval_result_details": details}
        result["eval_result_unstructured"] = {"letters": recall}
        return {"absorption": {f"{name}_custom_sae": result for name, _ in saes}}

    monkeypatch.setattr(evaluation, "run_evals", absorption)
    for _ in range(2):
        for index in (1, 2):
            if items := to_do(STAGES["absorption"], study, ["*"], Part(index, 2)):
                STAGES["absorption"].do(study, items)
    names = [unit_of(name, 0, study.study) for name in ("batchtopk", "pool_10_groups_16", "pool_5", "topk")]
    assert sorted(asked) == [study.release(unit) for unit in names]
    summary = Summary(study)
    assert summary.number("pool_5", "absorption_fraction") == "0.250"  # a single SAE has no interval
    assert summary.number("pool_5_groups_16", "absorption_fraction") == "-"
    assert summary.values("batchtopk", "absorption_letters") == {0: 4}
    assert summary.values("batchtopk", "absorption_n_splits") == {0: 1.25}
    assert summary.values("batchtopk", "absorption_recall_best_latent") == {0: 0.25}
    of_letter = summary.absorption["topk"][0]["metrics"]["absorption_by_letter"]["a"]
    assert of_letter == {"full": 0.5, "fraction": 0.5, "n_splits": 2, "recall_probe": 0.75, "recall_best_latent": 0.25}
    assert not absorption_units(TINY)


def test_results_of_other_settings_are_refused(tmp_path):
    mine, other = storage(tmp_path).evaluations, storage(tmp_path, replace(SMOKE, lr=1e-4)).evaluations
    mine.append({"arm": "topk", "seed": 0, "metrics": {}})
    before = mine.file.read_bytes()
    with pytest.raises(ValueError, match=r"other settings \(lr\); move the folder away"):
        other.load()
    with pytest.raises(ValueError, match=r"other settings \(lr\); move the folder away"):
        other.append({"arm": "topk", "seed": 1, "metrics": {}})
    assert mine.file.read_bytes() == before
    with pytest.raises(ValueError, match=r"other settings \(lr\); move the folder away"):
        storage(tmp_path, replace(SMOKE, lr=1e-4)).comparisons.load()  # no line yet: rejected before any computation
    more = storage(tmp_path, replace(SMOKE, n_seeds=7, device="cuda"))  # another portion of the same study
    assert list(more.evaluations.load()) == [("topk", 0)]
    assert storage(tmp_path, replace(SMOKE, lr=1e-4)).synthetic.load() == {}  # the rate is not one of its settings


def committed_study(config):
    results = committed(config.name, EVAL)
    return Storage(with_text_of_results(config, results), results, Path("not_needed"))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        *((TINY, name) for name in ("evaluate", "compare", "synthetic")),
        *((SMOLLM2, name) for name in ("evaluate", "compare", "absorption")),
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
    for config in (TINY, SMOLLM2):
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
    assert base == "| BatchTopK | 0.200 | - | - | - | 0.533 | 0.520 | - | - | - |"
    # Alone, MMCS would be marked; of three comparisons it has the second-smallest p-value, which is doubled.
    assert pool == "| pool 5, one pool | 0.180 | - | - | - | 0.633 ▼ | 0.303 | - | - | 81 s |"
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


def test_the_overlap_of_two_sets_pairs_as_many_as_it_can():
    a = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1]])
    b = torch.tensor([[2.0, 0, 0], [3, -0.3, 0]])
    # Both rows of b are near row 0 of a; only row 0 of b is also near row 1 of a: two pairs, out of 3 + 2 - 2.
    assert overlap(a, b) == overlap(b, a) == pytest.approx(2 / 3)
    assert overlap(a, a) == 1
    assert overlap(a[:1], -a[:1]) == 0


def test_the_control_of_a_frozen_pool_is_batchtopk_of_its_size():
    by_name = {arm.name: arm for arm in arms(TINY)}
    for factor in (3, 5):
        sampled = sae_config(TINY, by_name[f"pool_{factor}"], 0)
        narrow = sae_config(TINY, by_name[f"narrow_{factor}"], 0)
        assert (narrow.architecture(), narrow.d_sae) == ("batchtopk", 16 * factor)
        assert sampled.n_candidates == narrow.d_sae
        assert synthetic_config(TINY, by_name[f"narrow_{factor}"], 0).d_sae == 5 * factor


def test_sampled_pools_are_drawn_for_every_batch_that_is_judged(tmp_path):
    study = storage(tmp_path)
    dense, sampled = unit_of("batchtopk"), unit_of("uniform_groups_16")
    train(study, [dense, sampled])
    x = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))
    assert in_training(SMOKE, dense.arm, load_checkpoint(study.sae(dense)), x)["l0_in_training"] == 8
    sae = load_checkpoint(study.sae(sampled))
    measured = in_training(SMOKE, sampled.arm, sae, x)
    batches = batches_of_training(SMOKE, sampled.arm, x)
    assert sorted(torch.cat(batches).sum(dim=1).tolist()) == sorted(x.sum(dim=1).tolist())
    residuals = [batch - sae.decode(sae.select(batch, draw=i)) for i, batch in enumerate(batches)]
    fvu = sum(r.square().sum() for r in residuals) / (x - x.mean(dim=0)).square().sum()
    assert measured["fvu_in_training"] == pytest.approx(fvu.item(), rel=1e-4)


def test_the_halves_of_a_text_take_turns():
    first, second = halves(torch.arange(20), n_tokens=4)
    assert (first.tolist(), second.tolist()) == (
        [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19],
        [4, 5, 6, 7, 12, 13, 14, 15],
    )


def test_saes_of_other_settings_are_not_taken_for_these(tmp_path):
    assert storage(tmp_path).sae(unit_of("topk")) != storage(tmp_path, replace(SMOKE, lr=1e-4)).sae(unit_of("topk"))
    assert storage(tmp_path).sae(unit_of("topk")) == storage(tmp_path, replace(SMOKE, n_seeds=9)).sae(unit_of("topk"))
