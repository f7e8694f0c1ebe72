"""Nested (Matryoshka) losses inside the pool."""

import pytest
import torch
from helpers import (
    D_IN,
    D_SAE,
    K,
    activations,
    assert_equal_training,
    config,
    gradients,
    randomise,
    sampled_sae,
    step_input,
    train,
)
from sae_lens import SAE, MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE
from step_helpers import ALL, an_sae, assert_equal_steps, on_both_paths, step

from sae_lens_sampled import from_batchtopk
from sae_lens_sampled.step.sparse_codes import Entries, Weights, encode_and_decode

WIDTHS = [4, 13, D_SAE]
NESTED = {"matryoshka_widths": [10, 60, 200]}
"""Config fields for `an_sae`, which has 200 latents."""


def matryoshka_sae(**fields):
    given = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "aux_loss_coefficient": 1 / 32, "matryoshka_widths": list(WIDTHS)}
    sae = MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**{**given, **fields}))
    randomise(sae)
    return sae


FIELDS = [{}, {"rescale_acts_by_decoder_norm": False}, {"k": 2.7}, {"apply_b_dec_to_input": False}]


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_pool_of_all_latents_is_saelens_matryoshka_to_the_last_bit(bfloat16, fields):
    """Activations, losses, all gradients and weights, and the threshold, over 20 training steps with dead latents."""
    ours = sampled_sae(pool_factor=D_SAE, matryoshka_widths=WIDTHS, step="dense", **fields)
    theirs = matryoshka_sae(**fields)
    assert_equal_training(ours, theirs, bfloat16)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_on_the_kept_entries_it_is_saelens_matryoshka_up_to_rounding(fields):
    ours = sampled_sae(pool_factor=D_SAE, matryoshka_widths=WIDTHS, step="kept", **fields).double()
    theirs = matryoshka_sae(**fields).double()
    optimizers = [torch.optim.Adam(sae.parameters(), lr=1e-2) for sae in (ours, theirs)]
    for number in range(20):
        batch = activations(31, seed=number).double()
        mine, want = (sae.training_forward_pass(step_input(batch, n_dead=number % 9)) for sae in (ours, theirs))
        assert mine.feature_acts.is_sparse
        torch.testing.assert_close(mine.losses, want.losses)
        torch.testing.assert_close(gradients(ours, mine), gradients(theirs, want), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(ours.topk_threshold, theirs.topk_threshold)
        for optimizer in optimizers:
            optimizer.step()


def test_on_the_kept_entries_under_autocast_the_losses_are_saelens_matryoshka_losses():
    ours, theirs = sampled_sae(pool_factor=D_SAE, matryoshka_widths=WIDTHS, step="kept"), matryoshka_sae()
    with torch.autocast("cpu", torch.bfloat16):
        mine, want = (sae.training_forward_pass(step_input(activations(31), n_dead=6)) for sae in (ours, theirs))
    torch.testing.assert_close(mine.losses, want.losses, rtol=2e-2, atol=0, check_dtype=False)


@pytest.mark.parametrize("step_name", ["kept", "dense"])
@pytest.mark.parametrize("pool", [{"pool_factor": 5}, {"pool_factor": 10, "pool_group_size": 16}, ALL], ids=str)
def test_one_level_equals_no_levels_to_the_last_bit(step_name, pool):
    plain = an_sae(step=step_name, **pool)
    nested = an_sae(step=step_name, matryoshka_widths=[200], **pool)
    for number in range(3):
        mine, want = (step(sae, activations(50, seed=number), 30, number) for sae in (nested, plain))
        assert list(mine.losses) == list(want.losses)
        assert torch.equal(mine.loss, want.loss)
        mine_gradients, want_gradients = gradients(nested, mine), gradients(plain, want)
        assert all(torch.equal(mine_gradients[name], want_gradients[name]) for name in want_gradients)


@pytest.mark.parametrize(
    "pool",
    [{"pool_factor": 5}, {"pool_factor": 30}, {"pool_factor": 10, "pool_group_size": 16}, ALL],
    ids=["columns", "one pool", "groups", "all"],
)
@pytest.mark.parametrize("rescale", [True, False])
def test_every_path_gives_the_same_numbers(pool, rescale):
    def run(sae):
        for number in range(2):
            step(sae, activations(50, seed=number), 30, number)
        return step(sae, activations(50, seed=9), 30, 3)

    sae = an_sae(rescale_acts_by_decoder_norm=rescale, **NESTED, **pool)
    assert_equal_steps(*on_both_paths(sae, run), rtol=1e-4, atol=1e-5)


def test_inner_losses_are_of_the_first_latents_alone():
    """Compared with plain loops over the kept activations."""
    sae = an_sae(pool_factor=10, pool_group_size=16, **NESTED)
    output = step(sae, x := activations(20))
    acts, norms = output.feature_acts.to_dense().tolist(), sae.W_dec.norm(dim=1).tolist()
    W_dec, b_dec = sae.W_dec.tolist(), sae.b_dec.tolist()
    for width in (10, 60):
        total = 0.0
        for row, inputs in zip(acts, x.tolist(), strict=True):
            for i in range(D_IN):
                reconstruction = b_dec[i] + sum(row[j] / norms[j] * W_dec[j][i] for j in range(width) if row[j])
                total += (inputs[i] - reconstruction) ** 2
        assert output.losses[f"inner_mse_loss_{width}"].item() == pytest.approx(total / 20, rel=1e-4)
    assert output.loss.item() == pytest.approx(sum(value.item() for value in output.losses.values()))


def test_the_coefficient_weighs_the_inner_losses():
    plain, light, none = (an_sae(inner_loss_coefficient=weight, **NESTED) for weight in (1, 0.25, 0))
    (full, quarter, zero) = (step(sae, activations(50)) for sae in (plain, light, none))
    inner = full.losses["inner_mse_loss_10"] + full.losses["inner_mse_loss_60"]
    torch.testing.assert_close(full.loss - zero.loss, inner)
    torch.testing.assert_close(quarter.loss - zero.loss, 0.25 * inner)
    torch.testing.assert_close(quarter.losses, full.losses)  # the logged losses are not weighted


@pytest.mark.parametrize("path", ["kept", "dense"])
@pytest.mark.parametrize("resumed", [False, True])
def test_inner_losses_end_after_their_steps_and_a_checkpoint_counts_them(path, resumed, tmp_path):
    ending, endless, plain = (
        an_sae(step=path, **NESTED, **fields)
        for fields in ({"inner_loss_steps": 2}, {}, {"inner_loss_coefficient": 0.0})
    )
    for number in range(2):
        mine, theirs = (gradients(sae, step(sae, activations(50, seed=number))) for sae in (ending, endless))
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    if resumed:
        ending.save_model(tmp_path)
        ending = an_sae(step=path, **NESTED, inner_loss_steps=2)
        ending.load_weights_from_checkpoint(tmp_path)
    output, without = (step(sae, activations(50, seed=9)) for sae in (ending, plain))
    assert torch.equal(output.loss, without.loss)
    assert output.losses["inner_mse_loss_10"] > 0  # still logged
    mine, theirs = gradients(ending, output), gradients(plain, without)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_decoding_by_levels_has_the_gradients_of_differences():
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double).requires_grad_()

    tokens, latents = torch.tensor([0, 0, 0, 1, 3, 3]), torch.tensor([0, 3, 4, 2, 1, 4])

    def function(x, W_enc, b_enc, W_dec):
        weights = Weights(W_enc, b_enc, W_dec, W_dec.norm(dim=1))
        with torch.no_grad():
            values = weights.hidden_pre(x)[tokens, latents]
        codes, reconstructions, _ = encode_and_decode(x, weights, Entries(values, tokens, latents), [1, 3])
        assert reconstructions.shape == (3, 4, 3)
        return codes.values, reconstructions

    assert torch.autograd.gradcheck(function, (drawn(4, 3), drawn(3, 5), drawn(5), drawn(5, 3)))


