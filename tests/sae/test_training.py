import pytest
import torch
from helpers import D_IN, D_SAE, K, activations, gradients, sampled_sae, step_input, train

from sae_lens_sampled.step.selection import candidate_pool, column_statistics

VARIANTS = [
    {},
    {"pool_group_size": 8},
    {"pool_group_size": 1},
    {"pool_group_size": 8, "step": "kept"},
    {"pool_factor": 100, "step": "kept"},
    {"pool_sampling": "proportional", "step": "kept"},
    {"score": "entropy"},
    {"score": "perplexity", "pool_factor": 1},
    {"score": "ridge_leverage", "pool_group_size": 20},
    {"pool_sampling": "proportional"},
    {"score": "uniform", "pool_sampling": "proportional", "pool_group_size": 8},
    {"k": 2.6, "rescale_acts_by_decoder_norm": False},
]
variants = pytest.mark.parametrize("fields", VARIANTS, ids=str)


def pooled_columns(sae):
    return sae.pool_record.pool.nonzero().flatten().tolist()


@pytest.mark.conformance(1)
@variants
def test_step_keeps_at_most_the_budget_nothing_negative_and_nothing_outside_the_pool(fields):
    sae = sampled_sae(**fields)
    output = sae.training_forward_pass(step_input(activations(45)))
    acts = output.feature_acts.to_dense()
    assert acts.shape == (45, D_SAE)
    assert (acts >= 0).all()
    assert 0 < (acts > 0).sum() <= int(sae.cfg.k * 45)
    assert set(acts.sum(dim=0).nonzero().flatten().tolist()) <= set(pooled_columns(sae))
    kept = acts > 0
    torch.testing.assert_close(acts[kept], sae.encode_with_hidden_pre(activations(45))[1][kept])


