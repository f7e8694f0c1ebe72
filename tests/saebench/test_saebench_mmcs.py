from dataclasses import asdict
from statistics import fmean
from types import SimpleNamespace

import pytest

pytest.importorskip("sae_bench")

import torch
from helpers import D_IN, D_SAE, sampled_sae
from pydantic import TypeAdapter

import sae_lens_sampled.saebench.evals.mmcs
from sae_lens_sampled import to_jumprelu
from sae_lens_sampled.saebench import load_saes
from sae_lens_sampled.saebench.evals.mmcs import (
    CATEGORIES,
    Mmcs,
    MmcsEvalConfig,
    MmcsEvalOutput,
    check_alike,
    compare_all,
)
from sae_lens_sampled.saebench.results import result_path, write_result
from sae_lens_sampled.similarity import dictionary_similarity, random_baseline

NAMES = ["a_seed1_custom_sae", "a_seed2_custom_sae", "a_seed3_custom_sae"]
DIRECTIONS = {"decoder": lambda sae: sae.W_dec, "encoder": lambda sae: sae.W_enc.T}


def seed_of(number, hook_name="blocks.1.hook_resid_post", **fields):
    """An SAE whose weights are one third its own noise, and two thirds common to all seeds."""
    sae = sampled_sae(**fields)
    generator = torch.Generator().manual_seed(number)
    for parameter in (sae.W_dec, sae.W_enc):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    exported = to_jumprelu(sae)
    exported.cfg.metadata.hook_name = hook_name
    exported.cfg.metadata.model_name = "tiny"
    return exported


def three_seeds():
    return [(f"a_seed{number}", seed_of(number)) for number in (1, 2, 3)]


def evaluate(saes, config=None, densities=None):
    outputs = compare_all(load_saes(saes), config or MmcsEvalConfig(model_name="tiny"), "cpu", densities or {})
    return {name: asdict(output) for name, output in outputs.items()}


def metrics_of(result, part="decoder"):
    return result["eval_result_metrics"][part]


def test_every_field_of_the_result_has_a_title_and_a_description():
    definitions = TypeAdapter(MmcsEvalOutput).json_schema()["$defs"]
    for definition in definitions.values():
        for name, field in definition["properties"].items():
            assert field.get("title"), name
            assert field.get("description"), name


def test_results_are_of_the_schema():
    results = evaluate(three_seeds())
    assert list(results) == NAMES
    for name, result in results.items():
        assert asdict(TypeAdapter(MmcsEvalOutput).validate_python(result)) == result
        assert (result["eval_type_id"], result["sae_cfg_dict"]["d_sae"]) == ("mmcs", D_SAE)
        assert f"{result['sae_lens_release_id']}_{result['sae_lens_id']}" == name


def test_details_are_the_similarities_and_metrics_their_mean():
    saes = three_seeds()
    results = evaluate(saes)
    weights = {name: sae for name, (_, sae) in zip(NAMES, saes, strict=True)}
    for name, result in results.items():
        details = result["eval_result_details"]
        assert [detail["partner"] for detail in details] == [other for other in NAMES if other != name]
        for part, rows in DIRECTIONS.items():
            for detail in details:
                want = dictionary_similarity(rows(weights[name]), rows(weights[detail["partner"]]))
                for category, one_way in ((part, want.forward), (f"{part}_reverse", want.backward)):
                    assert detail[category] == pytest.approx(one_way._asdict() | {"matched": want.matched}, abs=1e-6)
                assert set(detail[f"live_{part}"].values()) == {None}
        for category in CATEGORIES:
            for field, value in metrics_of(result, category).items():
                values = [detail[category][field] for detail in details]
                assert value == (None if category.startswith("live_") else pytest.approx(fmean(values)))
        assert result["eval_result_metrics"]["partners"] == {
            "n_partners": 2,
            "partners_of_same_group": True,
            "n_live": None,
        }
    # The parts differ, so mixing them up would be noticed.
    assert metrics_of(results[NAMES[0]], "decoder")["mmcs"] != metrics_of(results[NAMES[0]], "encoder")["mmcs"]


def test_every_pair_is_compared_once(monkeypatch):
    compared = []

    def compare(a, b, match_max_latents, signed):
        compared.append((a, b))
        return dictionary_similarity(a, b, match_max_latents, signed)

    monkeypatch.setattr(sae_lens_sampled.saebench.evals.mmcs, "dictionary_similarity", compare)
    evaluate(three_seeds())
    assert len(compared) == 2 * 3  # decoder and encoder of every pair


def test_copies_of_an_sae_score_one():
    result = evaluate([("a", seed_of(1)), ("b", seed_of(1))])["a_custom_sae"]
    for part in DIRECTIONS:
        for category in (part, f"{part}_reverse"):
            for field in ("mmcs", "mmcs_absolute", "share_above_0_9", "matched"):
                assert metrics_of(result, category)[field] == pytest.approx(1, abs=1e-6)
    assert metrics_of(result)["baseline"] == random_baseline(D_SAE, D_IN, absolute=False)


