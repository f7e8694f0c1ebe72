import pytest
import torch
from helpers import activations, batchtopk_sae, sampled_sae, train

from sae_lens_sampled import to_jumprelu
from sae_lens_sampled.saebench.sources import load_saes

X = activations(50, seed=7)


def trained():
    sae = sampled_sae()
    train(sae, 5)
    return sae


def test_object_folder_and_checkpoint_are_the_same_sae(tmp_path):
    sae = trained()
    sae.save_inference_model(tmp_path / "exported")
    sae.save_model(tmp_path / "checkpoint")
    saes = load_saes([("object", sae), tmp_path / "exported", tmp_path / "checkpoint"])
    want = to_jumprelu(sae).encode(X)
    for loaded in saes:
        torch.testing.assert_close(loaded.sae.encode(X), want)
        assert loaded.sae_class == "sampled_topk"
    assert [loaded.name for loaded in saes] == ["object_custom_sae", "exported_custom_sae", "checkpoint_custom_sae"]
    assert [loaded.training_sae is None for loaded in saes] == [False, True, False]


def test_fingerprint_follows_the_weights_and_nothing_else():
    sae = trained()
    first, again = load_saes([("a", sae)])[0], load_saes([("b", sae)])[0]
    assert first.fingerprint == again.fingerprint
    sae.b_dec.data[0] += 1e-3
    assert load_saes([("a", sae)])[0].fingerprint != first.fingerprint


def test_callers_sae_is_left_alone_and_decoder_rows_come_out_unit_norm():
    sae = batchtopk_sae()
    train(sae, 3)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    [loaded] = load_saes([sae])
    torch.testing.assert_close(loaded.sae.W_dec.norm(dim=1), torch.ones(sae.cfg.d_sae))
    loaded.sae.W_dec.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


def test_saes_that_cannot_be_evaluated_are_refused(tmp_path):
    with pytest.raises(ValueError, match="saes is empty"):
        load_saes([])
    with pytest.raises(ValueError, match="two SAEs are called 'a_custom_sae'"):
        load_saes([("a", trained()), ("a", trained())])
    with pytest.raises(ValueError, match="is not a folder"):
        load_saes([tmp_path / "missing"])
    with pytest.raises(ValueError, match="holds no SAE"):
        load_saes([tmp_path])
    with pytest.raises(ValueError, match="not folded"):
        load_saes([sampled_sae(normalize_activations="expected_average_only_in")])
