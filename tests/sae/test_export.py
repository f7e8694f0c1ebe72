import json
import subprocess
import sys

import pytest
import torch
from helpers import D_IN, D_SAE, K, activations, config, sae_of, sampled_sae, step_input, train
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_sampled import SampledTopKSAE, SampledTopKTrainingSAE, calibrate_thresholds, load_checkpoint, to_jumprelu
from sae_lens_sampled.metrics import fraction_of_variance_unexplained
from sae_lens_sampled.sae.recorded import METRIC_TOKENS

LOAD_AND_ENCODE = """
import sys, torch
from sae_lens import SAE
folder = sys.argv[1]
acts = {}
for name in torch.load(folder + "/names.pt"):
    sae = SAE.load_from_disk(f"{folder}/{name}")
    acts[name] = sae.encode(torch.load(folder + "/batch.pt").to(sae.dtype)).detach()
torch.save(acts, folder + "/acts.pt")
assert not [name for name in sys.modules if name.startswith("sae_lens_sampled")]
"""


def batches(d_out=0):
    step = 0
    while True:
        x = activations(64, seed=step)
        yield torch.cat([x, x[:, :d_out].relu()], dim=1)
        step += 1


def trained(tmp_path, resume=False, **fields):
    """SAE after six trainer steps, folded at the end; with `resume`, interrupted halfway and resumed."""
    sae, d_out = sae_of(config(**fields)), fields.get("d_out", 0)
    settings = {
        "total_training_samples": 6 * 64,
        "train_batch_size_samples": 64,
        "lr": 1e-3,
        "lr_end": 1e-3,
        "n_batches_for_norm_estimate": 3,
        "n_checkpoints": 1 if resume else 0,
        "checkpoint_path": str(tmp_path / "checkpoints") if resume else None,
    }
    SAETrainer(SAETrainerConfig(**settings), sae, batches(d_out)).fit()
    if resume:
        (checkpoint,) = (tmp_path / "checkpoints").iterdir()
        sae = sae_of(config(**fields))
        trainer = SAETrainer(SAETrainerConfig(**{**settings, "n_checkpoints": 0}), sae, batches(d_out))
        trainer.load_trainer_state(checkpoint)
        sae.load_weights_from_checkpoint(checkpoint)
        trainer.fit()
    return sae


COMBINATIONS = [
    {},
    {"rescale_acts_by_decoder_norm": False},
    {"normalize_activations": "expected_average_only_in"},
    {"normalize_activations": "expected_average_only_in", "rescale_acts_by_decoder_norm": False},
    {"normalize_activations": "covariance_whitening"},
    {"normalize_activations": "covariance_whitening", "rescale_acts_by_decoder_norm": False},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "rescale_acts_by_decoder_norm": False},
    {"resume": True},
    {"resume": True, "normalize_activations": "expected_average_only_in"},
    {"pool_group_size": 16, "apply_b_dec_to_input": False},
    {"inference_threshold": "global"},
    {"fold": True},
    {"d_out": 7},
    {"d_out": 7, "skip": True, "dtype": "bfloat16", "resume": True},
]


def test_saved_files_encode_as_to_jumprelu_does_where_the_plugin_is_unknown(tmp_path):
    """Combinations of folding, rescaling, normalisation, dtype and resuming; one process loads them all."""
    batch = activations(40, seed=999)
    want = {}
    for number, fields in enumerate(COMBINATIONS):
        fold = fields.get("fold", False)
        sae = trained(tmp_path / str(number), **{name: value for name, value in fields.items() if name != "fold"})
        if fold:
            sae.fold_W_dec_norm()
        name = f"sae{number}"
        sae.save_inference_model(tmp_path / name)
        exported = to_jumprelu(sae)
        want[name] = exported.encode(batch.to(exported.dtype))
        assert 0 < (want[name] > 0).sum() < 40 * D_SAE, fields
    torch.save(batch, tmp_path / "batch.pt")
    torch.save(list(want), tmp_path / "names.pt")
    subprocess.run([sys.executable, "-c", LOAD_AND_ENCODE, str(tmp_path)], check=True)
    got = torch.load(tmp_path / "acts.pt")
    for (name, acts), fields in zip(want.items(), COMBINATIONS, strict=True):
        assert got[name].dtype == acts.dtype
        assert torch.equal(got[name], acts), fields


def test_given_thresholds_are_taken_in_units_of_hidden_pre():
    for rescale in (True, False):
        sae, batch = sampled_sae(rescale_acts_by_decoder_norm=rescale), activations(30)
        hidden_pre = sae.encode_with_hidden_pre(batch)[1]
        thresholds = hidden_pre.relu().detach().quantile(0.8, dim=0)
        thresholds[3] = torch.inf
        exported = to_jumprelu(sae, thresholds.double())
        assert exported.threshold.dtype == torch.float32
        fires = exported.encode(batch) > 0
        assert torch.equal(fires, (hidden_pre > thresholds) & (hidden_pre > 0))


