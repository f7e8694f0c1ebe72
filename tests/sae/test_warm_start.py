"""Warm start of a sampled_topk SAE from the weights of another training SAE."""

import pytest
import torch
from helpers import D_IN, D_SAE, K, activations, batchtopk_sae, config, sampled_sae, step_input, train
from sae_lens import (
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

from sae_lens_sampled import from_batchtopk, to_jumprelu

SIZES = {"d_in": D_IN, "d_sae": D_SAE, "k": K}


def trained_batchtopk():
    sae = batchtopk_sae(topk_threshold_lr=0.1)
    train(sae, 30)
    return sae


@pytest.mark.parametrize("from_folder", [True, False])
def test_with_a_pool_of_all_latents_it_goes_on_as_batchtopk_would(from_folder, tmp_path):
    theirs = trained_batchtopk()
    theirs.save_model(tmp_path)
    cfg = config(pool_factor=99, step="dense", topk_threshold_lr=0.1)
    ours = from_batchtopk(tmp_path if from_folder else theirs, cfg)
    assert train(ours, 5, first=30) == train(theirs, 5, first=30)


def test_before_a_step_it_is_exported_as_batchtopk_is():
    theirs = trained_batchtopk()
    with pytest.warns(UserWarning, match="has taken no training step"):
        ours = to_jumprelu(from_batchtopk(theirs, config(pool_group_size=8)))
    assert (to_jumprelu(theirs).encode(activations(40)) > 0).sum() == (ours.encode(activations(40)) > 0).sum() > 0


@pytest.mark.parametrize("topk_threshold_lr", [0.01, 0.1])
def test_a_global_threshold_is_the_mean_of_the_cutoffs_since_the_start(topk_threshold_lr):
    cfg = config(pool_factor=99, inference_threshold="global", topk_threshold_lr=topk_threshold_lr)
    ours, cutoffs = from_batchtopk(trained_batchtopk(), cfg), []
    for step in range(3):
        train(ours, 1, first=30 + step)
        cutoffs.append(ours.pool_record.cutoff.item())
    weights = torch.tensor([(1 - topk_threshold_lr) ** (2 - step) for step in range(3)])
    want = (weights * torch.tensor(cutoffs)).sum() / weights.sum()
    torch.testing.assert_close(ours.learnt_thresholds().float(), want.expand(D_SAE))


def test_statistics_are_new_and_the_source_stays_as_it_was():
    theirs = trained_batchtopk()
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    ours = from_batchtopk(theirs, config())
    assert ours.pool_record.n_steps == ours.pool_record.selection_counts.sum() == 0
    assert (ours.latent_threshold == theirs.topk_threshold.float()).all()
    train(ours, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("sae_class", "cfg_class", "fields"),
    [
        (TopKTrainingSAE, TopKTrainingSAEConfig, {}),
        (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig, {"matryoshka_widths": [8, D_SAE]}),
    ],
)
def test_topk_and_matryoshka_can_be_started_from(sae_class, cfg_class, fields):
    theirs = sae_class(cfg_class(**SIZES, **fields))
    ours = from_batchtopk(theirs, config())
    assert torch.equal(ours.W_enc, theirs.W_enc)
    assert ours.training_forward_pass(step_input(activations(20))).loss.isfinite()


def test_what_means_something_else_is_refused():
    with pytest.raises(ValueError, match=r"^a AbsTopKTrainingSAE cannot become a sampled_topk SAE"):
        from_batchtopk(AbsTopKTrainingSAE(AbsTopKTrainingSAEConfig(**SIZES)), config())
    with pytest.raises(ValueError, match=r"^a StandardTrainingSAE cannot become a sampled_topk SAE"):
        from_batchtopk(StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE)), config())
    with pytest.raises(ValueError, match=r"^d_sae=41 does not fit the source's weights, .* is 40; set that in cfg\.$"):
        from_batchtopk(batchtopk_sae(), config(d_sae=41))
    with pytest.raises(ValueError, match=r"^rescale_acts_by_decoder_norm=False does not fit the source's weights"):
        from_batchtopk(batchtopk_sae(), config(rescale_acts_by_decoder_norm=False))


def test_from_a_sampled_topk_sae_its_thresholds_and_cutoff_are_taken():
    theirs = sampled_sae(pool_factor=99)
    train(theirs, 10)
    ours = from_batchtopk(theirs, config(pool_factor=4))
    assert torch.equal(ours.latent_threshold, theirs.latent_threshold)
    assert ours.pool_record.cutoff == theirs.pool_record.cutoff > 0
