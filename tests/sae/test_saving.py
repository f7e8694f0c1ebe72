import pytest
import torch
from helpers import D_SAE, activations, batchtopk_sae, sampled_sae, step_input, train
from sae_lens import SAE, JumpReLUSAE
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import load_file

from sae_lens_sampled import SampledTopKTrainingSAE, load_checkpoint


def trained(**fields):
    sae = sampled_sae(**fields)
    train(sae, 4)
    # Values that only survive at full precision: integers that float32 cannot hold, and a number not in bfloat16.
    sae.pool_record.selection_counts[3] = 2**24 + 1
    sae.pool_record.selection_counts[4] = 2**53 + 1
    sae.pool_record.n_steps.fill_(16_777_217)
    sae.topk_threshold = torch.tensor(0.1234567890123456, dtype=torch.float64)
    return sae


def assert_same_buffers(got, want):
    want = dict(want.named_buffers())
    assert dict(got.named_buffers()).keys() == want.keys()
    for name, buffer in got.named_buffers():
        assert buffer.dtype == want[name].dtype, name
        assert torch.equal(buffer, want[name]), name


def assert_same_parameters(got, want):
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))


@pytest.mark.conformance(12)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_training_checkpoint_round_trip_keeps_every_bit(tmp_path, dtype):
    sae = trained(dtype=dtype, pool_sampling="proportional", pool_group_size=5)
    sae.save_model(tmp_path)
    for again in (TrainingSAE.load_from_disk(tmp_path), SampledTopKTrainingSAE(sae.cfg)):
        again.load_weights_from_checkpoint(tmp_path)
        assert type(again) is SampledTopKTrainingSAE
        assert_same_parameters(again, sae)
        assert_same_buffers(again, sae)
    from_disk = TrainingSAE.load_from_disk(tmp_path)
    assert_same_buffers(from_disk, sae)
    assert from_disk.cfg.to_dict() == sae.cfg.to_dict()
    batch = step_input(activations(20))
    assert torch.equal(from_disk.training_forward_pass(batch).loss, sae.training_forward_pass(batch).loss)
    assert_same_buffers(from_disk, sae)


@pytest.mark.parametrize("step", ["kept", "dense"])
def test_a_kept_step_lays_the_encoder_out_by_latent_and_files_do_not_show_it(tmp_path, step):
    sae = sampled_sae(pool_group_size=5, step=step)
    before = sae.W_enc.detach().clone()
    output = sae.training_forward_pass(step_input(activations(20)))
    assert output.path == step
    assert torch.equal(sae.W_enc, before)
    assert sae.W_enc.is_contiguous() == (step == "dense")
    output.loss.backward()
    assert sae.W_enc.grad.stride() == sae.W_enc.stride()  # otherwise every step copies it
    sae.save_model(tmp_path / "checkpoint")
    sae.save_inference_model(tmp_path / "export")  # whose decoder rows have norm 1
    for folder, factor in (("checkpoint", 1), ("export", sae.W_dec.norm(dim=1))):
        saved = load_file(tmp_path / folder / "sae_weights.safetensors")["W_enc"]
        torch.testing.assert_close(saved, sae.W_enc.detach() * factor)


def test_loading_in_another_dtype_casts_weights_only(tmp_path):
    sae = trained()
    sae.save_model(tmp_path)
    again = TrainingSAE.load_from_disk(tmp_path, dtype="bfloat16")
    assert again.W_enc.dtype == torch.bfloat16
    assert_same_buffers(again, sae)


@pytest.mark.parametrize(
    "cast", [lambda s: s.to(torch.bfloat16), lambda s: s.half(), lambda s: s.to("cpu", torch.float64)]
)
def test_moving_to_another_dtype_casts_weights_only(cast):
    sae, want = trained(), trained()
    assert cast(sae) is sae
    assert sae.W_enc.dtype != torch.float32
    assert_same_buffers(sae, want)