def test_exporting_draws_no_random_numbers_and_changes_nothing():
    sae = sampled_sae(rescale_acts_by_decoder_norm=False)
    train(sae, 2)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    state = torch.get_rng_state()
    to_jumprelu(sae, prune=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        (torch.zeros(D_SAE + 1), r"thresholds have shape \(41,\), expected \(40,\): one for each latent"),
        (torch.full((D_SAE,), -0.1), r"40 of 40 thresholds are negative or NaN; use \+inf to silence a latent"),
        (torch.full((D_SAE,), torch.nan), r"40 of 40 thresholds are negative or NaN"),
    ],
)
@pytest.mark.usefixtures("unchecked_types")
def test_impossible_thresholds_are_refused(thresholds, message):
    with pytest.raises(ValueError, match=message):
        to_jumprelu(sampled_sae(), thresholds)


def test_pruned_export_gives_identical_outputs_and_knows_the_original_latents(tmp_path, caplog):
    sae, batch = sampled_sae(pool_factor=2), activations(30)
    train(sae, 5)
    whole, pruned = to_jumprelu(sae), to_jumprelu(sae, prune=True)
    kept = whole.threshold.isfinite().nonzero().flatten().tolist()
    assert 0 < len(kept) < D_SAE
    assert f"pruning drops {D_SAE - len(kept)} of {D_SAE} latents, which cannot fire" in caplog.text
    assert pruned.cfg.d_sae == len(kept)
    assert pruned.cfg.metadata.kept_latents == kept
    assert pruned.cfg.metadata.unpruned_d_sae == D_SAE
    torch.testing.assert_close(pruned.encode(batch), whole.encode(batch)[:, kept])
    torch.testing.assert_close(pruned(batch), whole(batch))
    pruned.save_model(tmp_path)
    again = SAE.load_from_disk(tmp_path)
    assert again.cfg.metadata.kept_latents == kept
    assert torch.equal(again.encode(batch), pruned.encode(batch))
    assert whole.cfg.d_sae == D_SAE


def test_pruning_an_sae_in_which_nothing_fires_is_refused():
    with pytest.raises(ValueError, match=r"none of the 40 latents can fire, so pruning would leave nothing"):
        to_jumprelu(sampled_sae(), torch.full((D_SAE,), torch.inf), prune=True)


