"""Transcoders equal SAEs if outputs are inputs, and otherwise their definition, in plain loops and by autograd."""

import copy
import re
from dataclasses import replace

import oracles
import pytest
import torch
from helpers import D_IN, D_SAE, K, activations, assert_equal_training, gradients, sampled_sae, step_input
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from transcoder_helpers import D_OUT, batch, trained, transcoder, variants

from sae_lens_sampled import SampledTopKTranscoder, SampledTopKTranscoderConfig, from_batchtopk, to_jumprelu


class OnBoth(SampledTopKTranscoder):
    """A transcoder that takes an SAE's inputs and reconstructs them."""

    def training_forward_pass(self, step_input):
        given = copy.copy(step_input)
        given.sae_in = torch.cat([step_input.sae_in, step_input.sae_in], dim=-1)
        return super().training_forward_pass(given)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("step", ["dense", "kept"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"pool_factor": 4}, {"pool_factor": 4, "pool_group_size": 8}, {"matryoshka_widths": [10, 25, D_SAE]}],
    ids=str,
)
def test_with_outputs_that_are_the_inputs_it_is_an_sae_to_the_last_bit(fields, step, bfloat16):
    shared = {"step": step, "use_sparse_activations": False, "pool_factor": D_SAE / K, **fields}
    sae = sampled_sae(apply_b_dec_to_input=False, **shared)
    ours = OnBoth(SampledTopKTranscoderConfig(d_in=D_IN, d_sae=D_SAE, k=K, **shared))
    ours.load_state_dict(sae.state_dict())
    assert_equal_training(ours, sae, bfloat16)
    for name, buffer in sae.named_buffers():
        assert torch.equal(dict(ours.named_buffers())[name], buffer), name


