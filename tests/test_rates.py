import pytest
import torch
from helpers import D_SAE, activations, sampled_sae, step_input, train

from sae_lens_sampled import to_jumprelu
from sae_lens_sampled.rates import FORGET, MEMORY, NEVER, STEP, RateMatcher


def oracle_step(state, f, r, peak, cutoff, n_tokens, n_steps):
    """One latent, in Python numbers: design of the update, written out."""
    if n_steps == 0:
        f = r
    for key, value in (("f", f), ("r", r), ("peak", peak)):
        state[key] = (1 - MEMORY) * state[key] + MEMORY * value
    unbiased = {key: state[key] / (1 - (1 - MEMORY) ** (n_steps + 1)) for key in ("f", "r", "peak")}
    error = (f - r) / (unbiased["f"] + unbiased["r"] + 1 / n_tokens)
    step = max(STEP, (n_steps + 1) ** -0.5) * unbiased["peak"] * max(-20.0, min(20.0, error))
    state["threshold"] = max(0.0, state["threshold"] + step) if n_steps else cutoff


def test_update_matches_the_rule_written_out_for_each_latent():
    matcher = RateMatcher(5, torch.device("cpu"))
    states = [dict.fromkeys(("f", "r", "peak", "threshold"), 0.0) for _ in range(5)]
    for n_steps in range(6):
        f, r, peak = torch.rand(5) ** 3, torch.rand(5) ** 6, torch.rand(5) * 10
        matcher.update(f, r, peak, torch.tensor(0.7), 50, torch.tensor(n_steps))
        for i, state in enumerate(states):
            oracle_step(state, f[i].item(), r[i].item(), peak[i].item(), 0.7, 50, n_steps)
        for name, key in (("threshold", "threshold"), ("firing_rate", "f"), ("selection_rate", "r"), ("peak", "peak")):
            torch.testing.assert_close(getattr(matcher, name), torch.tensor([state[key] for state in states]))


def test_thresholds_start_at_the_first_cutoff():
    sae = sampled_sae()
    sae.training_forward_pass(step_input(activations(40)))
    assert sae.latent_threshold.tolist() == [sae.pool_record.cutoff.item()] * D_SAE


def test_latents_that_were_never_selected_are_exported_silent():
    sae = sampled_sae(pool_factor=2)
    train(sae, 5)
    never = sae.pool_record.selection_counts == 0
    assert 0 < never.sum() < D_SAE
    assert torch.equal(to_jumprelu(sae).threshold.isinf(), never)


def test_latents_selected_long_ago_are_silent_and_rare_ones_are_not():
    matcher = RateMatcher(2, torch.device("cpu"))
    matcher.selection_rate.copy_(torch.tensor([NEVER / 2, NEVER * 2]))
    pooled = torch.tensor([True, True])
    assert matcher.export(torch.tensor(10**6), pooled).isinf().tolist() == [True, False]
    matcher.selection_rate.mul_(MEMORY)  # the same means after one step, before bias correction
    assert matcher.export(torch.tensor(1), pooled).isinf().tolist() == [True, False]


def test_latents_that_left_the_pools_are_exported_silent_after_a_while():
    sae = sampled_sae(pool_factor=2)
    train(sae, 3)
    fired = to_jumprelu(sae).threshold.isfinite()
    gone, stays = (int(i) for i in fired.nonzero()[:2])
    sae.pool_record.n_steps += FORGET
    sae.pool_record.last_pooled.fill_(int(sae.pool_record.n_steps))
    sae.pool_record.last_pooled[stays] -= FORGET - 1
    sae.pool_record.last_pooled[gone] -= FORGET
    silent = to_jumprelu(sae).threshold.isinf()
    assert silent[gone]
    assert not silent[stays]


def test_without_a_pool_no_latent_is_forgotten():
    sae = sampled_sae(pool_factor=99)
    train(sae, FORGET + 5)
    sae.rate_matcher.selection_rate.clamp_(min=1e-6)  # rare: selected once in a million tokens
    assert to_jumprelu(sae).threshold.isfinite().all()


@pytest.mark.parametrize(
    "fields",
    [
        {"pool_factor": 1},
        {"pool_factor": 4},
        {"pool_factor": 99},
        {"pool_group_size": 8, "pool_factor": 2},
        {"score": "perplexity", "pool_factor": 2},
        {"score": "entropy", "pool_factor": 2},
        {"rescale_acts_by_decoder_norm": False},
    ],
    ids=str,
)
def test_export_fires_as_often_as_training_selects(fields):
    sae = sampled_sae(**fields)
    train(sae, 150, batch_size=256)
    held_out = [activations(256, seed=10_000 + i) for i in range(8)]
    trained = torch.cat([sae.select(batch, draw=0) for batch in held_out])
    exported = to_jumprelu(sae).encode(torch.cat(held_out))
    assert (exported > 0).sum() / (trained > 0).sum() == pytest.approx(1, abs=0.06)


def test_global_threshold_lets_latents_outside_the_pool_fire():
    """What the per-latent thresholds are for."""
    sae = sampled_sae(pool_factor=1, inference_threshold="global")
    train(sae, 150, batch_size=256)
    batch = activations(256, seed=10_000)
    l0 = (to_jumprelu(sae).encode(batch) > 0).sum(dim=1).float().mean()
    assert l0 > 2 * (sae.encode(batch) > 0).sum(dim=1).float().mean()


def test_global_threshold_is_saelens_without_the_bias_of_its_start():
    sae = sampled_sae(inference_threshold="global", topk_threshold_lr=0.1)
    train(sae, 4)
    want = sae.topk_threshold.item() / (1 - 0.9**4)
    torch.testing.assert_close(to_jumprelu(sae).threshold, torch.full((D_SAE,), want))
    assert to_jumprelu(sampled_sae(inference_threshold="global")).threshold.tolist() == [0] * D_SAE
