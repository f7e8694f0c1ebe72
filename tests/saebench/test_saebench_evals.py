"""A new eval takes one file, here `bias_eval.py`, and one line in the table."""

import pytest

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from bias_eval import Bias
from eval_helpers import GIVEN, HOOK, TINY_LM
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lens_sampled.saebench import run_evals, write_report
from sae_lens_sampled.saebench.evals import EVALS


@pytest.fixture
def bias(monkeypatch):
    monkeypatch.setitem(EVALS, "bias", Bias)
    monkeypatch.setattr(Bias, "calls", [])
    return Bias


def sae_of_bias(largest):
    metadata = SAEMetadata(model_name=str(TINY_LM), hook_name=HOOK, prepend_bos=False)
    sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=64, metadata=metadata))
    sae.b_dec.data[3] = largest
    return sae


def test_another_eval_is_one_file_and_one_line_in_the_table(bias, tmp_path):
    saes = [("a_seed0", sae_of_bias(1.5)), ("a_seed1", sae_of_bias(2.5))]
    run = {**GIVEN, "output_dir": tmp_path}
    first = run_evals(saes, ["bias"], **run)
    assert {name: result["eval_result_metrics"]["bias"] for name, result in first["bias"].items()} == {
        "a_seed0_custom_sae": {"largest": 3.0},
        "a_seed1_custom_sae": {"largest": 5.0},
    }
    assert bias.calls == ["inputs", "prepare 2", "a_seed0_custom_sae", "a_seed1_custom_sae"]
    assert sorted(path.name for path in (tmp_path / "eval_results" / "bias").iterdir()) == [
        "a_seed0_custom_sae_eval_results.json",
        "a_seed1_custom_sae_eval_results.json",
    ]
    # Existing results are kept, and results with other settings or inputs are not replaced.
    bias.calls.clear()
    assert run_evals(saes, ["bias"], **run) == first
    assert bias.calls == ["inputs"]
    for changed in ({"overrides": {"bias": {"factor": 3.0}}}, {"seed": 7}):
        with pytest.raises(ValueError, match="does not match this config; choose another output_dir"):
            run_evals(saes, ["bias"], **{**run, **changed})
    again = run_evals(saes, ["bias"], **run, overrides={"bias": {"factor": 3.0}}, force_rerun=True)
    assert again["bias"]["a_seed1_custom_sae"]["eval_result_metrics"]["bias"]["largest"] == 7.5
    # The report names it.
    assert "- Evals: bias (2 SAEs)" in write_report(tmp_path).with_suffix(".md").read_text()


def test_settings_of_another_eval_are_checked_as_those_of_any(bias, tmp_path):
    with pytest.raises(
        ValueError, match=r"sets 'fcator', .* the fields of its configuration: \['factor', 'model_name'\]"
    ):
        run_evals([("a", sae_of_bias(1.0))], ["bias"], output_dir=tmp_path, overrides={"bias": {"fcator": 1}}, **GIVEN)


@pytest.mark.parametrize("name", list(EVALS))
def test_the_table_calls_an_eval_as_it_calls_itself(name):
    assert EVALS[name].name == name
