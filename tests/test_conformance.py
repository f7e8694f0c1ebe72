"""What SAELens requires of a training architecture, distilled from its own tests.

 1 activation: exactly int(k * tokens) entries, none negative; any input shape, uneven rows, float k
 2 config: round trips, provenance metadata, inference config, errors
 3 initialisation: shapes, non-zero weights, zero biases and threshold
 4 threshold: moves in training, is logged, is exported as one vector
 5 export: a JumpReLU with unit decoder rows, equal to the training SAE on the batch it was calibrated on
 6 folding decoder norms: same outputs, an error where unsafe, no NaN from zero rows
 7 folding normalisation: same outputs, thresholds follow
 8 limit: equal to the simpler architecture (BatchTopK)
 9 auxiliary loss: zero without dead latents, equal to its definition otherwise, gradient to dead latents only
10 hooks: the cache holds the step's tensors
11 three-dimensional input is its flattened rows
12 checkpoints: everything is restored; counters and scaler continue; final metadata
13 runner: end to end, prefetch, override_sae, no output path
14 command line: arguments parsed for the architecture; loading via the meta device
15 trainer: callable metrics, autocast, L0 metadata, the loss falls
16 several SAEs trained at once equal separate runs

Points 1, 4 and 5 are tested here with a pool of all latents; `test_training.py` tests point 1 with smaller pools. Tests
of a point in other files carry its number as a marker.
"""

import re
from pathlib import Path

import pytest
import torch
from helpers import D_IN, D_SAE, K, activations, config, randomise, sampled_sae, step_input, train
from sae_lens import SAE, JumpReLUSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig, to_jumprelu

ALL = D_SAE / K
"""The pool factor at which every latent is a candidate."""


def test_every_point_has_a_test():
    text = "".join(path.read_text() for path in Path(__file__).parent.rglob("test_*.py"))
    assert {int(point) for point in re.findall(r"mark\.conformance\((\d+)\)", text)} == set(range(1, 17))


@pytest.mark.conformance(1)
@pytest.mark.parametrize("k", [K, 2.7, 0.4])
@pytest.mark.parametrize("shape", [(), (1,), (33,), (4, 9), (2, 3, 5)], ids=str)
def test_pool_of_all_latents_keeps_exactly_the_budget(k, shape):
    sae = sampled_sae(k=k, pool_factor=D_SAE / k)
    batch = activations(*shape) + 3
    acts = sae.encode(batch)
    n_tokens = batch[..., 0].numel()
    assert acts.shape == (*shape, D_SAE)
    assert (acts >= 0).all()
    assert (acts > 0).sum() == int(k * n_tokens)


@pytest.mark.conformance(1)
def test_large_rows_may_take_the_budget_of_small_ones():
    sae = sampled_sae(pool_factor=ALL)
    batch = torch.cat([activations(5) * 100, activations(5, seed=1) * 0.01])
    per_row = (sae.encode(batch) > 0).sum(dim=1)
    assert per_row[:5].sum() > per_row[5:].sum()
    assert per_row.sum() == K * 10


@pytest.mark.conformance(3)
def test_initial_weights_and_buffers():
    sae = SampledTopKTrainingSAE(config(decoder_init_norm=0.1))
    assert (sae.W_enc.shape, sae.W_dec.shape) == ((D_IN, D_SAE), (D_SAE, D_IN))
    assert (sae.b_enc.shape, sae.b_dec.shape) == ((D_SAE,), (D_IN,))
    assert (sae.W_enc != 0).any()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((D_SAE,), 0.1))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T)
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert sae.topk_threshold.shape == ()
    ones = {"rate_matcher.precision", "rate_matcher.gain"}  # no evidence against any latent yet
    for name, buffer in sae.named_buffers():
        assert torch.equal(buffer, torch.full_like(buffer, name in ones)), name


@pytest.mark.conformance(4)
def test_threshold_moves_is_logged_and_becomes_a_constant_vector():
    sae = sampled_sae(pool_factor=ALL, inference_threshold="global")
    output = sae.training_forward_pass(step_input(activations(20)))
    smallest = output.feature_acts.to_dense()[output.feature_acts.to_dense() > 0].min().double()
    torch.testing.assert_close(sae.topk_threshold, 0.01 * smallest)
    assert output.metrics["topk_threshold"] is sae.topk_threshold
    state_dict = sae.state_dict()
    sae.process_state_dict_for_saving_inference(state_dict)
    assert "topk_threshold" not in state_dict
    # The export corrects the bias of a running mean that starts at 0.
    torch.testing.assert_close(state_dict["threshold"], torch.full((D_SAE,), smallest.item()))


