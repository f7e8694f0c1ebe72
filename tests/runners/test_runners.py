"""The architecture in SAELens' own runners, which are used as they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from helpers import D_IN, activations, config, sampled_sae
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUSAE,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    SAETrainer,
)
from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
from sae_lens.config import SAETrainerConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.synthetic import SyntheticModelConfig, SyntheticSAERunner, SyntheticSAERunnerConfig
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig

QUIET = LoggingConfig(log_to_wandb=False)


@pytest.fixture(scope="module")
def bridge(tiny_lm):
    """The bundled model behind TransformerLens' hook names."""
    return TransformerBridge.boot_transformers(str(tiny_lm), device="cpu")


def sae_config(**fields: Any) -> SampledTopKTrainingSAEConfig:
    return SampledTopKTrainingSAEConfig(**{"d_in": 128, "d_sae": 192, "k": 8, "pool_factor": 4, **fields})


def data(tiny_lm: Path) -> dict[str, Any]:
    return {
        "model_name": str(tiny_lm),
        "dataset_path": str(tiny_lm / "text"),
        "context_size": 32,
        "train_batch_size_tokens": 128,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 8,
        "n_batches_for_norm_estimate": 4,
        "lr": 1e-3,
        "feature_sampling_window": 5,
        "dead_feature_window": 3,
        "checkpoint_path": None,
        "output_path": None,
        "logger": QUIET,
    }


def runner(tiny_lm, bridge=None, training_tokens=128 * 8, **fields):
    cfg = LanguageModelSAERunnerConfig(
        **{
            "sae": sae_config(),
            "hook_name": "blocks.2.hook_resid_post",
            "is_dataset_tokenized": False,
            "verbose": False,
            "training_tokens": training_tokens,
            **data(tiny_lm),
            **fields,
        }
    )
    return LanguageModelSAETrainingRunner(cfg, override_model=bridge)


def spy_on_fit(monkeypatch) -> list[SAETrainer]:
    """The trainers whose `fit` was called."""
    trainers = []
    fit = SAETrainer.fit
    monkeypatch.setattr(SAETrainer, "fit", lambda self: (trainers.append(self), fit(self))[1])
    return trainers


@pytest.mark.conformance(13)
@pytest.mark.parametrize("names", ["transformer_lens", "hugging_face"])
def test_language_model_runner_trains_saves_and_reloads(tiny_lm, bridge, tmp_path, names):
    if names == "transformer_lens":
        model, fields = bridge, {}
    else:
        model, fields = None, {"model_class_name": "AutoModelForCausalLM", "hook_name": "gpt_neox.layers.2"}
    run = runner(
        tiny_lm,
        model,
        output_path=str(tmp_path / "output"),
        checkpoint_path=str(tmp_path / "checkpoints"),
        save_final_checkpoint=True,
        **fields,
    )
    sae = run.run()
    assert type(sae) is SampledTopKTrainingSAE
    assert sae.pool_record.n_steps == 8
    exported = SAE.load_from_disk(tmp_path / "output")
    assert type(exported) is JumpReLUSAE
    assert json.loads((tmp_path / "output" / "runner_cfg.json").read_text()) == json.loads(
        json.dumps(run.cfg.to_dict())
    )
    (checkpoint,) = Path(run.cfg.checkpoint_path).glob("final_*")
    again = TrainingSAE.load_from_disk(checkpoint)
    for metadata in (again.cfg.metadata, exported.cfg.metadata):
        assert metadata.hook_name == run.cfg.hook_name
        assert metadata.model_name == str(tiny_lm)
        assert metadata.training_architecture == "sampled_topk"
        assert metadata.l0 == pytest.approx(8, abs=0.01)
    assert again.pool_statistics() == sae.pool_statistics()


