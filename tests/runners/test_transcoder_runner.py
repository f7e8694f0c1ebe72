"""Transcoders of an MLP of the bundled model: the runner, its evaluation, SAEBench's core, and the commands."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import wandb
from helpers import train_arguments
from sae_lens import SAE, ActivationsStore, LoggingConfig, SAETrainer
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder
from sae_lens.training.activation_scaler import ActivationScaler
from transcoder_runner_helpers import BRIDGED_IN, BRIDGED_OUT, IN, OUT, runner_config
from typer.testing import CliRunner

from sae_lens_sampled import SampledTopKTranscoder, TranscoderRunner, as_sae_on_outputs
from sae_lens_sampled.cli import app
from sae_lens_sampled.metrics import fraction_of_variance_unexplained
from sae_lens_sampled.sae.reconstruction import encode_and_reconstruct

EVERYTHING = {
    f"compute_{name}": True
    for name in (
        "kl",
        "ce_loss",
        "l2_norms",
        "sparsity_metrics",
        "variance_metrics",
        "featurewise_density_statistics",
        "featurewise_weight_based_metrics",
    )
}


@pytest.fixture(scope="module")
def trained(tiny_lm, bridge, tmp_path_factory):
    """One transcoder trained by the runner, one by SAELens' trainer on the same batches, and their export folder."""
    folder = tmp_path_factory.mktemp("transcoders")
    hooks = {"hook_name": BRIDGED_IN, "hook_name_out": BRIDGED_OUT}
    size = {"train_batch_size_tokens": 1024, "n_batches_in_buffer": 64, "training_tokens": 250 * 1024}
    cfg = runner_config(tiny_lm, **hooks, **size, lr_decay_steps=100, output_path=str(folder / "all"))
    runner, batches = TranscoderRunner(cfg, override_model=bridge), []
    loader = runner.activations_store.get_data_loader()
    runner.activations_store._dataloader = (batches.append(batch) or batch for batch in loader)
    runner.run()
    groups = SampledTopKTranscoder(replace(cfg.sae, pool_factor=10, pool_group_size=16, skip=True))
    groups.cfg.metadata = copy.deepcopy(runner.sae.cfg.metadata)
    SAETrainer(cfg.to_sae_trainer_config(), groups, iter(batches)).fit()
    groups.save_inference_model(folder / "groups")
    groups.save_model(folder / "groups_checkpoint")
    return SimpleNamespace(folder=folder, all=runner.sae, groups=groups)


@pytest.fixture(scope="module")
def held_out(tiny_lm, bridge):
    """Inputs and outputs of the MLP on text not used for training, in random order."""
    lines = (tiny_lm / "text" / "validation.jsonl").read_text().splitlines()
    ids = bridge.tokenizer("".join(json.loads(line)["text"] for line in lines), verbose=False)["input_ids"]
    tokens = torch.tensor(ids[: 48 * 600]).view(600, 48)
    with torch.no_grad():
        cache = bridge.run_with_cache(tokens, names_filter=[BRIDGED_IN, BRIDGED_OUT])[1]
    order = torch.randperm(tokens.numel(), generator=torch.Generator().manual_seed(0))[: 28 * 1024]
    return tuple(cache[name].flatten(end_dim=1)[order] for name in (BRIDGED_IN, BRIDGED_OUT))


def test_the_store_yields_what_the_mlp_makes_of_each_token(tiny_lm):
    """Also after buffering, mixing and the exclusion of tokens; in float32."""
    runner = TranscoderRunner(runner_config(tiny_lm, exclude_special_tokens=[5, 9]))
    mlp = runner.model.model.gpt_neox.layers[2].mlp
    for _ in range(4):
        batch = next(runner.activations_store)
        assert batch.shape == (256, 256)
        x, y = runner.sae.inputs_and_targets(batch)
        with torch.no_grad():
            torch.testing.assert_close(y, mlp(x))
    assert len(batch.unique(dim=0)) > 200