@pytest.mark.conformance(5)
@pytest.mark.parametrize("rescale", [True, False])
def test_export_equals_the_training_sae_on_the_batch_it_was_calibrated_on(tmp_path, rescale):
    sae = sampled_sae(pool_factor=ALL, topk_threshold_lr=0.02, rescale_acts_by_decoder_norm=rescale)
    batch = activations(20)
    for _ in range(500):
        sae.training_forward_pass(step_input(batch))
    sae.save_inference_model(tmp_path)
    exported = SAE.load_from_disk(tmp_path)
    assert type(exported) is JumpReLUSAE
    torch.testing.assert_close(exported.W_dec.norm(dim=1), torch.ones(D_SAE))
    units = 1.0 if rescale else sae.W_dec.norm(dim=1)
    torch.testing.assert_close(exported.encode(batch), sae.encode(batch) * units)
    torch.testing.assert_close(exported.decode(exported.encode(batch)), sae.decode(sae.encode(batch)))
    torch.testing.assert_close(exported(batch), sae(batch))


@pytest.mark.conformance(6)
@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 8}, {"pool_factor": ALL}], ids=str)
def test_folding_decoder_norms_changes_no_output(fields):
    sae, batch = sampled_sae(**fields), activations(20)
    acts, out = sae.encode(batch), sae(batch)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(sae.encode(batch), acts)
    torch.testing.assert_close(sae(batch), out)


@pytest.mark.conformance(6)
def test_folding_decoder_norms_is_refused_where_they_do_not_rescale():
    with pytest.raises(NotImplementedError, match="rescale_acts_by_decoder_norm is False"):
        sampled_sae(rescale_acts_by_decoder_norm=False).fold_W_dec_norm()


@pytest.mark.conformance(6)
def test_folding_a_zero_decoder_row_gives_no_nan():
    sae = sampled_sae()
    sae.W_dec.data[4] = 0
    sae.fold_W_dec_norm()
    assert all(parameter.isfinite().all() for parameter in sae.parameters())


@pytest.mark.conformance(7)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 8}], ids=str)
def test_folding_a_scaling_factor_changes_no_output(rescale, fields):
    sae, batch = sampled_sae(rescale_acts_by_decoder_norm=rescale, **fields), activations(20)
    train(sae, 3)
    acts, out = sae.encode(batch * 2), sae(batch * 2)
    exported = to_jumprelu(sae)
    sae.fold_activation_norm_scaling_factor(2.0)
    # Rescaled activations are in units of the input, which is now half as large.
    torch.testing.assert_close(sae.encode(batch), acts / 2 if rescale else acts)
    torch.testing.assert_close(sae(batch), out / 2)
    folded = to_jumprelu(sae)
    assert 0 < (folded.encode(batch) > 0).sum() < 20 * D_SAE / 2
    torch.testing.assert_close(folded.encode(batch), exported.encode(batch * 2) / 2)
    torch.testing.assert_close(folded(batch), exported(batch * 2) / 2)


@pytest.mark.conformance(7)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_folding_a_whitening_changes_no_output(rescale, apply_b_dec):
    fields = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": apply_b_dec, "dtype": "float64"}
    sae, batch = sampled_sae(**fields), activations(40).double()
    mean, matrix = torch.randn(D_IN).double(), torch.randn(D_IN, D_IN).double()
    whitened = (batch - mean) @ matrix
    acts, out = sae.encode(whitened), sae(whitened)
    sae.fold_activation_whitening(mean, matrix, torch.linalg.inv(matrix))
    torch.testing.assert_close(sae.encode(batch), acts)
    torch.testing.assert_close(sae(batch), out @ torch.linalg.inv(matrix) + mean)


@pytest.mark.conformance(9)
def test_auxiliary_loss_is_zero_without_dead_latents():
    sae = sampled_sae()
    for mask in (None, torch.zeros(D_SAE, dtype=torch.bool)):
        data = step_input(activations(20))
        data.dead_neuron_mask = mask
        assert sae.training_forward_pass(data).losses["auxiliary_reconstruction_loss"] == 0


@pytest.mark.conformance(9)
def test_auxiliary_loss_is_the_same_after_folding_decoder_norms():
    losses = []
    for fold in (False, True):
        sae = sampled_sae()
        if fold:
            sae.fold_W_dec_norm()
        losses.append(sae.training_forward_pass(step_input(activations(20), n_dead=7)).loss)
    torch.testing.assert_close(losses[0], losses[1])


def batches():
    for step in range(10**6):
        yield activations(64, seed=step)