def test_means_are_over_the_group_and_over_all_for_an_sae_alone_in_its_own():
    names = ["k3_seed0", "k5_seed0", "k3_seed1"]
    results = evaluate([(name, seed_of(number)) for number, name in enumerate(names)])
    results = [results[f"{name}_custom_sae"] for name in names]
    details = [result["eval_result_details"] for result in results]
    assert [detail["same_group"] for detail in details[0]] == [False, True]
    assert metrics_of(results[0]) == details[0][1]["decoder"]
    mean = fmean(detail["decoder"]["mmcs"] for detail in details[1])
    assert metrics_of(results[1])["mmcs"] == pytest.approx(mean)
    partners = [metrics_of(result, "partners") for result in results]
    assert [(metrics["n_partners"], metrics["partners_of_same_group"]) for metrics in partners] == [
        (1, True),
        (2, False),
        (1, True),
    ]


def test_live_metrics_are_those_of_the_live_rows_of_both():
    saes = three_seeds()
    torch.manual_seed(5)
    densities = {name: torch.rand(D_SAE).tolist() for name in NAMES}
    results = evaluate(saes, MmcsEvalConfig(live_density=0.4), densities)
    live = [torch.tensor(densities[name]) > 0.4 for name in NAMES]
    detail = results[NAMES[0]]["eval_result_details"][1]
    for part, rows in DIRECTIONS.items():
        want = dictionary_similarity(rows(saes[0][1])[live[0]], rows(saes[2][1])[live[2]])
        for category, one_way in ((f"live_{part}", want.forward), (f"live_{part}_reverse", want.backward)):
            assert detail[category] == pytest.approx(one_way._asdict() | {"matched": want.matched})
        assert detail[f"live_{part}"]["mmcs"] != detail[part]["mmcs"]
    assert [metrics_of(results[name], "partners")["n_live"] for name in NAMES] == [int(mask.sum()) for mask in live]


@pytest.mark.parametrize(("density", "known"), [(0.25, [0.25, 0.0]), (-1, None)])
def test_densities_that_core_did_not_compute_are_unknown(density, known, tmp_path):
    [sae] = load_saes([("a", seed_of(1))])
    setup = SimpleNamespace(output_dir=tmp_path, model=SimpleNamespace(name="tiny", fingerprint="m"))
    result = {
        "eval_type_id": "core",
        "sae_cfg_dict": {},
        "eval_result_metrics": {},
        "eval_result_details": [{"feature_density": x} for x in (density, 0.0)],
    }
    stamp = {"sae": sae.fingerprint, "model": "m"}
    write_result(result_path(tmp_path, "core", sae), result, sae, stamp)
    assert Mmcs(setup, {}).inputs([sae])["densities"] == {"a_custom_sae": known}


def test_with_all_latents_live_the_live_metrics_are_the_others():
    results = evaluate(three_seeds(), densities={name: [0.1] * D_SAE for name in NAMES})
    for category in (name for name in CATEGORIES if not name.startswith("live_")):
        assert metrics_of(results[NAMES[0]], f"live_{category}") == metrics_of(results[NAMES[0]], category)


def test_an_sae_without_live_latents_is_left_out_of_the_live_means():
    densities = {NAMES[0]: [0.1] * D_SAE, NAMES[1]: [0.0] * D_SAE, NAMES[2]: [0.1] * D_SAE}
    results = evaluate(three_seeds(), densities=densities)
    assert metrics_of(results[NAMES[1]], "live_decoder")["mmcs"] is None
    assert metrics_of(results[NAMES[1]], "partners")["n_live"] == 0
    with_third = results[NAMES[0]]["eval_result_details"][1]
    assert metrics_of(results[NAMES[0]], "live_decoder") == with_third["live_decoder"] == with_third["decoder"]


def test_saes_above_match_max_latents_are_not_matched():
    for limit, matched in ((D_SAE, True), (D_SAE - 1, False)):
        results = evaluate(three_seeds(), MmcsEvalConfig(match_max_latents=limit))
        assert (metrics_of(results[NAMES[0]])["matched"] is not None) == matched


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_sae": 24}, r"^'b_custom_sae' has d_sae=24, but 'a_custom_sae' has d_sae=40; compare"),
        ({"d_in": 9}, r"^'b_custom_sae' has d_in=9, but 'a_custom_sae' has d_in=12; compare"),
        (
            {"hook_name": "blocks.2.hook_z"},
            r"^'b_custom_sae' has hook_name='blocks.2.hook_z', but 'a_custom_sae' has "
            r"hook_name='blocks.1.hook_resid_post'; compare only SAEs of the same width, hook and head\.$",
        ),
    ],
)
def test_incomparable_saes_are_reported_in_one_sentence(fields, message):
    check_alike(load_saes([("a", seed_of(1)), ("b", seed_of(2))]))
    with pytest.raises(ValueError, match=message):
        check_alike(load_saes([("a", seed_of(1)), ("b", seed_of(2, **fields))]))
