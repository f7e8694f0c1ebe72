"""`run_evals` end to end, on SAEs of all architectures, against SAEBench called by hand."""

import copy
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

import sae_bench
import sae_bench.evals.absorption.main as absorption
import sae_bench.evals.core.main as core
import sae_bench.evals.sparse_probing.main as sparse_probing
from eval_helpers import ALL, D_SAE, EXAMPLES, HOOK, KINDS, PROBING, SMALL, TINY_LM, core_by_hand, official, trained_sae
from sae_bench.sae_bench_utils import dataset_info, dataset_utils, graphing_utils
from transformer_lens import HookedTransformer

from sae_lens_sampled.metrics import fraction_of_variance_unexplained
from sae_lens_sampled.saebench import EvalError, load_probing_dataset, load_saes, patches, run_evals
from sae_lens_sampled.saebench.evals import EVALS
from sae_lens_sampled.saebench.models import load_model

GIVEN = {"model": TINY_LM, "text": TINY_LM / "text", "probing_datasets": [PROBING], "show_progress": False}


@pytest.fixture(scope="module")
def activations():
    model = load_model(TINY_LM).hooked
    lines = (TINY_LM / "text" / "train.jsonl").read_text().splitlines()[:40]
    ids = model.tokenizer("".join(json.loads(line)["text"] for line in lines), verbose=False)["input_ids"]
    tokens = torch.tensor(ids[: 96 * 100]).view(100, 96)
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[HOOK])[1][HOOK].flatten(end_dim=1)


@pytest.fixture(scope="module")
def saes(activations):
    """Two seeds of ours as training SAEs, and one of each standard architecture as SAELens exports them."""
    ours = [(f"sampled_seed{seed}", trained_sae("sampled_topk", seed, activations)) for seed in (0, 1)]
    others = [(kind, trained_sae(kind, 0, activations)) for kind in KINDS if kind != "sampled_topk"]
    return ours + others


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def results(saes, output_dir):
    return run_evals(saes, ALL, output_dir=output_dir, overrides=SMALL, **GIVEN)


def run_small(saes, evals, output_dir, **fields):
    overrides = {name: SMALL[name] for name in evals}
    return run_evals(saes, evals, output_dir=output_dir, **{**GIVEN, "overrides": overrides, **fields})


def exported(saes, name):
    """A fresh copy of the SAE that SAEBench gets, with the model's path for its name, as by hand it would need."""
    [one] = load_saes([pair for pair in saes if pair[0] == name])
    one.sae.cfg.metadata.model_name = str(TINY_LM)
    return one.sae


def test_every_architecture_has_every_result_under_its_own_class(results, saes, output_dir):
    for eval_name in ALL:
        assert set(results[eval_name]) == {f"{name}_custom_sae" for name, _ in saes}
        for name, sae in saes:
            file = output_dir / "eval_results" / eval_name / f"{name}_custom_sae_eval_results.json"
            result = json.loads(file.read_text())
            assert result == results[eval_name][f"{name}_custom_sae"]
            assert (result["sae_lens_release_id"], result["sae_lens_id"]) == (name, "custom_sae")
            assert result["sae_cfg_dict"]["architecture"] == sae.cfg.architecture()
            assert result["eval_config"]["model_name"] == "tiny_lm"


def test_sae_bench_itself_reads_the_results(results, saes, output_dir):
    for eval_name, prefix in (("core", "ce_loss_score"), ("sparse_probing", "sae_top_1"), ("absorption", "mean_full")):
        folder = str(output_dir / "eval_results" / eval_name)
        files = graphing_utils.find_eval_results_files([folder])
        read = graphing_utils.get_core_results(files) if eval_name == "core" else None
        read = read if read is not None else graphing_utils.get_eval_results(files)
        assert len(read) == len(saes)
        for name, sae in saes:
            one = read[f"{name}_custom_sae"]
            assert any(key.startswith(prefix) for key in one), one
            assert eval_name == "core" or one["sae_class"] == sae.cfg.architecture()