@variants
def test_loss_is_the_mean_squared_error_summed_over_dimensions(fields):
    sae, batch = sampled_sae(**fields), activations(45)
    output = sae.training_forward_pass(step_input(batch))
    decoder = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True) if sae.cfg.rescale_acts_by_decoder_norm else sae.W_dec
    sae_out = output.feature_acts.to_dense() @ decoder + sae.b_dec
    torch.testing.assert_close(output.sae_out, sae_out)
    torch.testing.assert_close(output.loss, (sae_out - batch).square().sum(dim=1).mean())


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("group_size", [None, 3])
def test_gradients_are_those_of_the_kept_entries(rescale, group_size):
    """Every gradient compared with autograd through a plain formula with the selection held fixed, in float64."""
    sae = sampled_sae(dtype="float64", rescale_acts_by_decoder_norm=rescale, pool_group_size=group_size)
    batch = activations(10).double()
    output = sae.training_forward_pass(step_input(batch))
    got = gradients(sae, output)
    kept = (output.feature_acts.to_dense() > 0).double()

    sae.zero_grad()
    norms = sae.W_dec.norm(dim=1) if rescale else 1.0
    hidden_pre = ((batch - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms
    sae_out = (hidden_pre * kept / norms) @ sae.W_dec + sae.b_dec
    (sae_out - batch).square().sum(dim=1).mean().backward()
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, msg=name)
    off_pool = [latent for latent in range(D_SAE) if latent not in pooled_columns(sae)]
    assert (got["W_enc"][:, off_pool] == 0).all()
    assert (got["b_enc"][off_pool] == 0).all()


@pytest.mark.conformance(11)
@variants
def test_three_dimensional_input_is_its_flattened_rows(fields):
    flat, nested = sampled_sae(**fields), sampled_sae(**fields)
    batch = activations(5, 9)
    want = flat.training_forward_pass(step_input(batch.reshape(45, D_IN)))
    got = nested.training_forward_pass(step_input(batch))
    assert torch.equal(got.feature_acts.to_dense().reshape(45, D_SAE), want.feature_acts.to_dense())
    torch.testing.assert_close(got.loss, want.loss)
    assert torch.equal(nested.pool_record.selection_counts, flat.pool_record.selection_counts)
    assert torch.equal(nested.encode(batch).reshape(45, D_SAE), flat.encode(batch.reshape(45, D_IN)))


@variants
def test_one_dimensional_input_is_a_batch_of_one(fields):
    sae = sampled_sae(**fields)
    token = activations(1)[0]
    assert torch.equal(sae.encode(token), sae.encode(token[None])[0])


@pytest.mark.conformance(15)
@variants
def test_training_lowers_the_loss(fields):
    losses = train(sampled_sae(**fields), 60)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_sampled_pool_is_drawn_anew_each_step_but_not_by_encode():
    sae, batch = sampled_sae(pool_sampling="proportional"), activations(45)
    before = sae.encode(batch)
    pools = []
    for step in range(3):
        sae.training_forward_pass(step_input(batch, step=step))
        pools.append(pooled_columns(sae))
    assert pools[0] != pools[1] != pools[2]
    assert torch.equal(sae.encode(batch), before)


def test_groups_are_runs_of_consecutive_tokens():
    sae, batch = sampled_sae(pool_group_size=8), activations(20)
    acts = sae.encode_with_hidden_pre(batch)[1].relu().detach()
    pool = candidate_pool(column_statistics(acts, "l2_norm", sae.cfg.n_candidates, 8), sae.cfg.n_candidates)
    kept = sae.encode(batch) > 0
    for group, rows in enumerate((slice(0, 8), slice(8, 16), slice(16, 20))):
        alone = candidate_pool(
            column_statistics(acts[rows], "l2_norm", sae.cfg.n_candidates, None), sae.cfg.n_candidates
        )
        assert torch.equal(pool[group], alone[0])
        assert set(kept[rows].any(dim=0).nonzero().flatten().tolist()) <= set(alone[0].tolist())


def test_nothing_of_the_sae_changes_when_encoding():
    sae = sampled_sae(pool_sampling="proportional")
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.encode(activations(20))
    sae(activations(20))
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_rows_stop_training_before_anything_changes(bad):
    sae, batch = sampled_sae(), activations(20)
    batch[3, 1] = batch[7, 0] = batch[7, 5] = bad
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"^2 of 20 rows of sae_in are not finite at training step 17; training stopped"
    ):
        sae.training_forward_pass(step_input(batch, step=17))
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


@pytest.mark.parametrize("pool_factor", [2, 100], ids=["pooled", "batchtopk"])
@pytest.mark.parametrize("method", ["encode", "training_forward_pass"])
def test_wrong_width_and_empty_batch_are_refused(pool_factor, method):
    sae = sampled_sae(pool_factor=pool_factor)

    def run(x):
        return sae.encode(x) if method == "encode" else sae.training_forward_pass(step_input(x))

    with pytest.raises(ValueError, match=r"activations of shape \(5, 13\) must have last dimension d_in=12\."):
        run(torch.zeros(5, 13))
    with pytest.raises(ValueError, match=r"got an empty batch, of shape \(0, 12\)"):
        run(torch.zeros(0, 12))


def test_fewer_positive_entries_than_the_budget_keeps_exactly_those():
    sae = sampled_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
        sae.b_enc[4] = 5.0
    acts = sae.encode(activations(10))
    assert set((acts > 0).sum(dim=0).nonzero().flatten().tolist()) <= {4}
    assert (acts > 0).sum() <= 10 < K * 10


