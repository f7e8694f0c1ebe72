import json
import logging
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import pytest

pytest.importorskip("sae_bench")

import sae_lens_sampled.saebench.mmcs.main
import torch
from helpers import D_IN, D_SAE, sampled_sae
from pydantic import TypeAdapter
from sae_bench.sae_bench_utils.graphing_utils import find_eval_results_files
from sae_lens import SAE
from sae_lens_sampled.saebench.mmcs.eval_config import MmcsEvalConfig
from sae_lens_sampled.saebench.mmcs.eval_output import EVAL_TYPE_ID_MMCS, MmcsEvalOutput
from sae_lens_sampled.saebench.mmcs.main import check_alike, main, run_eval

from sae_lens_sampled import to_jumprelu
from sae_lens_sampled.dictionary_similarity import dictionary_similarity, random_baseline

NAMES = ["a_custom_sae", "b_custom_sae", "c_custom_sae"]


def seed_of(number, hook_name="blocks.1.hook_resid_post", **fields):
    """An SAE whose weights are a third noise of its own, two thirds common to all."""
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
    return [("a", seed_of(1)), ("b", seed_of(2)), ("c", seed_of(3))]


def evaluate(saes, folder, config=None, **arguments):
    return run_eval(config or MmcsEvalConfig(model_name="tiny"), saes, "cpu", str(folder), **arguments)


def metrics_of(result, part="decoder"):
    return result["eval_result_metrics"][part]


def test_schema_is_the_one_that_saebench_generates():
    schema = Path(sae_lens_sampled.saebench.mmcs.main.__file__).parent / f"eval_output_schema_{EVAL_TYPE_ID_MMCS}.json"
    assert json.loads(schema.read_text()) == TypeAdapter(MmcsEvalOutput).json_schema()


def test_every_field_of_the_result_has_a_title_and_a_description():
    definitions = TypeAdapter(MmcsEvalOutput).json_schema()["$defs"]
    for definition in definitions.values():
        for name, field in definition["properties"].items():
            assert field.get("title"), name
            assert field.get("description"), name


def test_result_files_are_found_by_saebench_and_are_of_the_schema(tmp_path):
    results = evaluate(three_seeds(), tmp_path)
    assert list(results) == NAMES
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}_eval_results.json" for name in NAMES]
    for file in map(Path, find_eval_results_files([str(tmp_path)])):
        written = json.loads(file.read_text())
        assert asdict(TypeAdapter(MmcsEvalOutput).validate_python(written)) == written
        assert written == json.loads(json.dumps(results[file.name.removesuffix("_eval_results.json")]))
        assert written["eval_type_id"] == "mmcs"
        assert written["sae_cfg_dict"]["d_sae"] == D_SAE


def test_details_are_the_similarities_and_metrics_their_mean(tmp_path):
    saes = three_seeds()
    results = evaluate(saes, tmp_path)
    weights = {name: {"decoder": sae.W_dec, "encoder": sae.W_enc.T} for name, (_, sae) in zip(NAMES, saes, strict=True)}
    for name, result in results.items():
        details = result["eval_result_details"]
        assert [detail["partner"] for detail in details] == [other for other in NAMES if other != name]
        for part in ("decoder", "encoder"):
            for detail in details:
                want = dictionary_similarity(weights[name][part], weights[detail["partner"]][part])
                found = detail[part]
                assert [found[field] for field in want.forward._fields] == pytest.approx(want.forward, abs=1e-6)
                reverse = [found[f"{field}_reverse"] for field in want.backward._fields]
                assert reverse == pytest.approx(want.backward, abs=1e-6)
                assert found["matched"] == pytest.approx(want.matched, abs=1e-6)
                assert found["live_mmcs"] is None
            for field, value in metrics_of(result, part).items():
                if not field.startswith("live_"):
                    assert value == pytest.approx(fmean(detail[part][field] for detail in details))
        assert result["eval_result_metrics"]["partners"] == {
            "n_partners": 2,
            "partners_of_same_group": True,
            "n_live": None,
        }
    # The parts differ, so that neither can pass for the other.
    assert metrics_of(results[NAMES[0]], "decoder")["mmcs"] != metrics_of(results[NAMES[0]], "encoder")["mmcs"]


def test_copies_of_an_sae_score_one(tmp_path):
    result = evaluate([("a", seed_of(1)), ("b", seed_of(1))], tmp_path)[NAMES[0]]
    for part in ("decoder", "encoder"):
        for field in ("mmcs", "mmcs_reverse", "mmcs_absolute", "share_above_0_9", "matched"):
            assert metrics_of(result, part)[field] == pytest.approx(1, abs=1e-6)
    assert metrics_of(result)["baseline"] == random_baseline(D_SAE, D_IN, absolute=False)


