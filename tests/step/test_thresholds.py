import pytest
import torch
from helpers import D_SAE, activations, sampled_sae, step_input, train

from sae_lens_sampled import to_jumprelu
from sae_lens_sampled.step.thresholds import (
    EMA_RATE,
    GAIN_STEP,
    MAX_ERROR,
    MIN_SELECTION_RATE,
    PRECISION_EMA_RATE,
    SILENT_AFTER_STEPS,
    THRESHOLD_STEP,
    RateMatcher,
    StepCounts,
)


def oracle_step(latents, gain, new, recent, cutoff, n_tokens, n_steps):
    """Update all latents by the rule, written out in Python numbers. Returns the new gain."""
    correction = 1 - (1 - EMA_RATE) ** (n_steps + 1)
    for latent, batch in zip(latents, new, strict=True):
        if n_steps == 0:
            batch["f"] = batch["h"] = batch["r"]
        for key in ("f", "r", "peak"):
            latent[key] = (1 - EMA_RATE) * latent[key] + EMA_RATE * batch[key]
        if batch["f"] > 0:
            news = batch["h"] / batch["f"]
            latent["precision"] = (1 - PRECISION_EMA_RATE) * latent["precision"] + PRECISION_EMA_RATE * news
    total = sum(latent["r"] for latent in latents)
    weighted = sum(latent["precision"] * latent["r"] for latent in latents)
    for latent, batch in zip(latents, new, strict=True):
        weight = latent["precision"] * gain * total / weighted
        error = (batch["f"] - weight * batch["r"]) / ((latent["f"] + weight * latent["r"]) / correction + 1 / n_tokens)
        step = max(THRESHOLD_STEP, (n_steps + 1) ** -0.5) * latent["peak"] / correction * max(-20.0, min(20.0, error))
        latent["threshold"] = max(0.0, latent["threshold"] + step) if n_steps else cutoff
    fired = sum(batch["f"] for batch, in_pool in zip(new, recent, strict=True) if in_pool)
    missing = sum(batch["r"] for batch in new) - fired
    return min(100.0, max(0.5, gain * (1 + GAIN_STEP * missing * correction / total)))


def test_update_matches_the_rule_written_out_for_each_latent():
    matcher, gain = RateMatcher(5, torch.device("cpu")), 1.0
    latents = [{"f": 0.0, "r": 0.0, "peak": 0.0, "threshold": 0.0, "precision": 1.0} for _ in range(5)]
    recent = torch.tensor([True, True, False, True, True])
    for n_steps in range(6):
        f, r, peak = torch.rand(5) ** 3 * (torch.rand(5) > 0.3), torch.rand(5) ** 6, torch.rand(5) * 10
        h = torch.minimum(f, r) * torch.rand(5)
        cutoff = torch.tensor(0.7)
        counts = StepCounts(50 * r, 50 * f, 50 * h, peak, cutoff)
        matcher.update(counts, recent, cutoff, 50, torch.tensor(n_steps))
        new = [dict(zip(("f", "r", "h", "peak"), row, strict=True)) for row in torch.stack([f, r, h, peak], 1).tolist()]
        gain = oracle_step(latents, gain, new, recent.tolist(), 0.7, 50, n_steps)
        names = {
            "threshold": "threshold",
            "firing_rate": "f",
            "selection_rate": "r",
            "precision": "precision",
            "peak": "peak",
        }
        for name, key in names.items():
            want = torch.tensor([latent[key] for latent in latents])
            torch.testing.assert_close(getattr(matcher, name), want, msg=name)
        assert matcher.gain.item() == pytest.approx(gain)


def test_latents_that_fire_where_they_are_not_selected_give_their_share_to_others():
    """Both are selected on 0.3 of the tokens: one on its largest activations, the other at random."""
    matcher, generator = RateMatcher(2, torch.device("cpu")), torch.Generator().manual_seed(0)
    pooled = torch.tensor([True, True])
    rates = []
    for n_steps in range(1500):
        z = torch.rand(400, 2, generator=generator)
        selected = torch.stack([z[:, 0] > 0.7, torch.rand(400, generator=generator) > 0.7], dim=1)
        fired = z > matcher.threshold
        cutoff, sums = torch.tensor(0.7), (mask.sum(dim=0) for mask in (selected, fired, fired & selected))
        matcher.update(StepCounts(*sums, z.amax(dim=0), cutoff), pooled, cutoff, 400, torch.tensor(n_steps))
        rates.append(fired.float().mean(dim=0))
    faithful, random = torch.stack(rates[-200:]).mean(dim=0).tolist()
    assert faithful + random == pytest.approx(0.6, rel=0.03)
    assert faithful > 0.4
    assert random < 0.2


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
    matcher.selection_rate.copy_(torch.tensor([MIN_SELECTION_RATE / 2, MIN_SELECTION_RATE * 2]))
    pooled = torch.tensor([True, True])
    assert matcher.export(torch.tensor(10**6), pooled).isinf().tolist() == [True, False]
    matcher.selection_rate.mul_(EMA_RATE)  # the same means after one step, before bias correction
    assert matcher.export(torch.tensor(1), pooled).isinf().tolist() == [True, False]


def test_latents_that_left_the_pools_are_exported_silent_after_a_while():
    sae = sampled_sae(pool_factor=2)
    train(sae, 3)
    fired = to_jumprelu(sae).threshold.isfinite()
    gone, stays = (int(i) for i in fired.nonzero()[:2])
    sae.pool_record.n_steps += SILENT_AFTER_STEPS
    sae.pool_record.last_pooled.fill_(int(sae.pool_record.n_steps))
    sae.pool_record.last_pooled[stays] -= SILENT_AFTER_STEPS - 1
    sae.pool_record.last_pooled[gone] -= SILENT_AFTER_STEPS
    silent = to_jumprelu(sae).threshold.isinf()
    assert silent[gone]
    assert not silent[stays]


def test_without_a_pool_no_latent_is_forgotten():
    sae = sampled_sae(pool_factor=99)
    train(sae, SILENT_AFTER_STEPS + 5)
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
    """The reason for per-latent thresholds."""
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


def test_a_step_is_bounded_on_both_sides():
    """After a long silence one latent fires on every token, and another is selected on every token without firing."""
    matcher, zero = RateMatcher(2, torch.device("cpu")), torch.zeros(2)
    matcher.threshold.fill_(5)
    matcher.peak.fill_(1)
    counts = StepCounts(torch.tensor([0, 1000]), torch.tensor([1000, 0]), zero, torch.ones(2), torch.tensor(0.5))
    matcher.update(counts, torch.ones(2, dtype=torch.bool), torch.tensor(0.5), 1000, torch.tensor(10**6))
    step = THRESHOLD_STEP * MAX_ERROR
    torch.testing.assert_close(matcher.threshold, torch.tensor([5 + step, 5 - step]))


def test_thresholds_follow_activations_that_are_scaled():
    matcher = RateMatcher(3, torch.device("cpu"))
    matcher.threshold.copy_(torch.tensor([1.0, 2, 3]))
    matcher.peak.copy_(torch.tensor([4.0, 5, 6]))
    matcher.scale(0.5)
    assert (matcher.threshold.tolist(), matcher.peak.tolist()) == ([0.5, 1, 1.5], [2, 2.5, 3])


def test_buffers_are_float32_whatever_is_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        buffers = dict(RateMatcher(3, torch.device("cpu")).named_buffers())
    finally:
        torch.set_default_dtype(torch.float32)
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32}
