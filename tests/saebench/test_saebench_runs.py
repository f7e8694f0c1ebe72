"""`run_evals` end to end on SAEs of all architectures, compared with SAEBench called by hand."""

import json
import random

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

import sae_bench.evals.absorption.main as absorption
import sae_bench.evals.core.main as core
import sae_bench.evals.sparse_probing.main as sparse_probing
from eval_helpers import (
    ALL,
    D_SAE,
    EXAMPLES,
    HOOK,
    PROBING,
    SMALL,
    TINY_LM,
    core_by_hand,
    exported,
    official,
    run_small,
)
from sae_bench.sae_bench_utils import dataset_info, dataset_utils, graphing_utils
from transformer_lens import HookedTransformer

from sae_lens_sampled.metrics import fraction_of_variance_unexplained
from sae_lens_sampled.saebench import load_probing_dataset, patches
from sae_lens_sampled.saebench.models import load_model


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
            row = read[f"{name}_custom_sae"]
            assert any(key.startswith(prefix) for key in row), row
            assert eval_name == "core" or row["sae_class"] == sae.cfg.architecture()


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
    # Core's means are bfloat16 numbers; those added to them are not.
    losses = got["eval_result_metrics"]["model_performance_preservation"]
    own = got["eval_result_unstructured"]["exported"]
    assert own["ce_loss_with_sae"] == pytest.approx(losses["ce_loss_with_sae"], rel=2**-8)
    assert torch.tensor(own["ce_loss_with_sae"]).bfloat16().item() != own["ce_loss_with_sae"]


def test_the_losses_that_are_added_are_cores_in_float32(results):
    for got in results["core"].values():
        metrics, own = got["eval_result_metrics"], got["eval_result_unstructured"].get("exported")
        if own is not None:
            for part in ("model_behavior_preservation", "model_performance_preservation"):
                for name in metrics[part].keys() & own.keys():
                    assert own[name] == pytest.approx(metrics[part][name], rel=1e-5), name


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
        {k: v for k, v in result["eval_result_details"][0].items() if k != "dataset_name"} for result in (got, want)
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
    # The test words that begin with the letter, and those among them on which its best latent fires.
    [file] = (tmp_path / "work").rglob("*raw_results*.parquet")
    words = pd.read_parquet(file)
    letters = got["eval_result_unstructured"]["letters"]
    assert list(letters) == [detail["first_letter"] for detail in want["eval_result_details"]]
    for letter, recall in letters.items():
        of_letter = words[words["answer_letter"] == letter]
        fires = of_letter[f"sum_sparse_sae_{letter}_k_1"] > 1e-6
        assert recall["recall_best_latent"] == pytest.approx(fires.mean())
        assert recall["recall_probe"] == pytest.approx((of_letter[f"score_probe_{letter}"] > 0).mean())


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
        for sae, got in ((exported(saes, "sampled_seed0"), extra["exported"]), (training, extra["in_training"])):
            acts = torch.cat([sae.encode(batch) for batch in batches])
            x = torch.cat(batches)
            want = fraction_of_variance_unexplained(x, sae.decode(acts)).item()
            assert got["fvu"] == pytest.approx(want, rel=1e-6)
            assert got["l0"] == pytest.approx((acts > 0).sum(dim=1).double().mean().item())
    assert extra["in_training"]["l0"] == pytest.approx(8, rel=1e-3) != extra["exported"]["l0"]
    assert 0 < extra["in_training"]["ce_loss_score"] < 1


def test_top_contexts_are_where_the_latent_is_largest(results):
    contexts = results["core"]["sampled_seed0_custom_sae"]["eval_result_unstructured"]["top_contexts"]
    assert 1 <= len(contexts) <= 8
    for latent in contexts:
        values = [context["activation"] for context in latent["contexts"]]
        assert values == sorted(values, reverse=True)
        assert min(values) > 0
        assert all(context["token"] for context in latent["contexts"])


def test_seeds_are_partners_of_one_group_and_the_others_are_not(results):
    result = results["mmcs"]["sampled_seed0_custom_sae"]
    groups = {detail["partner"]: detail["same_group"] for detail in result["eval_result_details"]}
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
    # The 1 is a pass over a few tokens, to check that the hook exists.
    want = 1 + 2 * small["n_eval_reconstruction_batches"] + small["n_eval_sparsity_variance_batches"]
    assert whole_passes == [want, want]


@pytest.mark.parametrize("eval_name", ["core", "sparse_probing"])
def test_a_result_does_not_depend_on_the_other_saes_or_their_order(eval_name, saes, tmp_path):
    """With four classes, negatives are drawn at random, so a change of the draws would show."""
    fields = {"probing_datasets": [EXAMPLES / "tiny_probing" / name for name in ("authors", "subjectivity")]}
    pairs = [saes[2], saes[4]]
    forward, backward, alone = (
        run_small(sources, [eval_name], tmp_path / str(i), **fields)[eval_name]
        for i, sources in enumerate((pairs, pairs[::-1], pairs[1:]))
    )
    for name, result in forward.items():
        assert result["eval_result_metrics"] == backward[name]["eval_result_metrics"]
    for name, result in alone.items():
        assert result["eval_result_metrics"] == forward[name]["eval_result_metrics"]


def test_special_tokens_are_neither_replaced_nor_counted(saes, monkeypatch, tmp_path):
    """Compared with SAEBench called by hand, on a text in which a third of the tokens are special."""
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


def test_widths_are_those_of_the_test(results):
    assert all(len(result["eval_result_details"]) == D_SAE for result in results["core"].values())