@pytest.mark.parametrize("name", ["sampled_seed0", "gated", "topk"])
def test_core_is_what_sae_bench_gives_by_hand(results, saes, name, tmp_path):
    want = core_by_hand(name, exported(saes, name), tmp_path)
    got = results["core"][f"{name}_custom_sae"]
    assert got["eval_result_metrics"] == want["eval_result_metrics"]
    assert got["eval_result_details"] == want["eval_result_details"]


def test_core_is_that_of_sae_bench_in_bfloat16_too(saes, tmp_path):
    want = core_by_hand("one", exported(saes, "sampled_seed0"), tmp_path / "by_hand", dtype="bfloat16")
    [got] = run_small(saes[:1], ["core"], tmp_path / "ours", dtype="bfloat16")["core"].values()
    assert got["eval_result_metrics"] == want["eval_result_metrics"]


@pytest.mark.parametrize("name", ["sampled_seed0", "jumprelu"])
def test_sparse_probing_is_what_sae_bench_gives_by_hand(results, saes, name, tmp_path, monkeypatch):
    small = SMALL["sparse_probing"]
    texts = load_probing_dataset(PROBING).split(small["probe_train_set_size"], small["probe_test_set_size"], 42)
    monkeypatch.setattr(dataset_utils, "get_multi_label_train_test_data", lambda *_args: texts)
    monkeypatch.setitem(dataset_info.chosen_classes_per_dataset, "polarity", ["negative", "positive"])
    with official(TINY_LM) as model_name:
        config = sparse_probing.SparseProbingEvalConfig(
            model_name=model_name, dataset_names=["polarity"], llm_dtype="float32", llm_batch_size=32, **small
        )
        with patches.no_shape_checks():
            sparse_probing.run_eval(
                config, [(name, exported(saes, name))], "cpu", str(tmp_path), save_activations=False, force_rerun=True
            )
    want = json.loads((tmp_path / f"{name}_custom_sae_eval_results.json").read_text())
    got = results["sparse_probing"][f"{name}_custom_sae"]
    assert got["eval_result_metrics"] == want["eval_result_metrics"]
    accuracies = [
        {k: v for k, v in one["eval_result_details"][0].items() if k != "dataset_name"} for one in (got, want)
    ]
    assert accuracies[0] == accuracies[1]


@pytest.mark.parametrize("name", ["sampled_seed0", "topk"])
def test_absorption_is_what_sae_bench_gives_by_hand_on_the_same_probes(results, saes, name, output_dir, tmp_path):
    [probes] = (output_dir / "artifacts").glob("tiny_lm_*/absorption/probes_*")
    fields = SMALL["absorption"] | {"precalc_k_sparse_probe_sae_acts": True, "eval_k_sparse_probe_batch_size": 512}
    random.seed(42)
    np.random.seed(42)  # noqa: NPY002  as in SAEBench
    torch.manual_seed(42)
    model = load_model(TINY_LM).hooked
    config = absorption.AbsorptionEvalConfig(model_name="tiny_lm", llm_batch_size=32, **fields)
    with (
        patches.model_in_memory(model),
        patches.absorption_folders(probes, tmp_path / "work"),
        patches.ordered_vocabulary(),
        patches.working_directory(tmp_path),
    ):
        want = absorption.run_eval(config, [(name, exported(saes, name))], "cpu", str(tmp_path), force_rerun=True)
    [want] = want.values()
    got = results["absorption"][f"{name}_custom_sae"]
    assert got["eval_result_metrics"] == want["eval_result_metrics"]
    assert got["eval_result_details"] == want["eval_result_details"]