@pytest.mark.parametrize("pool", [{"pool_factor": 5}, {"pool_factor": 10, "pool_group_size": 16}, ALL], ids=str)
@pytest.mark.parametrize("step_name", ["kept", "dense"])
def test_leading_dimensions_are_rows(pool, step_name):
    """SAELens' own Matryoshka SAE slices the tokens of three-dimensional input instead of the latents."""
    flat, folded = an_sae(step=step_name, **NESTED, **pool), an_sae(step=step_name, **NESTED, **pool)
    want, got = step(flat, activations(48)), step(folded, activations(48).view(4, 12, D_IN))
    torch.testing.assert_close(got.losses, want.losses)
    torch.testing.assert_close(gradients(folded, got), gradients(flat, want))


@pytest.mark.parametrize("step_name", ["kept", "dense"])
def test_merged_heads_have_inner_losses(step_name):
    plain, heads = (an_sae(step=step_name, pool_factor=10, pool_group_size=16, **NESTED) for _ in range(2))
    heads.turn_on_forward_pass_hook_z_reshaping()
    want, got = step(plain, activations(32)), step(heads, activations(32).view(32, 3, D_IN // 3))
    for width in (10, 60):  # the mean also runs over the heads
        name = f"inner_mse_loss_{width}"
        torch.testing.assert_close(got.losses[name] * 3, want.losses[name])


def test_the_export_has_no_levels_and_loads_in_plain_saelens(tmp_path):
    sae = sampled_sae(matryoshka_widths=WIDTHS, pool_factor=10)
    train(sae, 30)
    sae.save_inference_model(tmp_path)
    exported = SAE.load_from_disk(tmp_path)
    assert exported.cfg.architecture() == "jumprelu"
    assert "matryoshka_widths" not in exported.cfg.to_dict()


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    fields = {"matryoshka_widths": WIDTHS, "pool_factor": 6}
    sae = sampled_sae(**fields)
    train(sae, 5)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert loaded.cfg == sae.cfg
    selecting = SAE.load_from_disk(tmp_path)
    assert torch.equal(selecting.encode(activations(20)), loaded.encode(activations(20)))
    assert train(loaded, 5, first=5) == train(sae, 5, first=5)


def test_pools_start_from_the_weights_of_a_matryoshka_sae():
    theirs = matryoshka_sae()
    ours = from_batchtopk(theirs, config(matryoshka_widths=WIDTHS, pool_factor=D_SAE, step="dense"))
    mine, want = (sae.training_forward_pass(step_input(activations(31))) for sae in (ours, theirs))
    assert torch.equal(mine.loss, want.loss)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"matryoshka_widths": [4, 13]}, r"matryoshka_widths=\[4, 13\] must be .* ends in d_sae=40, or None"),
        ({"matryoshka_widths": []}, r"matryoshka_widths=\[\] must be a list of whole numbers"),
        ({"matryoshka_widths": [4.5, 40]}, r"matryoshka_widths=\[4.5, 40\] must be a list of whole numbers"),
        ({"matryoshka_widths": 40}, "matryoshka_widths=40 must be a list of whole numbers"),
        ({"matryoshka_widths": [13, 13, 40]}, r"\[13, 13, 40\] must be positive and strictly increasing"),
        ({"matryoshka_widths": [0, 40]}, r"\[0, 40\] must be positive and strictly increasing"),
        ({"inner_loss_coefficient": -1}, "inner_loss_coefficient=-1 must be a finite number of at least 0"),
        ({"inner_loss_coefficient": "1"}, "inner_loss_coefficient='1' must be a finite number"),
        ({"matryoshka_widths": WIDTHS, "inner_loss_steps": 0}, "inner_loss_steps=0 must be a whole number of"),
        ({"matryoshka_widths": WIDTHS, "inner_loss_steps": True}, "inner_loss_steps=True must be a whole number of"),
        ({"inner_loss_steps": 9}, "inner_loss_steps=9 has no effect without inner losses; set two or more matr"),
    ],
    ids=str,
)
def test_impossible_levels_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)