def test_means_are_over_the_group_and_over_all_for_an_sae_alone_in_its_own(tmp_path):
    groups = {NAMES[0]: "k=3", NAMES[1]: "k=5", NAMES[2]: "k=3"}
    results = evaluate(three_seeds(), tmp_path, groups=groups)
    details = {name: result["eval_result_details"] for name, result in results.items()}
    assert [detail["same_group"] for detail in details[NAMES[0]]] == [False, True]
    assert metrics_of(results[NAMES[0]]) == details[NAMES[0]][1]["decoder"]
    mean = fmean(detail["decoder"]["mmcs"] for detail in details[NAMES[1]])
    assert metrics_of(results[NAMES[1]])["mmcs"] == pytest.approx(mean)
    partners = [metrics_of(results[name], "partners") for name in NAMES]
    assert [(one["n_partners"], one["partners_of_same_group"]) for one in partners] == [
        (1, True),
        (2, False),
        (1, True),
    ]


def test_live_metrics_are_those_of_the_live_rows_of_both(tmp_path):
    saes = three_seeds()
    torch.manual_seed(5)
    densities = {name: torch.rand(D_SAE).tolist() for name in NAMES}
    config = MmcsEvalConfig(live_density=0.4)
    results = evaluate(saes, tmp_path, config, densities=densities)
    live = [torch.tensor(densities[name]) > 0.4 for name in NAMES]
    want = dictionary_similarity(saes[0][1].W_enc.T[live[0]], saes[2][1].W_enc.T[live[2]])
    found = results[NAMES[0]]["eval_result_details"][1]["encoder"]
    assert [found[f"live_{field}"] for field in want.forward._fields] == pytest.approx(want.forward)
    assert [found[f"live_{field}_reverse"] for field in want.backward._fields] == pytest.approx(want.backward)
    assert found["live_matched"] == pytest.approx(want.matched)
    assert found["live_mmcs"] != found["mmcs"]
    assert [metrics_of(results[name], "partners")["n_live"] for name in NAMES] == [int(mask.sum()) for mask in live]


def test_with_all_latents_live_the_live_metrics_are_the_others(tmp_path):
    results = evaluate(three_seeds(), tmp_path, densities={name: [0.1] * D_SAE for name in NAMES})
    metrics = metrics_of(results[NAMES[0]])
    assert all(metrics[f"live_{field}"] == value for field, value in metrics.items() if not field.startswith("live_"))


def test_an_sae_without_live_latents_is_left_out_of_the_live_means(tmp_path):
    densities = {NAMES[0]: [0.1] * D_SAE, NAMES[1]: [0.0] * D_SAE, NAMES[2]: [0.1] * D_SAE}
    results = evaluate(three_seeds(), tmp_path, densities=densities)
    assert metrics_of(results[NAMES[1]])["live_mmcs"] is None
    assert metrics_of(results[NAMES[1]], "partners")["n_live"] == 0
    with_c = results[NAMES[0]]["eval_result_details"][1]["decoder"]
    assert metrics_of(results[NAMES[0]])["live_mmcs"] == with_c["live_mmcs"] == with_c["mmcs"]


def test_saes_above_match_max_latents_are_not_matched(tmp_path):
    for limit, matched in ((D_SAE, True), (D_SAE - 1, False)):
        config = MmcsEvalConfig(match_max_latents=limit)
        results = evaluate(three_seeds(), tmp_path, config, force_rerun=True)
        assert (metrics_of(results[NAMES[0]])["matched"] is not None) == matched


def test_existing_results_are_kept_unless_rerun_is_forced(tmp_path, monkeypatch, caplog):
    compared = []

    def compare(a, b, match_max_latents):
        compared.append((a, b))
        return dictionary_similarity(a, b, match_max_latents)

    monkeypatch.setattr(sae_lens_sampled.saebench.mmcs.main, "dictionary_similarity", compare)
    first = evaluate(three_seeds(), tmp_path)
    assert len(compared) == 2 * 3  # decoder and encoder of every pair, once
    (tmp_path / f"{NAMES[1]}_eval_results.json").unlink()
    with caplog.at_level(logging.INFO):
        again = evaluate(three_seeds(), tmp_path)
    assert len(compared) == 2 * (3 + 2)
    assert caplog.messages == [f"Skipping {name} as results already exist" for name in (NAMES[0], NAMES[2])]
    assert list(again) == [NAMES[1]]
    assert again[NAMES[1]]["eval_result_metrics"] == first[NAMES[1]]["eval_result_metrics"]
    assert evaluate(three_seeds(), tmp_path) == {}
    assert len(compared) == 2 * (3 + 2)
    forced = evaluate(three_seeds(), tmp_path, force_rerun=True)
    written = json.loads((tmp_path / f"{NAMES[0]}_eval_results.json").read_text())
    assert written["eval_id"] == forced[NAMES[0]]["eval_id"] != first[NAMES[0]]["eval_id"]