@pytest.mark.parametrize("step", ["dense", "kept"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_batchtopk_transcoder_is_the_one_of_plain_loops(skip, step):
    made, given = transcoder(skip=skip, step=step), step_input(batch(12), n_dead=9)
    output = made.training_forward_pass(given)
    rows, out = given.sae_in[:, :D_IN].tolist(), given.sae_in[:, D_IN:].tolist()
    weights = {name: parameter.tolist() for name, parameter in made.named_parameters()}
    norms = [sum(w * w for w in row) ** 0.5 for row in weights["W_dec"]]
    hidden_pre = [
        [
            (sum(row[i] * weights["W_enc"][i][j] for i in range(D_IN)) + weights["b_enc"][j]) * norms[j]
            for j in range(D_SAE)
        ]
        for row in rows
    ]
    acts = [[max(value, 0.0) for value in row] for row in hidden_pre]
    kept = oracles.kept_places(acts, [set(range(D_SAE))], K * 12, None)
    want = torch.zeros(12, D_SAE)
    for token, latent in kept:
        want[token, latent] = acts[token][latent]
    torch.testing.assert_close(output.feature_acts.to_dense().detach(), want)

    def decoded(codes, token):
        return [sum(codes[j] / norms[j] * weights["W_dec"][j][i] for j in range(D_SAE)) for i in range(D_OUT)]

    loss, auxiliary = 0.0, 0.0
    for token in range(12):
        skipped = [
            sum(weights["W_skip"][i][j] * rows[token][j] for j in range(D_IN)) if skip else 0.0 for i in range(D_OUT)
        ]
        parts = zip(decoded(want[token].tolist(), token), weights["b_dec"], skipped, strict=True)
        residual = [y - sum(part) for y, part in zip(out[token], parts, strict=True)]
        loss += sum(e * e for e in residual)
        # AuxK: the d_out // 2 largest dead latents reconstruct the residual of the outputs.
        dead = sorted(range(5, 14), key=lambda j: -hidden_pre[token][j])[: D_OUT // 2]
        codes = [hidden_pre[token][j] if j in dead else 0.0 for j in range(D_SAE)]
        auxiliary += sum((e - a) ** 2 for e, a in zip(residual, decoded(codes, token), strict=True))
    assert output.losses["mse_loss"].item() == pytest.approx(loss / 12, rel=1e-5)
    assert output.losses["auxiliary_reconstruction_loss"].item() == pytest.approx(auxiliary / 12 / 32, rel=1e-5)
    assert output.loss.item() == pytest.approx((loss + auxiliary / 32) / 12, rel=1e-5)
    assert torch.equal(output.sae_in, given.sae_in[:, D_IN:])


@pytest.mark.parametrize("step", ["dense", "kept"])
@variants
def test_gradients_are_those_of_the_kept_entries(fields, step):
    """Every gradient compared with autograd through a plain formula with the selection held fixed."""
    dtype = torch.float64 if step == "dense" else torch.float32
    made, given = transcoder(step=step, dtype=str(dtype).removeprefix("torch."), **fields), batch(20, dtype=dtype)
    output = made.training_forward_pass(step_input(given))
    got, kept = gradients(made, output), output.feature_acts.to_dense() > 0
    made.zero_grad()
    x, y = given[:, :D_IN], given[:, D_IN:]
    norms = made.W_dec.norm(dim=1) if made.cfg.rescale_acts_by_decoder_norm else 1.0
    acts = torch.where(kept, (x @ made.W_enc + made.b_enc) * norms, 0)
    torch.testing.assert_close(output.feature_acts.to_dense(), acts)
    loss = 0.0
    for width in [*made.cfg.inner_widths, D_SAE]:
        y_hat = (acts / norms)[:, :width] @ made.W_dec[:width] + made.b_dec
        if made.cfg.skip:
            y_hat = y_hat + x @ made.W_skip.T
        weight = 1.0 if width == D_SAE else made.cfg.inner_loss_coefficient
        loss = loss + weight * (y_hat - y).square().sum(dim=1).mean()
    torch.testing.assert_close(output.sae_out, y_hat)
    torch.testing.assert_close(output.loss, loss)
    loss.backward()
    assert got.keys() == {"W_enc", "b_enc", "W_dec", "b_dec", *(["W_skip"] if made.cfg.skip else [])}
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_dead", [0, 3, 20])
@variants
def test_both_steps_agree(fields, n_dead):
    results = {}
    for step in ("kept", "dense"):
        made = transcoder(step=step, **fields)
        output = made.training_forward_pass(step_input(batch(5, 16), n_dead=n_dead))
        assert output.feature_acts.shape == (5, 16, D_SAE)
        assert output.sae_out.shape == (5, 16, D_OUT)
        assert output.feature_acts.is_sparse == (step == "kept")
        results[step] = output, gradients(made, output), dict(made.named_buffers())
    (kept, *mine), (dense, *theirs) = results["kept"], results["dense"]
    torch.testing.assert_close(kept.feature_acts.to_dense(), dense.feature_acts)
    torch.testing.assert_close(kept.sae_out, dense.sae_out)
    torch.testing.assert_close(kept.losses, dense.losses)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@variants
def test_training_explains_outputs(fields):
    before, after = transcoder(**fields), trained(300, **fields)
    losses = [
        made.training_forward_pass(step_input(batch(200, seed=999))).losses["mse_loss"] for made in (before, after)
    ]
    assert losses[1] < 0.5 * losses[0]


def test_initial_weights_and_buffers():
    made = SampledTopKTranscoder(SampledTopKTranscoderConfig(d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=K, skip=True))
    shapes = {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}
    assert shapes == {
        "W_enc": (D_IN, D_SAE),
        "b_enc": (D_SAE,),
        "W_dec": (D_SAE, D_OUT),
        "b_dec": (D_OUT,),
        "W_skip": (D_OUT, D_IN),
    }
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.full((D_SAE,), 0.1))
    torch.testing.assert_close(made.W_enc.norm(dim=0), torch.full((D_SAE,), 0.1))
    assert not any(parameter.any() for parameter in (made.b_enc, made.b_dec, made.W_skip))
    free = SampledTopKTranscoder(SampledTopKTranscoderConfig(d_in=D_IN, d_sae=D_SAE, k=K, decoder_init_norm=None))
    assert free.W_dec.shape == (D_SAE, D_IN)
    assert free.W_dec.norm(dim=1).std() > 0.01
    assert not torch.equal(free.W_dec, free.W_enc.T)
    meta = SampledTopKTranscoder(SampledTopKTranscoderConfig(d_in=D_IN, d_sae=D_SAE, k=K, device="meta", skip=True))
    assert all(tensor.is_meta for tensor in [*meta.parameters(), *meta.buffers()])


@pytest.mark.parametrize("k", [K, 0.3, D_SAE])
def test_by_default_every_latent_is_a_candidate(k):
    cfg = SampledTopKTranscoderConfig(d_in=D_IN, d_sae=D_SAE, k=k)
    assert cfg.n_candidates == D_SAE
    assert cfg.batch_parts == {"d_in": D_IN, "d_out": D_IN}
    # Also in configs made from it: no derived value is stored.
    assert replace(cfg, k=D_SAE / 2, d_sae=2 * D_SAE).n_candidates == 2 * D_SAE
    assert replace(cfg, d_in=20).batch_parts == {"d_in": 20, "d_out": 20}
    assert replace(cfg, d_in=20, d_out=6).batch_parts == {"d_in": 20, "d_out": 6}


def test_configs_made_of_one_another_have_hooks_of_their_own():
    first = SampledTopKTranscoderConfig(d_in=D_IN, d_sae=D_SAE, k=K, hook_name_out="one")
    second = replace(first, hook_name_out="two")
    assert (first.metadata.hook_name_out, second.metadata.hook_name_out) == ("one", "two")
    assert to_jumprelu(SampledTopKTranscoder(first)).cfg.metadata.hook_name_out == "one"


def test_forward_has_the_hooks_of_an_sae_but_no_error_term():
    made, x = transcoder(skip=True), activations(5)
    out, cache = made.run_with_cache(x)
    assert torch.equal(cache["hook_sae_output"], out)
    assert {"hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"} <= set(cache)
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        made.use_error_term = True
    with pytest.raises(
        ValueError, match=r"^use_error_term=True has no meaning for a transcoder, which does not see its targets"
    ):
        made(x)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input=True has no meaning for a transcoder"),
        ({"normalize_activations": "expected_average_only_in"}, "two spaces, together. Use 'none'."),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations='covariance_whitening' has no mean"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z' merges the heads of one hook"),
        ({"d_out": "7"}, "d_out='7' is a str; it must be a whole number, or None for d_in."),
        ({"d_out": 7.0}, "d_out=7.0 is a float; it must be a whole number, or None for d_in."),
        ({"skip": "no"}, "skip='no' must be True or False."),
        ({"pool_factor": "4"}, "pool_factor='4' is a str; it must be a number, or None for every latent."),
        ({"d_out": 1}, "d_out // 2 dead latents per token and divides by that number."),
        ({"k": 0}, "k=0 must be above 0 and at most d_sae=40."),
        ({"pool_factor": 0.5}, "pool_factor=0.5 must be at least 1"),
    ],
    ids=str,
)
def test_meaningless_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        transcoder(**fields)