def test_moving_to_the_meta_device_and_back_keeps_the_dtypes():
    sae = trained().to("meta").to(torch.bfloat16).to_empty(device="cpu")
    assert {name: b.dtype for name, b in sae.named_buffers()} == {
        name: b.dtype for name, b in trained().named_buffers()
    }


@pytest.mark.conformance(7)
def test_folding_a_scaling_factor_scales_the_threshold_only_where_the_decoder_norm_counts():
    for rescale in (True, False):
        sae = trained(rescale_acts_by_decoder_norm=rescale)
        before = sae.topk_threshold.item()
        sae.fold_activation_norm_scaling_factor(4.0)
        assert sae.topk_threshold.item() == pytest.approx(before / 4 if rescale else before)


@pytest.mark.conformance(5)
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 7}, {"pool_factor": 99}], ids=str)
def test_exported_sae_is_a_jumprelu_in_plain_saelens(tmp_path, rescale, fields):
    sae = sampled_sae(rescale_acts_by_decoder_norm=rescale, **fields)
    train(sae, 4)
    sae.save_inference_model(tmp_path)
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
    exported = SAE.load_from_disk(tmp_path)
    assert type(exported) is JumpReLUSAE
    torch.testing.assert_close(exported.W_dec.norm(dim=1), torch.ones(D_SAE))
    batch = activations(30)
    units = 1.0 if rescale else sae.W_dec.norm(dim=1)
    hidden_pre = sae.encode_with_hidden_pre(batch)[1].relu()
    fires = hidden_pre * units > exported.threshold
    assert 0 < fires.sum() < 30 * D_SAE / 2
    torch.testing.assert_close(exported.encode(batch), hidden_pre * units * fires)
    torch.testing.assert_close(exported(batch), sae.decode(hidden_pre * fires))


def test_saving_leaves_the_live_sae_alone(tmp_path):
    sae, want = trained(), trained()
    sae.save_model(tmp_path / "checkpoint")
    sae.save_inference_model(tmp_path / "exported")
    assert_same_parameters(sae, want)
    assert_same_buffers(sae, want)


def test_truncated_checkpoint_is_reported_in_one_sentence(tmp_path):
    sae = trained()
    sae.save_model(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"^no readable checkpoint in '.*': .*"):
        sae.load_weights_from_checkpoint(tmp_path)


def test_missing_checkpoint_is_reported_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"^no readable checkpoint in '.*nowhere': No such file"):
        trained().load_weights_from_checkpoint(tmp_path / "nowhere")


def test_checkpoint_of_another_architecture_is_reported_in_one_sentence(tmp_path):
    batchtopk_sae().save_model(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds a 'batchtopk' SAE, which cannot be resumed as 'sampled_topk'; .*from_b"
    ):
        trained().load_weights_from_checkpoint(tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(ValueError, match=r"does not fit the SAE: 'topk_threshold' is 1 bytes long"):
        trained().load_weights_from_checkpoint(tmp_path)


def test_checkpoint_of_another_width_is_reported_in_one_sentence(tmp_path):
    trained(d_sae=D_SAE + 1).save_model(tmp_path)
    with pytest.raises(ValueError, match=r"^d_sae=40, but '.*' was trained with d_sae=41: its weights do not fit"):
        trained().load_weights_from_checkpoint(tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(ValueError, match=r"'pool_record.selection_counts' is 328 bytes long, expected 320 bytes"):
        trained().load_weights_from_checkpoint(tmp_path)


def test_exported_sae_as_a_checkpoint_is_reported_in_one_sentence(tmp_path):
    sae = trained()
    sae.save_inference_model(tmp_path)
    with pytest.raises(ValueError, match=r"holds a 'jumprelu' SAE.*exported for inference cannot be trained further"):
        sae.load_weights_from_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"exported for inference, not a training checkpoint; pass the folder of a"):
        load_checkpoint(tmp_path)