def test_runner_config_from_dict_knows_the_architecture(tiny_lm):
    cfg = LanguageModelSAERunnerConfig(
        sae=sae_config(pool_group_size=16), hook_name="blocks.2.hook_resid_post", **data(tiny_lm)
    )
    as_dict = json.loads(json.dumps(cfg.to_dict()))
    assert as_dict["sae"]["architecture"] == "sampled_topk"
    again = LanguageModelSAERunnerConfig.from_dict(as_dict)
    assert type(again.sae) is SampledTopKTrainingSAEConfig
    assert again.sae.pool_group_size == 16
    assert json.loads(json.dumps(again.to_dict())) == as_dict


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "covariance_whitening"])
def test_normalised_training_exports_what_it_trained(tiny_lm, bridge, tmp_path, normalize, rescale):
    """After folding, the exported SAE fires on raw activations as often as training selected, even in a short run."""
    cfg = sae_config(normalize_activations=normalize, rescale_acts_by_decoder_norm=rescale)
    run = runner(tiny_lm, bridge, sae=cfg, output_path=str(tmp_path), training_tokens=128 * 100)
    sae = run.run()
    assert sae.cfg.normalize_activations == "none"
    batch = next(run.activations_store)
    hidden_pre = sae.encode_with_hidden_pre(batch)[1].relu()
    exported = SAE.load_from_disk(tmp_path)
    # Whitening folds the norms first, so nothing is left to rescale by.
    units = 1.0 if sae.cfg.rescale_acts_by_decoder_norm else sae.W_dec.norm(dim=1)
    fires = hidden_pre * units > exported.threshold
    torch.testing.assert_close(exported.encode(batch), hidden_pre * units * fires, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(exported(batch), sae.decode(hidden_pre * fires), rtol=1e-3, atol=1e-4)
    assert fires.sum(dim=1).float().mean() == pytest.approx(8, rel=0.25)


@pytest.mark.conformance(15)
def test_autocast_run_trains(tiny_lm, bridge):
    sae = runner(tiny_lm, bridge, autocast=True).run()
    assert all(parameter.isfinite().all() for parameter in sae.parameters())
    assert sae.topk_threshold.dtype == torch.float64


def test_bfloat16_run_keeps_its_record(tiny_lm, bridge, tmp_path):
    sae = runner(tiny_lm, bridge, sae=sae_config(dtype="bfloat16"), dtype="bfloat16", output_path=str(tmp_path)).run()
    assert sae.W_enc.dtype == torch.bfloat16
    assert sae.pool_record.selection_counts.sum() == 8 * 128 * 8
    assert SAE.load_from_disk(tmp_path).W_enc.dtype == torch.bfloat16


@pytest.mark.usefixtures("unchecked_types")
def test_compiled_run_trains_as_the_plain_one(tiny_lm, bridge):
    """Two runners see the same first batches if the global generator starts from the same seed."""
    saes = []
    for compiled in (False, True):
        torch.manual_seed(3)
        saes.append(runner(tiny_lm, bridge, compile_sae=compiled, training_tokens=128 * 3).run())
    plain, compiled = saes
    torch.testing.assert_close(compiled.W_dec, plain.W_dec, rtol=1e-3, atol=1e-5)
    assert compiled.pool_statistics() == pytest.approx(plain.pool_statistics(), rel=1e-3)


@pytest.mark.conformance(12)
def test_resumed_language_model_run_goes_on_from_the_checkpoint(tiny_lm, bridge, tmp_path, monkeypatch):
    first = runner(tiny_lm, bridge, checkpoint_path=str(tmp_path), save_final_checkpoint=True)
    trained = first.run()
    (checkpoint,) = Path(first.cfg.checkpoint_path).glob("final_*")
    trainers = spy_on_fit(monkeypatch)
    resumed = runner(tiny_lm, bridge, resume_from_checkpoint=str(checkpoint))  # no tokens left to train on
    sae = resumed.run()
    for name, tensor in trained.state_dict().items():
        assert torch.equal(sae.state_dict()[name], tensor), name
    saved = torch.load(checkpoint / "trainer_state.pt")
    state = trainers[0].optimizer.state_dict()["state"]
    assert all(torch.equal(state[i][key], saved["optimizer"]["state"][i][key]) for i in state for key in state[i])
    assert trainers[0].n_training_steps == 8

    longer = runner(tiny_lm, bridge, resume_from_checkpoint=str(checkpoint), training_tokens=128 * 11).run()
    assert longer.pool_record.n_steps == 11
    assert not torch.equal(longer.W_dec, trained.W_dec)


def test_multi_runner_trains_pool_factors_beside_batchtopk(tiny_lm, bridge, tmp_path):
    shared = {"d_in": 128, "d_sae": 192, "k": 8}
    saes = {
        "batchtopk": BatchTopKTrainingSAEConfig(**shared, aux_loss_coefficient=1 / 32),
        "all": sae_config(pool_factor=24),
        "small": sae_config(pool_factor=2),
        "grouped": sae_config(pool_factor=2, pool_group_size=16),
    }
    cfg = MultiSAETrainingRunnerConfig(
        saes=saes,
        hook_names="blocks.2.hook_resid_post",
        **{
            **data(tiny_lm),
            "training_tokens": 128 * 8,
            "output_path": str(tmp_path / "output"),
            "checkpoint_path": str(tmp_path / "checkpoints"),
            "n_checkpoints": 1,
        },
    )
    torch.manual_seed(0)
    runner = MultiSAETrainingRunner(cfg, override_model=bridge)
    # With the same initial weights, a pool of all latents must end with BatchTopK's weights.
    runner.saes["all"].load_state_dict(runner.saes["batchtopk"].state_dict(), strict=False)
    trained = runner.run()
    assert torch.equal(trained["all"].W_dec, trained["batchtopk"].W_dec)
    assert (
        trained["small"].pool_statistics()["pooled_latents"]
        == 16
        < trained["grouped"].pool_statistics()["pooled_latents"]
    )
    for name in saes:
        assert type(SAE.load_from_disk(tmp_path / "output" / name)) is JumpReLUSAE

    (checkpoint,) = Path(cfg.checkpoint_path).iterdir()
    resumed = MultiSAETrainingRunnerConfig(**{**_fields(cfg), "resume_from_checkpoint": str(checkpoint)})
    again = MultiSAETrainingRunner(resumed, override_model=bridge).run()
    assert all(again[name].pool_record.n_steps == 8 for name in ("all", "small", "grouped"))


def _fields(cfg: MultiSAETrainingRunnerConfig) -> dict[str, Any]:
    names = [name for name in cfg.__dataclass_fields__ if not name.startswith("_")]
    return {name: getattr(cfg, name) for name in names} | {"checkpoint_path": None}


def test_synthetic_runner_finds_features(tmp_path):
    model = SyntheticModelConfig(num_features=32, hidden_dim=24, seed=0)
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=model,
        sae=SampledTopKTrainingSAEConfig(d_in=24, d_sae=32, k=3, pool_factor=4, pool_group_size=8),
        training_samples=256 * 300,
        batch_size=256,
        lr=3e-3,
        eval_samples=1024,
        output_path=str(tmp_path),
        checkpoint_path=None,
        logger=QUIET,
    )
    result = SyntheticSAERunner(cfg).run()
    assert result.final_eval.sae_l0 == pytest.approx(3, abs=0.01)
    assert result.final_eval.explained_variance > 0.5
    assert type(SAE.load_from_disk(tmp_path)) is JumpReLUSAE


