"""Transcoders: checkpoints, exports, calibration, and uploads to the Hub."""

import pytest
import torch
from helpers import D_IN, D_SAE, activations, step_input
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder
from transcoder_helpers import batch, trained, transcoder, variants

from sae_lens_sampled import SampledTopKTranscoder, calibrate_thresholds, load_checkpoint, to_jumprelu, upload_to_hub
from sae_lens_sampled.metrics import fraction_of_variance_unexplained
from sae_lens_sampled.sae.reconstruction import encode_and_reconstruct


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@variants
def test_checkpoints_keep_every_bit_and_go_on(tmp_path, fields, dtype):
    made = trained(3, dtype=dtype, **fields)
    made.save_model(tmp_path)
    for loaded in (TrainingSAE.load_from_disk(tmp_path), load_checkpoint(tmp_path)):
        assert type(loaded) is SampledTopKTranscoder
        assert loaded.cfg.to_dict() == made.cfg.to_dict()
        for name, tensor in made.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    resumed = transcoder(dtype=dtype, **fields)
    resumed.load_weights_from_checkpoint(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        steps = [each.training_forward_pass(step_input(batch(30, seed=50))) for each in (made, resumed)]
    assert torch.equal(steps[0].loss, steps[1].loss)
    assert steps[0].loss.isfinite()


@variants
def test_the_export_is_saelens_transcoder_and_does_what_training_did(tmp_path, fields):
    made = trained(400, **fields)
    exported = to_jumprelu(made)
    assert type(exported) is (JumpReLUSkipTranscoder if made.cfg.skip else JumpReLUTranscoder)
    torch.testing.assert_close(exported.W_dec.norm(dim=1), torch.ones(D_SAE))
    made.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    x, _ = made.inputs_and_targets(batch(2048, seed=777))
    assert torch.equal(loaded(x), exported(x))
    acts, y_hat = encode_and_reconstruct(exported, x)
    assert torch.equal(y_hat, exported.forward_with_activations(x)[0])
    with torch.no_grad():
        in_training = torch.cat([made.encode(part) for part in x.split(64)])
        selected, reconstructed = (in_training > 0).sum(), made(x[:64])
    torch.testing.assert_close(reconstructed, encode_and_reconstruct(made, x[:64])[1])
    assert (acts > 0).sum() / selected == pytest.approx(1, abs=0.1)
    # The metrics logged in training.
    metrics = made.training_forward_pass(step_input(batch(100, seed=778))).metrics
    few = batch(100, seed=778)
    l0 = (to_jumprelu(made).encode(few[:, :D_IN]) > 0).sum(dim=1).float().mean()
    assert metrics["export_l0"]().item() == pytest.approx(l0.item(), abs=0.1)
    fvu = fraction_of_variance_unexplained(few[:, D_IN:], to_jumprelu(made)(few[:, :D_IN]))
    assert metrics["export_fvu"]().item() == pytest.approx(fvu.item(), rel=0.02)


def test_pruning_leaves_outputs_as_they_are():
    made = trained(30, skip=True)
    thresholds = made.latent_threshold.clone()
    thresholds[[2, 5, 31]] = torch.inf
    whole, pruned = (to_jumprelu(made, thresholds, prune=prune) for prune in (False, True))
    x = batch(50)[:, :D_IN]
    assert pruned.cfg.d_sae == D_SAE - 3
    assert pruned.cfg.metadata.unpruned_d_sae == D_SAE
    torch.testing.assert_close(pruned(x), whole(x))


@pytest.mark.parametrize("mode", ["per_latent", "global"])
def test_calibration_reaches_the_wanted_l0_and_reports_the_fvu_of_outputs(mode):
    made = trained(50, skip=True, pool_factor=5, pool_group_size=8)
    given = [batch(64, seed=300 + i) for i in range(6)]
    exported, report = calibrate_thresholds(made, given, mode=mode, target_l0=2.5, show_progress=False)
    x, y = made.inputs_and_targets(torch.cat(given))
    assert (exported.encode(x) > 0).sum() == 2.5 * len(x)
    assert report.fvu_after == pytest.approx(fraction_of_variance_unexplained(y, exported(x)).item(), rel=1e-5)
    assert report.fvu_before == pytest.approx(
        fraction_of_variance_unexplained(y, to_jumprelu(made)(x)).item(), rel=1e-5
    )
    with pytest.raises(ValueError, match=r"must have last dimension d_in \+ d_out=19"):
        calibrate_thresholds(made, activations(300), show_progress=False)


def test_the_hub_gets_a_card_that_says_what_it_reads_and_writes(tmp_path):
    made = trained(3, hook_name_out="blocks.1.hook_mlp_out")
    made.cfg.metadata.hook_name = "blocks.1.ln2.hook_normalized"
    upload_to_hub({"one": made}, "user/name", dry_run_folder=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "from `blocks.1.ln2.hook_normalized`; `sae(activations)` reconstructs `blocks.1.hook_mlp_out`." in card
    assert "sampled-sae" in card
    assert "| `one` | sampled_topk_transcoder | 40 | 3 |" in card
    loaded = SAE.load_from_disk(tmp_path / "out" / "one")
    assert type(loaded) is JumpReLUTranscoder
    assert loaded.cfg.metadata.hook_name_out == "blocks.1.hook_mlp_out"