def test_fvu_is_that_of_the_definition_for_export_and_for_training(results, saes):
    small, training = SMALL["core"], dict(saes)["sampled_seed0"]
    model = load_model(TINY_LM).hooked
    store = core.ActivationsStore.from_sae(
        model, exported(saes, "sampled_seed0"), context_size=small["context_size"], dataset=str(TINY_LM / "text")
    )
    store.shuffle_input_dataset(seed=42)
    for _ in range(small["n_eval_reconstruction_batches"]):
        store.get_batch_tokens(small["batch_size_prompts"])
    store.reset_input_dataset()
    batches = []
    for _ in range(small["n_eval_sparsity_variance_batches"]):
        tokens = store.get_batch_tokens(small["batch_size_prompts"])
        special = torch.isin(tokens, torch.tensor([model.tokenizer.eos_token_id, model.tokenizer.pad_token_id]))
        batches.append(model.run_with_cache(tokens, names_filter=[HOOK])[1][HOOK][~special])
    extra = results["core"]["sampled_seed0_custom_sae"]["eval_result_unstructured"]
    with torch.no_grad():
        for one, got in ((exported(saes, "sampled_seed0"), extra["exported"]), (training, extra["in_training"])):
            acts = torch.cat([one.encode(batch) for batch in batches])
            x = torch.cat(batches)
            want = fraction_of_variance_unexplained(x, one.decode(acts)).item()
            assert got["fvu"] == pytest.approx(want, rel=1e-6)
            assert got["l0"] == pytest.approx((acts > 0).sum(dim=1).double().mean().item())
    assert extra["in_training"]["l0"] == pytest.approx(8, rel=1e-3) != extra["exported"]["l0"]
    assert 0 < extra["in_training"]["ce_loss_score"] < 1


def test_top_contexts_are_where_the_latent_is_largest(results):
    contexts = results["core"]["sampled_seed0_custom_sae"]["eval_result_unstructured"]["top_contexts"]
    assert 1 <= len(contexts) <= 8
    for one in contexts:
        values = [context["activation"] for context in one["contexts"]]
        assert values == sorted(values, reverse=True)
        assert min(values) > 0
        assert all(context["token"] for context in one["contexts"])


def test_seeds_are_partners_of_one_group_and_the_others_are_not(results):
    one = results["mmcs"]["sampled_seed0_custom_sae"]
    groups = {detail["partner"]: detail["same_group"] for detail in one["eval_result_details"]}
    assert groups == {
        "sampled_seed1_custom_sae": True,
        **{f"{kind}_custom_sae": False for kind in ("batchtopk", "topk", "jumprelu", "gated")},
    }


def test_the_model_runs_once_however_many_saes_there_are(saes, tmp_path, monkeypatch):
    calls = []
    forward = HookedTransformer.forward

    def counted(self, *args, start_at_layer=None, **fields):
        calls.append(start_at_layer)
        return forward(self, *args, start_at_layer=start_at_layer, **fields)

    monkeypatch.setattr(HookedTransformer, "forward", counted)
    whole_passes = []
    for n_saes in (1, 3):
        calls.clear()
        run_small([(f"{n_saes}_{i}", saes[i][1]) for i in range(n_saes)], ["core"], tmp_path)
        whole_passes.append(calls.count(None))
    small = SMALL["core"]
    want = 2 * small["n_eval_reconstruction_batches"] + small["n_eval_sparsity_variance_batches"]
    assert whole_passes == [want, want]


def test_results_that_exist_are_kept_and_others_are_added(results, saes, output_dir, monkeypatch):
    ran = []
    for name in ALL:
        original = EVALS[name].run

        def noted(config, sae, run, folder, original=original, name=name):
            ran.append((name, sae.name))
            return original(config, sae, run, folder)

        monkeypatch.setitem(EVALS, name, dataclasses.replace(EVALS[name], run=noted))
    again = run_evals(saes, ALL, output_dir=output_dir, overrides=SMALL, **GIVEN)
    assert ran == []
    assert again == results
    run_small([*saes[2:3], ("new", saes[0][1])], ["sparse_probing"], output_dir)
    assert ran == [("sparse_probing", "new_custom_sae")]
    ran.clear()
    run_small(saes[2:3], ["sparse_probing"], output_dir, force_rerun=True)
    assert ran == [("sparse_probing", "batchtopk_custom_sae")]


def test_results_of_another_sae_model_or_configuration_are_not_replaced(saes, tmp_path):
    run_small(saes[2:3], ["core"], tmp_path)
    for changed, other_saes, fields in (
        ("sae", [("batchtopk", saes[0][1])], {}),
        ("config", saes[2:3], {"overrides": {"core": SMALL["core"] | {"context_size": 40}}}),
    ):
        with pytest.raises(ValueError, match=rf"batchtopk_custom_sae_eval.*holds the result of another {changed}; "):
            run_small(other_saes, ["core"], tmp_path, **fields)