def test_export_warns_once_when_most_latents_were_never_in_a_pool(tmp_path):
    sae = sampled_sae(pool_factor=2)
    train(sae, 3)
    with pytest.warns(
        UserWarning, match=r"were never in a pool.*here 2.*pool_group_size=16 lets more latents in"
    ) as caught:
        sae.save_inference_model(tmp_path)
    assert len(caught) == 1
    grouped = sampled_sae(pool_factor=2, pool_group_size=4)
    train(grouped, 3)
    grouped.save_inference_model(tmp_path)  # a warning would be an error here


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"pool_factor": 99},
        {"pool_group_size": 8},
        {"pool_sampling": "proportional"},
        {"pool_steps": 4},
        {"pool_steps": 3},
    ],
)
def test_training_checkpoint_loads_as_an_inference_sae_with_the_same_selection(tmp_path, fields):
    sae, batch = sampled_sae(**fields), activations(30)
    train(sae, 3)
    sae.save_model(tmp_path / "checkpoint")
    loaded = SAE.load_from_disk(tmp_path / "checkpoint")
    assert type(loaded) is SampledTopKSAE
    assert torch.equal(loaded.encode(batch), sae.encode(batch))
    torch.testing.assert_close(loaded(batch), sae(batch))
    loaded.save_model(tmp_path / "again")
    again = SAE.load_from_disk(tmp_path / "again")
    assert torch.equal(again.encode(batch), loaded.encode(batch))
    assert json.loads((tmp_path / "again" / "cfg.json").read_text())["architecture"] == "sampled_topk"
    loaded.fold_W_dec_norm()
    torch.testing.assert_close(loaded.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(loaded.encode(batch), again.encode(batch))
    torch.testing.assert_close(loaded(batch), again(batch))
    assert (loaded.encode(batch.reshape(5, 6, D_IN)) > 0).sum() <= K * 30


def test_unfolded_checkpoint_is_folded_or_refused(tmp_path):
    settings = SAETrainerConfig(
        total_training_samples=6 * 64,
        train_batch_size_samples=64,
        lr=1e-3,
        lr_end=1e-3,
        n_checkpoints=1,
        n_batches_for_norm_estimate=3,
        checkpoint_path=str(tmp_path),
    )
    for normalize in ("expected_average_only_in", "covariance_whitening"):
        sae = SampledTopKTrainingSAE(config(normalize_activations=normalize))
        trainer = SAETrainer(settings, sae, batches())
        trainer.fit()
        (folder,) = tmp_path.iterdir()
        with pytest.raises(
            ValueError, match=f"normalize_activations='{normalize}', which is not folded.*load_checkpoint"
        ):
            SAE.load_from_disk(folder)
        unfolded, folded = TrainingSAE.load_from_disk(folder), load_checkpoint(folder)
        scaler = SAETrainer(settings, SampledTopKTrainingSAE(sae.cfg), batches()).activation_scaler
        scaler.load(folder / "activation_scaler.json")
        batch = activations(30)
        torch.testing.assert_close(folded(batch), scaler.unscale(unfolded(scaler(batch))), rtol=1e-3, atol=1e-4)
        (folder / "activation_scaler.json").unlink()
        with pytest.raises(ValueError, match=r"activation_scaler.json is missing or empty; without it the SAE cannot"):
            load_checkpoint(folder)
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def test_folder_without_a_checkpoint_is_reported_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"^no readable training checkpoint in '.*'"):
        load_checkpoint(tmp_path)
    sampled_sae().save_model(tmp_path)
    assert isinstance(load_checkpoint(tmp_path), SampledTopKTrainingSAE)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"^no readable training checkpoint in '.*'"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("parameter", ["W_enc", "b_dec"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_exported(parameter, bad, tmp_path):
    sae = sampled_sae()
    train(sae, 2)
    weights = getattr(sae, parameter)
    weights.data.flatten()[:3] = bad
    message = rf"^3 of {weights.numel()} entries of {parameter} are not finite, so this SAE is unusable"
    with pytest.raises(ValueError, match=message):
        to_jumprelu(sae)
    with pytest.raises(ValueError, match=message):
        sae.save_inference_model(tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    with pytest.raises(ValueError, match=message):
        calibrate_thresholds(sae, activations(300), show_progress=False)


def test_learnt_thresholds_that_are_nan_are_not_exported():
    sae = sampled_sae()
    train(sae, 2)
    sae.rate_matcher.threshold.fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"^\d+ of {D_SAE} thresholds learnt in training are negative or NaN; take"):
        to_jumprelu(sae)


@pytest.mark.parametrize("inference_threshold", ["per_latent", "global"])
def test_an_sae_that_took_no_step_says_so_and_fires(inference_threshold):
    sae = sampled_sae(inference_threshold=inference_threshold)
    with pytest.warns(UserWarning, match="has taken no training step.*all are at most 0.*calibrate_thresholds"):
        exported = to_jumprelu(sae)
    assert (exported.encode(activations(30)) > 0).any()
    sae.rate_matcher.threshold.fill_(0.5)
    with pytest.warns(UserWarning, match="all are at most 0.5"):
        assert to_jumprelu(sae).threshold.tolist() == [0.5] * D_SAE


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("inference_threshold", ["per_latent", "global"])
def test_training_logs_l0_and_fvu_of_the_export(rescale, inference_threshold):
    sae = sampled_sae(rescale_acts_by_decoder_norm=rescale, inference_threshold=inference_threshold, pool_group_size=8)
    train(sae, 20)
    batch = activations(40)
    metrics = sae.training_forward_pass(step_input(batch)).metrics
    exported = to_jumprelu(sae)
    torch.testing.assert_close(metrics["export_l0"](), (exported.encode(batch) > 0).sum(dim=1).float().mean())
    fvu = fraction_of_variance_unexplained(batch, exported(batch).detach())
    torch.testing.assert_close(metrics["export_fvu"](), fvu)


def test_the_metrics_of_heads_are_those_of_their_flat_activations_and_look_at_some_tokens():
    x = activations(METRIC_TOKENS + 50)
    flat, heads = sampled_sae(), sampled_sae()
    for sae in (flat, heads):
        train(sae, 3)
    heads.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    heads.turn_on_forward_pass_hook_z_reshaping()
    broken = x.clone()
    broken[METRIC_TOKENS:] = torch.nan  # not read
    want = {name: metric().item() for name, metric in flat.export_metrics(x).items()}
    for given, sae in ((broken, flat), (broken.view(-1, 3, D_IN // 3), heads)):
        got = {name: metric().item() for name, metric in sae.export_metrics(given).items()}
        assert got == pytest.approx(want)


def test_logged_l0_counts_activations_however_small():
    sae, batch = sampled_sae(apply_b_dec_to_input=False), activations(64) * 1e-3
    sae.b_enc.data.zero_()
    for _ in range(30):
        sae.training_forward_pass(step_input(batch))
    acts = to_jumprelu(sae).encode(batch)
    assert acts.max() < 0.5
    l0 = (acts > 0).sum(dim=1).float().mean().item()
    assert l0 > 1
    assert sae.export_metrics(batch)["export_l0"]().item() == pytest.approx(l0)