@pytest.mark.conformance(9)
def test_auxiliary_loss_matches_its_definition_and_reaches_dead_latents_only():
    """SAELens' AuxK: the dead latents' top d_in / 2 pre-activations reconstruct the residual."""
    sae, batch = sampled_sae(pool_group_size=8), activations(30)
    output = sae.training_forward_pass(step_input(batch, n_dead=9))
    dead = torch.arange(5, 14)
    decoder = (sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True))[dead]
    hidden = output.hidden_pre[:, dead]
    top = hidden.topk(D_IN // 2, dim=1)
    recons = torch.zeros_like(hidden).scatter(1, top.indices, top.values) @ decoder
    want = (recons - (batch - output.sae_out)).square().sum(dim=1).mean() / 32
    torch.testing.assert_close(output.losses["auxiliary_reconstruction_loss"], want)

    sae.zero_grad()
    output.losses["auxiliary_reconstruction_loss"].backward()
    touched = (sae.W_enc.grad.abs().sum(dim=0) > 0).nonzero().flatten().tolist()
    assert set(touched) <= set(dead.tolist())
    assert len(touched) > 5


@pytest.mark.conformance(10)
def test_hooks_see_the_tensors_of_the_training_step():
    sae, batch = sampled_sae(), activations(20)
    seen = {}
    names = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"]
    hooks = [(name, lambda value, hook: seen.__setitem__(hook.name, value)) for name in names]
    with sae.hooks(fwd_hooks=hooks):
        output = sae.training_forward_pass(step_input(batch))
    assert torch.equal(seen["hook_sae_input"], batch)
    assert torch.equal(seen["hook_sae_acts_pre"] * sae.W_dec.norm(dim=1), output.hidden_pre)
    assert seen["hook_sae_acts_post"] is output.feature_acts
    assert seen["hook_sae_recons"] is output.sae_out
    _, cache = sae.run_with_cache(batch)
    assert torch.equal(cache["hook_sae_acts_post"], output.feature_acts)
    assert torch.equal(cache["hook_sae_recons"], output.sae_out)


def test_autocast_scores_in_float32_and_keeps_the_buffers():
    sae = sampled_sae()
    dtypes = {name: buffer.dtype for name, buffer in sae.named_buffers()}
    with torch.autocast("cpu", torch.bfloat16):
        output = sae.training_forward_pass(step_input(activations(20), n_dead=4))
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())
    assert {name: buffer.dtype for name, buffer in sae.named_buffers()} == dtypes


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    "fields",
    [{}, {"pool_group_size": 8, "pool_sampling": "proportional"}, {"pool_group_size": 8, "step": "kept"}],
    ids=str,
)
def test_compiled_step_equals_the_plain_one(fields):
    """As traced and differentiated; `test_compiled_run_trains_as_the_plain_one` generates code too, which is slow."""
    plain, compiled = sampled_sae(**fields), sampled_sae(**fields)
    step = torch.compile(compiled.training_forward_pass, backend="aot_eager")
    for number in range(3):
        data = step_input(activations(24, seed=number), n_dead=4)
        want, got = plain.training_forward_pass(data), step(data)
        torch.testing.assert_close(got.feature_acts.to_dense(), want.feature_acts.to_dense())
        torch.testing.assert_close(got.loss, want.loss)
        torch.testing.assert_close(gradients(compiled, got), gradients(plain, want))
        assert got.metrics["pool_churn"]() == want.metrics["pool_churn"]()
    assert plain.pool_statistics() == pytest.approx(compiled.pool_statistics())


@pytest.mark.parametrize(("step", "logs", "says"), [(98, False, False), (99, False, True), (7, True, True)])
def test_a_loss_that_is_not_finite_is_said_at_steps_that_log_and_at_every_hundredth(step, logs, says):
    sae, given = sampled_sae(), step_input(activations(20), step=step)
    given.is_logging_step = logs
    sae.b_dec.data[0] = torch.nan
    if not says:
        assert sae.training_forward_pass(given).loss.isnan()
        return
    with pytest.raises(ValueError, match=rf"^the loss is nan at training step {step}: training has diverged"):
        sae.training_forward_pass(given)


@pytest.mark.parametrize("fields", [{"pool_factor": 100}, {}], ids=str)
def test_k_may_change_during_training(fields):
    """All selections follow `cfg.k`: that of a kept step, of a dense one, and of encoding."""
    for step in ("kept", "dense"):
        sae = sampled_sae(step=step, **fields)
        sae.cfg.k = 2
        output = sae.training_forward_pass(step_input(activations(60)))
        assert (output.feature_acts.to_dense() > 0).sum() == (sae.encode(activations(60)) > 0).sum() == 120