def trainer_config(total_steps=20, **fields):
    return SAETrainerConfig(
        **{
            "total_training_samples": total_steps * 64,
            "train_batch_size_samples": 64,
            "lr": 1e-3,
            "lr_end": 1e-3,
            "dead_feature_window": 4,
            "n_batches_for_norm_estimate": 3,
            **fields,
        }
    )


@pytest.mark.conformance(12)
def test_checkpoints_keep_the_scaler_until_the_final_fold(tmp_path):
    sae = sampled_sae(normalize_activations="expected_average_only_in")
    cfg = trainer_config(checkpoint_path=str(tmp_path), n_checkpoints=1, save_final_checkpoint=True)
    trainer = SAETrainer(cfg, sae, batches())
    trainer.fit()
    middle, final = sorted(tmp_path.iterdir(), key=lambda path: path.name.startswith("final"))
    assert '"scaling_factor": null' in (final / "activation_scaler.json").read_text()
    resumed = SAETrainer(cfg, sampled_sae(normalize_activations="expected_average_only_in"), batches())
    resumed.load_trainer_state(middle)
    scaling_factor = resumed.activation_scaler.scaling_factor
    assert scaling_factor not in (None, 1.0)
    assert resumed.n_training_samples == int(middle.name)

    unfolded, folded = TrainingSAE.load_from_disk(middle), TrainingSAE.load_from_disk(final)
    assert unfolded.cfg.normalize_activations == "expected_average_only_in"
    assert folded.cfg.normalize_activations == "none"
    assert folded.cfg.metadata.l0 == pytest.approx(K)
    assert folded.cfg.metadata.num_dead_features == trainer.dead_neurons.sum()


@pytest.mark.conformance(14)
def test_command_line_parses_the_architecture_with_its_fields():
    cfg = _parse_cfg_args(
        [
            "--architecture",
            "sampled_topk",
            "--d_in",
            "64",
            "--d_sae",
            "256",
            "--k",
            "2.5",
            "--pool_factor",
            "3",
            "--score",
            "entropy",
            "--pool_sampling",
            "proportional",
            "--pool_group_size",
            "16",
            "--pool_seed",
            "7",
            "--resume_from_checkpoint",
            "here",
        ]
    )
    want = SampledTopKTrainingSAEConfig(
        d_in=64,
        d_sae=256,
        k=2.5,
        pool_factor=3,
        score="entropy",
        pool_sampling="proportional",
        pool_group_size=16,
        pool_seed=7,
    )
    assert cfg.sae == want
    assert cfg.resume_from_checkpoint == "here"
    default = _parse_cfg_args(["--architecture", "sampled_topk"]).sae
    assert default == SampledTopKTrainingSAEConfig(d_in=512, d_sae=1024)


@pytest.mark.conformance(14)
def test_construction_on_the_meta_device_touches_no_value():
    sae = SampledTopKTrainingSAE(config(device="meta", pool_sampling="proportional"))
    assert all(tensor.is_meta for tensor in [*sae.parameters(), *sae.buffers()])


@pytest.mark.conformance(15)
@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 16}], ids=str)
def test_loss_falls_on_a_repeated_batch_and_metadata_has_the_trained_l0(fields):
    sae, batch = sampled_sae(**fields), activations(64)
    first = sae.training_forward_pass(step_input(batch)).losses["mse_loss"].item()
    trainer = SAETrainer(trainer_config(50, lr=1e-2, lr_end=1e-2), sae, iter(lambda: batch, None))
    trainer.fit()
    assert sae.training_forward_pass(step_input(batch)).losses["mse_loss"] < 0.5 * first
    assert sae.cfg.metadata.l0 == pytest.approx(K)
    fired = trainer.n_forward_passes_since_fired == 0
    assert torch.equal(fired, (sae.encode(batch) > 0).any(dim=0))


@pytest.mark.conformance(16)
def test_several_saes_at_once_equal_single_runs():
    variants = {"one": {}, "grouped": {"pool_group_size": 8}, "drawn": {"pool_sampling": "proportional"}}
    saes = {name: sampled_sae(**fields) for name, fields in variants.items()}
    hooks = dict.fromkeys(variants, "hook")
    MultiSAETrainer(trainer_config(), saes, hooks, ({"hook": batch} for batch in batches())).fit()
    for name, fields in variants.items():
        single = sampled_sae(**fields)
        SAETrainer(trainer_config(), single, batches()).fit()
        for key, tensor in single.state_dict().items():
            assert torch.equal(saes[name].state_dict()[key], tensor), (name, key)


def test_randomised_weights_have_uneven_decoder_norms():
    """The tests above rely on this."""
    sae = SampledTopKTrainingSAE(config())
    randomise(sae)
    assert sae.W_dec.norm(dim=1).std() > 0.1