def test_what_is_finished_when_a_run_breaks_off_stays_and_nothing_half_written_does(tmp_path, monkeypatch):
    to_json_file = MmcsEvalOutput.to_json_file

    def break_at_b(self, file_path, indent=2):
        to_json_file(self, file_path, indent)
        if self.sae_lens_release_id == "b":
            Path(file_path).write_text("{half")
            raise KeyboardInterrupt

    monkeypatch.setattr(MmcsEvalOutput, "to_json_file", break_at_b)
    with pytest.raises(KeyboardInterrupt):
        evaluate(three_seeds(), tmp_path)
    (finished,) = tmp_path.iterdir()
    assert finished.name == f"{NAMES[0]}_eval_results.json"
    assert len(json.loads(finished.read_text())["eval_result_details"]) == 2
    monkeypatch.undo()
    assert list(evaluate(three_seeds(), tmp_path)) == NAMES[1:]


def test_what_cannot_be_compared_is_told_in_one_sentence(tmp_path):
    a, b = three_seeds()[:2]
    for saes, message in (
        ([], r"^selected_saes has 0 SAEs; MMCS compares SAEs, so pass at least 2\.$"),
        ([a], r"^selected_saes has 1 SAEs; MMCS compares SAEs, so pass at least 2\.$"),
        ([a, a], r"^two of selected_saes are called 'a_custom_sae'; give them different names\.$"),
        ([a, ("d", seed_of(4, d_sae=24))], r"^'d_custom_sae' has d_sae=24, but 'a_custom_sae' has d_sae=40; run"),
        ([a, ("d", seed_of(4, d_in=9))], r"^'d_custom_sae' has d_in=9, but 'a_custom_sae' has d_in=12; run"),
        (
            [a, b, ("d", seed_of(4, hook_name="blocks.2.hook_z"))],
            r"^'d_custom_sae' has hook_name='blocks.2.hook_z', but 'a_custom_sae' has "
            r"hook_name='blocks.1.hook_resid_post'; run the eval on SAEs of one width and one hook at a time\.$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(saes, tmp_path)
    with pytest.raises(ValueError, match=r"^groups is for the SAEs \['a'\], but selected_saes are \['a_custom_sae', "):
        evaluate([a, b], tmp_path, groups={"a": "seeds"})
    with pytest.raises(ValueError, match=r"^densities is for the SAEs \['a_custom_sae'\], but selected_saes are"):
        evaluate([a, b], tmp_path, densities={NAMES[0]: [0.0] * D_SAE})
    with pytest.raises(
        ValueError, match=r"^densities\['b_custom_sae'\] has 39 entries; it needs one per latent, 40\.$"
    ):
        evaluate([a, b], tmp_path, densities={NAMES[0]: [0.0] * D_SAE, NAMES[1]: [0.0] * (D_SAE - 1)})
    assert list(tmp_path.iterdir()) == []


def test_saes_are_checked_before_saebench_has_seen_them():
    check_alike(["a", "b"], [seed_of(1), seed_of(2)])
    with pytest.raises(ValueError, match=r"^'b' has hook_name='elsewhere', but 'a' has hook_name="):
        check_alike(["a", "b"], [seed_of(1), seed_of(2, hook_name="elsewhere")])


def test_command_line_runs_the_saes_of_the_patterns(tmp_path, monkeypatch):
    saes = {"seed/1": seed_of(1), "seed/2": seed_of(2)}
    module = sae_lens_sampled.saebench.mmcs.main
    patterns = []

    def select(*given):
        patterns.append(given)
        return [("user/repo", sae_id) for sae_id in saes]

    monkeypatch.setattr(module, "get_saes_from_regex", select)
    monkeypatch.setattr(
        SAE, "from_pretrained_with_cfg_and_sparsity", lambda release, sae_id, device: (saes[sae_id], {}, None)
    )
    monkeypatch.setattr(module.general_utils, "setup_environment", lambda: "cpu")
    flags = ["--model_name", "tiny", "--sae_regex_pattern", "user/.*", "--sae_block_pattern", "seed.*"]
    main([*flags, "--match_max_latents", "8", "--output_folder", str(tmp_path / "mmcs")])
    assert patterns == [("user/.*", "seed.*")]
    written = json.loads((tmp_path / "mmcs" / "user_repo_seed_1_eval_results.json").read_text())
    assert (written["sae_lens_release_id"], written["sae_lens_id"]) == ("user/repo", "seed/1")
    assert written["eval_config"] == {"model_name": "tiny", "live_density": 0.0, "match_max_latents": 8}
    assert written["eval_result_details"][0]["partner"] == "user_repo_seed_2"


def test_the_package_and_the_similarity_do_not_import_saebench():
    code = "import sys, sae_lens_sampled.dictionary_similarity; print('sae_bench' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
