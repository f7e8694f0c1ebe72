"""Evals run on the model of training, loaded with the SAEs' `model_from_pretrained_kwargs`."""

import copy
import json
import shutil

import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

import sae_bench.evals.sparse_probing.main as sparse_probing
from eval_helpers import HOOK, TINY_LM, core_by_hand, exported, run_small
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sae_lens_sampled.cli import app
from sae_lens_sampled.saebench import load_saes, patches, write_report
from sae_lens_sampled.saebench.models import load_model

KWARGS = {"center_writing_weights": True, "fold_ln": True}


def with_kwargs(saes, kwargs, *names):
    """Copies of the SAEs called `names`, with `kwargs` as the `model_from_pretrained_kwargs` of their metadata."""
    copies = [(name, copy.deepcopy(dict(saes)[name])) for name in names]
    for _, sae in copies:
        sae.cfg.metadata.model_from_pretrained_kwargs = dict(kwargs)
    return copies


def stamp(result):
    return result["sae_cfg_dict"]["sae_lens_sampled"]["model"]


@pytest.mark.parametrize("kwargs", [KWARGS, {"center_writing_weights": True}], ids=str)
def test_core_is_that_of_sae_bench_which_takes_the_kwargs(kwargs, saes, results, tmp_path):
    trained = with_kwargs(saes, kwargs, "sampled_seed0")
    want = core_by_hand("sampled_seed0", exported(trained, "sampled_seed0"), tmp_path / "by_hand")
    [got] = run_small(trained, ["core"], tmp_path / "ours")["core"].values()
    assert got["eval_result_metrics"] == want["eval_result_metrics"]
    assert got["eval_result_details"] == want["eval_result_details"]
    plain = results["core"]["sampled_seed0_custom_sae"]
    assert got["eval_result_metrics"]["sparsity"] != plain["eval_result_metrics"]["sparsity"]
    assert got["sae_cfg_dict"]["metadata"]["model_from_pretrained_kwargs"] == dict(sorted(kwargs.items()))
    assert stamp(got) != stamp(plain)


def test_sparse_probing_and_absorption_get_this_model_too(saes, tmp_path, monkeypatch):
    """SAEBench's own code loads the model by its name alone."""
    trained, asked = with_kwargs(saes, KWARGS, "sampled_seed0"), []
    run_eval = sparse_probing.run_eval

    def spy(*args, **fields):
        model = sparse_probing.HookedTransformer.from_pretrained_no_processing("tiny_lm", device="cpu")
        asked.append(model.blocks[2].mlp.W_out.mean(dim=-1).abs().max().item())
        return run_eval(*args, **fields)

    monkeypatch.setattr(sparse_probing, "run_eval", spy)
    results = run_small(trained, ["sparse_probing"], tmp_path)["sparse_probing"]
    assert asked[0] < 1e-6  # centred
    [result] = results.values()
    want = load_model(TINY_LM, kwargs=KWARGS)
    assert stamp(result) == want.fingerprint
    with patches.model_in_memory(want.hooked):  # the call that absorption makes
        assert sparse_probing.HookedTransformer.from_pretrained_no_processing("tiny_lm") is want.hooked


def test_a_result_of_other_kwargs_is_not_taken_for_this_one(saes, tmp_path):
    run_small(with_kwargs(saes, {}, "sampled_seed0"), ["core"], tmp_path)
    with pytest.raises(ValueError, match="holds a result that does not match this sae and model"):
        run_small(with_kwargs(saes, KWARGS, "sampled_seed0"), ["core"], tmp_path)
    with pytest.raises(ValueError, match="holds a result that does not match this model;"):
        run_small(with_kwargs(saes, {}, "sampled_seed0"), ["core"], tmp_path, model_kwargs=KWARGS)