def test_batches_of_another_width_are_refused():
    made = transcoder()
    want = r"activations of shape \(5, 12\) must have last dimension d_in \+ d_out=19: inputs, then out"
    for step in ("kept", "dense"):
        made.cfg.step = step
        with pytest.raises(ValueError, match=want):
            made.training_forward_pass(step_input(activations(5)))
        with pytest.raises(ValueError, match=r"got an empty batch, of shape \(0, 12\)"):
            made.training_forward_pass(step_input(batch(0)))
    with pytest.raises(ValueError, match=r"activations of shape \(5, 19\) must have last dimension d_in=12\."):
        made.encode(batch(5))
    with pytest.raises(ValueError, match="1 of 5 rows of sae_in are not finite"):
        made.training_forward_pass(step_input(batch(5).index_fill(0, torch.tensor([2]), torch.nan)))


def test_saelens_trainer_trains_it_and_counts_as_for_saes():
    made = transcoder(skip=True)
    cfg = SAETrainerConfig(total_training_samples=1280, train_batch_size_samples=64, lr=1e-3, lr_end=1e-3)
    trainer = SAETrainer(cfg, made, (batch(64, seed=step) for step in range(20)))
    trainer.fit()
    output = made.training_forward_pass(step_input(batch(64, seed=21)))
    log = trainer.build_train_step_log_dict(output, 1280)
    _, y = made.inputs_and_targets(batch(64, seed=21))
    unexplained = (output.sae_out - y).square().sum() / (y - y.mean(dim=0)).square().sum()
    assert log["metrics/explained_variance"] == pytest.approx(1 - unexplained.item(), rel=1e-4)
    assert made.cfg.metadata.l0 == pytest.approx(K)
    assert made.W_skip.any()


def test_weights_of_saes_and_transcoders_do_not_mix():
    cfg = sampled_sae(apply_b_dec_to_input=False).cfg
    for source, target in ((transcoder(), cfg), (sampled_sae(), transcoder().cfg)):
        with pytest.raises(ValueError, match=r"takes no transcoder, .*; train from scratch instead\."):
            from_batchtopk(source, target)