def trainer(sae, batches, total_steps, folder, **fields):
    cfg = SAETrainerConfig(
        total_training_samples=total_steps * 64,
        train_batch_size_samples=64,
        lr=1e-3,
        lr_end=1e-3,
        dead_feature_window=4,
        checkpoint_path=folder,
        **fields,
    )
    return SAETrainer(cfg, sae, batches)


def batches(first=0):
    step = first
    while True:
        yield activations(64, seed=step)
        step += 1


@pytest.mark.conformance(12)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pool_sampling": "proportional"},
        {"pool_sampling": "proportional", "pool_group_size": 8, "score": "uniform"},
        {"k": 2.5, "score": "perplexity"},
    ],
    ids=str,
)
def test_interrupted_and_resumed_run_ends_bit_equal_to_one_that_was_not(tmp_path, fields):
    whole = sampled_sae(**fields)
    trainer(whole, batches(), 24, tmp_path, n_checkpoints=1).fit()
    # SAELens writes the checkpoint in the middle of its loop; it ends the 13th step.
    (checkpoint,) = tmp_path.iterdir()
    done = int(checkpoint.name) // 64
    assert done == 13

    resumed = SampledTopKTrainingSAE(config(**fields))
    second = trainer(resumed, batches(done), 24, tmp_path)
    second.load_trainer_state(checkpoint)
    resumed.load_weights_from_checkpoint(checkpoint)
    second.fit()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.conformance(15)
def test_logger_gets_the_pool_statistics(monkeypatch):
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "log", lambda values, step=None: logged.append(values))
    sae = sampled_sae()
    trainer(sae, batches(), 4, None, logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=2)).fit()
    steps = [values for values in logged if "metrics/l0" in values]
    assert len(steps) == 2
    for name, value in sae.pool_statistics().items():
        assert steps[-1][f"metrics/{name}"] == value


def test_evals_and_hooked_transformer_take_the_trained_and_the_exported_sae(tiny_lm, bridge, tmp_path):
    run = runner(tiny_lm, bridge, output_path=str(tmp_path))
    sae = run.run()
    for one in (sae, SAE.load_from_disk(tmp_path)):
        metrics, _ = run_evals(
            one,
            run.activations_store,
            bridge,
            ActivationScaler(),
            EvalConfig(
                batch_size_prompts=2,
                n_eval_reconstruction_batches=1,
                n_eval_sparsity_variance_batches=1,
                compute_ce_loss=True,
                compute_sparsity_metrics=True,
                compute_variance_metrics=True,
            ),
        )
        assert metrics["sparsity"]["l0"] > 0
        assert metrics["model_performance_preservation"]["ce_loss_with_sae"] > 0

    model = HookedSAETransformer(
        HookedTransformerConfig(n_layers=1, d_model=D_IN, n_ctx=16, d_head=6, n_heads=2, d_vocab=20, act_fn="relu")
    )
    small = sampled_sae()
    small.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    tokens = torch.randint(0, 20, (3, 16))
    _, cache = model.run_with_cache_with_saes(tokens, saes=[small])
    acts = cache["blocks.0.hook_resid_post.hook_sae_acts_post"]
    _, plain = model.run_with_cache(tokens)
    torch.testing.assert_close(acts, small.encode(plain["blocks.0.hook_resid_post"]))


@pytest.mark.conformance(13)
def test_prefetch_override_sae_and_no_output_path(tiny_lm, bridge, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = SampledTopKTrainingSAE(sae_config(pool_factor=2))
    cfg = runner(tiny_lm, bridge, prefetch_llm_batches=2).cfg
    trained = LanguageModelSAETrainingRunner(cfg, override_model=bridge, override_sae=given).run()
    assert trained is given
    assert given.pool_statistics()["pooled_latents"] == 16
    assert list(tmp_path.iterdir()) == []
