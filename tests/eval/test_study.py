"""The study in eval/: its plan and its computations."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from sae_lens import ActivationsStore
from study_helpers import SMOKE, storage, unit_of

from sae_lens_sampled import load_checkpoint
from sae_lens_sampled.runners.parts import Part
from study import evaluation, training
from study.costs import format_plan, probing_scratch, products_of
from study.dictionaries import overlap
from study.evaluation import batches_of_training, halves, in_training
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
from study.stages import STAGES, planned, to_do
from study.studies import BLOCK_10, PYTHIA, STUDIES, TINY, smoke
from study.summary import Summary
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
    once = f"{BLOCK_10.steps * BLOCK_10.batch_size:,}"
    assert f"{once} tokens per run, {once} through the language model" in format_plan(BLOCK_10)


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
    study = storage(tmp_path, smoke(BLOCK_10))
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
    study = storage(tmp_path, replace(smoke(BLOCK_10), absorption_seeds=1, n_stability_seeds=3))
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
    names = [unit_of(name, 3, study.study) for name in BLOCK_10.absorption_arms]
    assert sorted(asked) == sorted(study.release(unit) for unit in names)
    summary = Summary(study)
    assert summary.number("pool_5", "absorption_fraction") == "0.250"  # a single SAE has no interval
    assert summary.number("narrow_5", "absorption_fraction") == "-"
    assert summary.values("batchtopk", "absorption_letters") == {3: 4}
    assert summary.values("batchtopk", "absorption_n_splits") == {3: 1.25}
    assert summary.values("batchtopk", "absorption_recall_best_latent") == {3: 0.25}
    of_letter = summary.absorption["topk"][3]["metrics"]["absorption_by_letter"]["a"]
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