def test_kwargs_given_stand_in_for_those_of_training(saes, tmp_path):
    trained = with_kwargs(saes, KWARGS, "sampled_seed0")
    [got] = run_small(trained, ["core"], tmp_path, model_kwargs={})["core"].values()
    assert stamp(got) == load_model(TINY_LM).fingerprint


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
def test_the_type_is_that_of_training(argument, saes, tmp_path):
    trained = with_kwargs(saes, {argument: "bfloat16"}, "sampled_seed0")
    [got] = run_small(trained, ["core"], tmp_path)["core"].values()
    assert got["eval_config"]["llm_dtype"] == "bfloat16"
    want = core_by_hand("one", exported(saes, "sampled_seed0"), tmp_path / "by_hand", dtype="bfloat16")
    assert got["eval_result_metrics"] == want["eval_result_metrics"]


@pytest.mark.parametrize("evals", [["core"], ["mmcs"]], ids=str)
def test_saes_of_two_models_are_refused(evals, saes, tmp_path):
    trained = with_kwargs(saes, KWARGS, "sampled_seed0") + with_kwargs(saes, {}, "sampled_seed1")
    message = r"'sampled_seed1_custom_sae' was trained on a model with model_from_pretrained_kwargs=\{\}, but 'sampled_"
    with pytest.raises(ValueError, match=message):
        run_small(trained, evals, tmp_path)


def test_the_mmcs_command_refuses_what_the_eval_refuses(saes, tmp_path):
    folders = {}
    for name, sae in with_kwargs(saes, KWARGS, "sampled_seed0") + with_kwargs(saes, {}, "sampled_seed1"):
        sae.save_model(folders.setdefault(name, tmp_path / name))
    other_place = copy.deepcopy(dict(saes)["sampled_seed0"])
    other_place.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    other_place.save_model(tmp_path / "place")
    other_model = copy.deepcopy(dict(saes)["sampled_seed0"])
    other_model.cfg.metadata.model_name = "gpt2"
    other_model.save_model(tmp_path / "gpt2")
    other_model.cfg.metadata.model_name = "gpt2-small"  # TransformerLens' other name of gpt2
    other_model.save_model(tmp_path / "alias")
    assert CliRunner().invoke(app, ["mmcs", str(tmp_path / "gpt2"), str(tmp_path / "alias")]).exit_code == 0
    for pair, message in (
        (["sampled_seed0", "sampled_seed1"], "model_from_pretrained_kwargs={}, but"),
        (["sampled_seed1", "place"], "'place_custom_sae' has hook_name='blocks.1.hook_resid_post', but"),
        (["sampled_seed1", "gpt2"], "dictionaries of different models have nothing in common"),
    ):
        result = CliRunner().invoke(app, ["mmcs", *(str(tmp_path / name) for name in pair)])
        assert result.exit_code == 1
        assert message in result.output


def test_the_model_of_a_subfolder(saes, tmp_path):
    folder = tmp_path / "two"
    shutil.copytree(TINY_LM, folder, ignore=shutil.ignore_patterns("text", "model.safetensors", "config.json"))
    model = AutoModelForCausalLM.from_pretrained(TINY_LM)
    model.gpt_neox.layers[2].mlp.dense_4h_to_h.weight.data *= 0.5
    model.save_pretrained(folder / "step1000")
    loaded = load_model(folder, kwargs={"subfolder": "step1000"})
    tokens = torch.arange(20)[None]
    want = model(tokens, output_hidden_states=True).hidden_states[3]
    got = loaded.hooked.run_with_cache(tokens, names_filter=[HOOK])[1][HOOK]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"model folder .*two' has no config.json; it must be in Hugging Face format"):
        load_model(folder)


def test_the_report_names_the_model_with_its_kwargs(saes, tmp_path):
    run_small(with_kwargs(saes, KWARGS, "sampled_seed0"), ["core"], tmp_path)
    text = write_report(tmp_path).with_suffix(".md").read_text()
    assert "tiny_lm (center_writing_weights=True, fold_ln=True)" in text
    assert "pad, bos and eos tokens are left out" in text


def test_a_source_as_on_a_command_line_keeps_its_kwargs(saes, tmp_path):
    [(_, sae)] = with_kwargs(saes, KWARGS, "sampled_seed0")
    sae.save_inference_model(tmp_path / "sae")
    [loaded] = load_saes([tmp_path / "sae"])
    assert loaded.sae.cfg.metadata.model_from_pretrained_kwargs == KWARGS
    assert json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]["model_from_pretrained_kwargs"] == KWARGS