@pytest.mark.parametrize("name", ["all", "groups"])
def test_the_export_does_on_held_out_tokens_what_training_did(trained, held_out, name):
    made, (x, y) = getattr(trained, name), held_out
    exported = SAE.load_from_disk(trained.folder / name)
    assert type(exported) is (JumpReLUTranscoder if name == "all" else JumpReLUSkipTranscoder)
    with torch.no_grad():
        selected = [encode_and_reconstruct(made, part) for part in x.split(1024)]
        acts, in_training = (torch.cat(parts) for parts in zip(*selected, strict=True))
        fires, y_hat = encode_and_reconstruct(exported, x)
    assert (acts > 0).sum() == 8 * len(x)
    assert (fires > 0).sum(dim=1).float().mean().item() == pytest.approx(8, rel=0.03)
    fvu, want = (fraction_of_variance_unexplained(y, each).item() for each in (y_hat, in_training))
    assert fvu == pytest.approx(want, rel=0.02)
    assert 0.02 < fvu < 0.6


def test_an_evaluation_puts_reconstructions_in_the_place_of_outputs(trained, tiny_lm, bridge):
    cfg = runner_config(tiny_lm, hook_name=BRIDGED_IN, hook_name_out=BRIDGED_OUT, skip=True)
    runner = TranscoderRunner(cfg, override_model=bridge, override_sae=trained.groups)
    runner._set_sae_metadata()
    exported = SAE.load_from_disk(trained.folder / "groups")  # its codes do not depend on the batch
    tokens = runner.activations_store.get_batch_tokens(8)
    runner.activations_store.get_batch_tokens = lambda *_: tokens
    got = runner.evaluator(exported, runner.activations_store, ActivationScaler())
    seen = {}

    def keep(x, hook):
        seen[hook.name] = x

    def replace(y, hook):
        seen["y"], seen["y_hat"] = y, exported(seen[BRIDGED_IN])
        return seen["y_hat"]

    with torch.no_grad():
        want = {
            "ce_loss_without_sae": bridge(tokens, return_type="loss"),
            "ce_loss_with_sae": bridge.run_with_hooks(
                tokens, return_type="loss", fwd_hooks=[(BRIDGED_IN, keep), (BRIDGED_OUT, replace)]
            ),
            "ce_loss_with_ablation": bridge.run_with_hooks(
                tokens, return_type="loss", fwd_hooks=[(BRIDGED_OUT, lambda y, hook: torch.zeros_like(y))]
            ),
        }
    losses = got["model_performance_preservation"]
    for name, loss in want.items():
        assert losses[name] == pytest.approx(loss.item(), abs=1e-5), name
    assert losses["ce_loss_with_ablation"] > losses["ce_loss_with_sae"] > losses["ce_loss_without_sae"]
    fvu = 1 - got["reconstruction_quality"]["explained_variance"]
    y, y_hat = (seen[name].flatten(end_dim=1) for name in ("y", "y_hat"))
    assert fvu == pytest.approx(fraction_of_variance_unexplained(y, y_hat).item(), rel=1e-4)
    l0 = (exported.encode(seen[BRIDGED_IN]) > 0).sum(dim=-1).float().mean().item()
    assert got["sparsity"]["l0"] == pytest.approx(l0)
    assert len(bridge.hook_dict[BRIDGED_IN]._forward_hooks) == 0