def test_a_half_written_result_is_no_result(saes, tmp_path):
    [first] = run_small(saes[2:3], ["core"], tmp_path)["core"].values()
    [file] = (tmp_path / "eval_results" / "core").iterdir()
    file.write_text(file.read_text()[:1000])
    [second] = run_small(saes[2:3], ["core"], tmp_path)["core"].values()
    assert second["eval_result_metrics"] == first["eval_result_metrics"]


KILLED = """
import sys, torch
from pathlib import Path
from unittest import mock
from sae_lens_sampled import load_checkpoint
from sae_lens_sampled.saebench import run_evals
sys.path.insert(0, {tests!r})
from eval_helpers import PROBING, SMALL, TINY_LM
run_evals([Path(path) for path in {folders!r}], ["core", "sparse_probing"], TINY_LM, {output!r}, text=TINY_LM / "text",
          probing_datasets=[PROBING], overrides={{name: SMALL[name] for name in ("core", "sparse_probing")}})
"""


def test_a_killed_run_goes_on_where_it_was(results, saes, tmp_path):
    folders = []
    for name, sae in saes[:3]:
        sae.save_model(tmp_path / name)
        folders.append(str(tmp_path / name))
    output = tmp_path / "out"
    script = KILLED.format(tests=str(Path(__file__).parent), folders=folders, output=str(output))
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(output.glob("eval_results/core/*.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    kept = {file: file.stat().st_mtime_ns for file in output.glob("eval_results/core/*.json")}
    got = run_small([Path(folder) for folder in folders], ["core", "sparse_probing"], output)
    assert all(file.stat().st_mtime_ns == before for file, before in kept.items())
    assert not list((output / "artifacts").glob("unfinished*"))
    for eval_name, by_name in got.items():
        for name, one in by_name.items():
            assert one["eval_result_metrics"] == results[eval_name][name]["eval_result_metrics"]


def snapshot(folder):
    return {
        (str(path), path.stat().st_mtime_ns)
        for path in Path(folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_nothing_is_written_outside_the_output_folder(saes, tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    packages = Path(sae_bench.__file__).parent
    before = snapshot(packages), snapshot(TINY_LM), snapshot(PROBING)
    run_small(saes[:2], ALL, tmp_path / "out")
    assert (snapshot(packages), snapshot(TINY_LM), snapshot(PROBING)) == before
    assert os.listdir(tmp_path / "cwd") == []
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"eval_results", "artifacts"}


def test_the_callers_saes_random_state_and_gradients_stay_as_they_are(saes, tmp_path):
    sae = copy.deepcopy(saes[0][1])
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    config, torch_state, grad = sae.cfg.to_dict(), torch.get_rng_state(), torch.is_grad_enabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with torch.no_grad():
        run_small([("one", sae)], ["sparse_probing"], tmp_path)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() == grad
    assert sae.cfg.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert np.random.get_state()[1].tolist() == numpy_state  # noqa: NPY002


def test_an_sae_that_fails_is_named_with_the_reason_and_the_others_have_results(saes, tmp_path, monkeypatch):
    broken = copy.deepcopy(exported(saes, "topk"))
    broken.encode = mock.Mock(side_effect=ArithmeticError("this SAE cannot encode"))
    with pytest.raises(EvalError) as error:
        run_small([("good", saes[2][1]), ("broken", broken)], ["sparse_probing"], tmp_path)
    assert str(error.value).startswith(
        "1 of 2 results are missing:\nsparse_probing of broken_custom_sae: ArithmeticError: this SAE"
    )
    assert [file.name for file in tmp_path.glob("eval_results/*/*")] == ["good_custom_sae_eval_results.json"]


def test_core_goes_on_without_an_sae_that_fails(saes, tmp_path):
    broken = copy.deepcopy(exported(saes, "topk"))
    broken.encode = mock.Mock(side_effect=ArithmeticError("this SAE cannot encode"))
    with pytest.raises(EvalError) as error:
        run_small([("broken", broken), ("good", saes[2][1])], ["core"], tmp_path / "both")
    assert str(error.value).splitlines()[1:] == ["core of broken_custom_sae: ArithmeticError: this SAE cannot encode"]
    [file] = tmp_path.glob("both/eval_results/core/*")
    [alone] = run_small([("good", saes[2][1])], ["core"], tmp_path / "alone")["core"].values()
    assert json.loads(file.read_text())["eval_result_metrics"] == alone["eval_result_metrics"]


@pytest.mark.parametrize("eval_name", ["core", "sparse_probing"])
def test_a_result_does_not_depend_on_the_other_saes_or_their_order(eval_name, saes, tmp_path):
    """Four classes: the negatives are drawn, so the draws show."""
    fields = {"probing_datasets": [EXAMPLES / "tiny_probing" / name for name in ("authors", "subjectivity")]}
    pairs = [saes[2], saes[4]]
    forward, backward, alone = (
        run_small(some, [eval_name], tmp_path / str(i), **fields)[eval_name]
        for i, some in enumerate((pairs, pairs[::-1], pairs[1:]))
    )
    for name, one in forward.items():
        assert one["eval_result_metrics"] == backward[name]["eval_result_metrics"]
    for name, one in alone.items():
        assert one["eval_result_metrics"] == forward[name]["eval_result_metrics"]


def test_another_text_or_other_labelled_texts_are_another_configuration(saes, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(TINY_LM / "text", text)
    fields = {"text": text, "probing_datasets": [tmp_path / "mine"]}
    shutil.copytree(PROBING, tmp_path / "mine")
    evals = ["core", "sparse_probing"]
    run_small(saes[2:3], evals, tmp_path / "out", **fields)
    text.rename(tmp_path / "elsewhere")
    run_small(saes[2:3], evals, tmp_path / "out", **fields | {"text": tmp_path / "elsewhere"})
    for changed, eval_name in (
        (tmp_path / "elsewhere" / "train.jsonl", "core"),
        (tmp_path / "mine" / "test.jsonl", evals[1]),
    ):
        changed.write_text("".join(changed.read_text().splitlines(keepends=True)[1:]))
        with pytest.raises(ValueError, match="holds the result of another config"):
            run_small(saes[2:3], [eval_name], tmp_path / "out", **fields | {"text": tmp_path / "elsewhere"})


def test_special_tokens_are_neither_replaced_nor_counted(saes, monkeypatch, tmp_path):
    """Against SAEBench by hand, on a text of which a third are special tokens."""
    lines = [json.dumps({"text": "<|endoftext|>".join(f"word {i} and {j}" for j in range(60))}) for i in range(30)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.jsonl").write_text("\n".join(lines))
    want = core_by_hand("one", exported(saes, "sampled_seed0"), tmp_path / "by_hand", text=tmp_path / "text")
    [got] = run_small(saes[:1], ["core"], tmp_path / "ours", text=tmp_path / "text")["core"].values()
    assert got["eval_result_metrics"] == want["eval_result_metrics"]
    assert got["eval_result_unstructured"]["exported"]["n_tokens"] < 3 * 4 * 48
    training, exported_score = (
        got["eval_result_unstructured"]["in_training"]["ce_loss_score"],
        got["eval_result_metrics"]["model_performance_preservation"]["ce_loss_score"],
    )
    assert training == pytest.approx(exported_score, abs=0.1)


def test_what_core_swallows_is_raised(saes, tmp_path, monkeypatch):
    monkeypatch.setattr(core, "calculate_misc_metrics", lambda _metrics: 1 / 0)
    with pytest.raises(EvalError, match="core of one_custom_sae: ZeroDivisionError: division by zero"):
        run_small([("one", saes[2][1])], ["core"], tmp_path)


def test_a_model_with_too_few_first_letters_is_told(saes, tmp_path):
    overrides = {"absorption": SMALL["absorption"] | {"min_GT_probe_f1": 0.999, "min_feats_for_eval": 26}}
    with pytest.raises(EvalError, match=r"fewer than min_feats_for_eval=26 letters have a probe with F1 above"):
        run_small(saes[2:3], ["absorption"], tmp_path, overrides=overrides)


def test_widths_are_those_of_the_test(results):
    assert all(len(one["eval_result_details"]) == D_SAE for one in results["core"].values())