def test_a_run_logs_evaluates_checkpoints_and_resumes(tiny_lm, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(wandb, "log", lambda values, step=None: logged.append(values))
    monkeypatch.setattr(wandb, "init", lambda **_: None)
    monkeypatch.setattr(wandb, "finish", lambda: None)
    monkeypatch.setattr(LoggingConfig, "log", lambda *_, **__: None)
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=2, eval_every_n_wandb_logs=2)
    fields = {"skip": True, "prefetch_llm_batches": True, "seqpos_slice": (4, None), "autocast": True}
    cfg = runner_config(tiny_lm, **fields, logger=logger, n_checkpoints=1, checkpoint_path=str(tmp_path))
    whole = TranscoderRunner(cfg)
    whole.run()
    names = {name for values in logged for name in values}
    assert {"model_performance_preservation", "metrics/export_fvu", "metrics/explained_variance"} <= names
    (run_folder,) = tmp_path.iterdir()
    (checkpoint,) = run_folder.iterdir()
    assert TrainingSAE.load_from_disk(checkpoint).cfg.metadata.hook_name_out == OUT
    resumed = TranscoderRunner(runner_config(tiny_lm, **fields, resume_from_checkpoint=str(checkpoint)))
    resumed.run()
    assert resumed.sae.pool_record.n_steps == whole.sae.pool_record.n_steps == 8


def test_outputs_must_come_after_inputs(tiny_lm, bridge, trained):
    """Otherwise evaluations would reconstruct them from the inputs of another pass."""
    for swapped, model in (((OUT, IN), None), ((BRIDGED_OUT, BRIDGED_IN), bridge)):
        cfg = runner_config(tiny_lm, hook_name=swapped[0], hook_name_out=swapped[1])
        with pytest.raises(
            ValueError, match=f"{swapped[1]} comes before {swapped[0]} in .*, but a transcoder's output"
        ):
            TranscoderRunner(cfg, override_model=model)
    with as_sae_on_outputs(trained.all, bridge) as view:
        bridge(torch.zeros(1, 3, dtype=torch.int64))
        view.encode(torch.empty(0))
        with pytest.raises(ValueError, match=r"^encode was called without new inputs"):
            view.encode(torch.empty(0))


def test_only_transcoders_of_one_place_are_compared(trained, tmp_path):
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    from eval_helpers import run_small

    elsewhere = SAE.load_from_disk(trained.folder / "all")
    elsewhere.cfg.metadata.hook_name_out = "blocks.3.hook_mlp_out"
    with pytest.raises(ValueError, match=r"has hook_name_out='blocks\.3\.hook_mlp_out', but 'all_custom_sae' has"):
        run_small([("all", trained.folder / "all"), ("else", elsewhere)], ["mmcs"], tmp_path)
    narrow = SampledTopKTranscoder(replace(trained.all.cfg, d_out=64))
    with pytest.raises(ValueError, match=r"SAE 'narrow_custom_sae' has d_out=64, but blocks\.2\.hook_mlp_out of"):
        run_small([("narrow", narrow)], ["core"], tmp_path)


def test_the_command_trains_one_and_calibrates_it(tiny_lm, tmp_path):
    changes = {"architecture": "sampled_topk_transcoder", "hook_name": IN, "hook_name_out": OUT, "skip": True}
    result = CliRunner().invoke(
        app, ["train", *train_arguments(tiny_lm, tmp_path, **changes, save_final_checkpoint=True)]
    )
    assert result.exit_code == 0, result.output
    assert type(SAE.load_from_disk(tmp_path / "output")) is JumpReLUSkipTranscoder
    (checkpoint,) = tmp_path.glob("checkpoints/*/final_*")
    assert type(TrainingSAE.load_from_disk(checkpoint)) is SampledTopKTranscoder
    arguments = [
        "--dataset",
        str(tiny_lm / "text"),
        "--out",
        str(tmp_path / "out"),
        "--max-tokens",
        "2000",
        "--batch-size",
        "500",
    ]
    result = CliRunner().invoke(app, ["calibrate", str(checkpoint), *arguments, "--target-l0", "5"])
    assert result.exit_code == 0, result.output
    report = dict(line.split() for line in result.stdout.splitlines() if line.startswith(("l0_after", "fvu_after")))
    assert float(report["l0_after"]) == pytest.approx(5, abs=0.05)
    assert 0 < float(report["fvu_after"]) < 1.5
    assert type(SAE.load_from_disk(tmp_path / "out")) is JumpReLUSkipTranscoder


def test_core_is_what_sae_bench_gives_for_an_sae_on_the_outputs(trained, tmp_path):
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    import sae_bench.evals.core.main as core
    from eval_helpers import SMALL, TINY_LM, run_small

    from sae_lens_sampled.saebench import load_saes
    from sae_lens_sampled.saebench.models import load_model

    sources = [(name, trained.folder / name) for name in ("all", "groups_checkpoint")]
    results = run_small(sources, ["core"], tmp_path)["core"]
    hooked, config = load_model(TINY_LM).hooked, core.CoreEvalConfig(**SMALL["core"], **EVERYTHING)
    for sae in load_saes(sources):
        store = ActivationsStore.from_sae(hooked, sae.sae, dataset=str(TINY_LM / "text"), context_size=48)
        store.shuffle_input_dataset(seed=42)
        with as_sae_on_outputs(sae.sae, hooked) as view:
            view.cfg = SimpleNamespace(
                hook_name=BRIDGED_OUT, hook_head_index=None, hook_layer=2, d_sae=256, architecture_str="jumprelu"
            )
            special = {hooked.tokenizer.pad_token_id, hooked.tokenizer.eos_token_id, hooked.tokenizer.bos_token_id}
            want, latents = core.run_evals(view, store, hooked, config, ignore_tokens=special)
        got = results[sae.name]
        for category, numbers in want.items():
            for name, value in numbers.items():
                assert got["eval_result_metrics"][category][name] == pytest.approx(value, rel=1e-5), name
        for latent in got["eval_result_details"][::10]:
            for name, values in latents.items():
                value = values[latent["index"]]  # SAEBench writes -1 for latents that never fire
                assert latent[name] == pytest.approx(-1 if math.isnan(value) else value, abs=1e-5), name
        # Our additions to core: FVU over all tokens, for the export and for the selection of training.
        store.iterable_sequences = store._iterate_tokenized_sequences()
        small, extra = SMALL["core"], got["eval_result_unstructured"]
        n_before, n = (small[f"n_eval_{part}_batches"] for part in ("reconstruction", "sparsity_variance"))
        batches = [store.get_batch_tokens(small["batch_size_prompts"]) for _ in range(n_before + n)][n_before:]
        keep = torch.cat([~torch.isin(tokens, torch.tensor(sorted(special))) for tokens in batches])
        with torch.no_grad():
            caches = [hooked.run_with_cache(tokens, names_filter=[BRIDGED_IN, BRIDGED_OUT])[1] for tokens in batches]
            x, y = (torch.cat([cache[name] for cache in caches])[keep] for name in (BRIDGED_IN, BRIDGED_OUT))
            fvu = fraction_of_variance_unexplained(y, encode_and_reconstruct(sae.sae, x)[1])
        assert extra["exported"]["fvu"] == pytest.approx(fvu.item(), rel=1e-4)
        assert ("in_training" in extra) == sae.release.endswith("checkpoint")


def test_probing_takes_inputs_and_absorption_is_refused(trained, tmp_path):
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    from eval_helpers import run_small

    source = ("all", trained.folder / "all")
    result = run_small([source], ["sparse_probing"], tmp_path)["sparse_probing"]["all_custom_sae"]
    assert 0.5 < result["eval_result_metrics"]["sae"]["sae_test_accuracy"] < 1
    with pytest.raises(ValueError, match="'all_custom_sae' is a transcoder; absorption compares decoder rows"):
        run_small([source], ["absorption"], tmp_path)
    broken = SAE.load_from_disk(trained.folder / "all")
    broken.cfg.metadata.hook_name_out = None
    with pytest.raises(ValueError, match=r"has no hook_name_out in its metadata; set sae\.cfg\.metadata\.hook"):
        run_small([("broken", broken)], ["core"], tmp_path)
