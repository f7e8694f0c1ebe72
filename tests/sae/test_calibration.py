import oracles
import pytest
import torch
from helpers import D_IN, D_SAE, activations, batchtopk_sae, sampled_sae, train

import sae_lens_sampled.sae.calibration
from sae_lens_sampled import calibrate_thresholds, to_jumprelu
from sae_lens_sampled.sae.calibration import _warn_of_rare_latents, quantile_threshold, scale_counts


def calibrate(sae, batches, **fields):
    return calibrate_thresholds(sae, batches, show_progress=False, **fields)


def trained(**fields):
    sae = sampled_sae(**fields)
    train(sae, 5, batch_size=100)
    return sae


BATCHES = [activations(100, seed=500 + i) for i in range(6)]


@pytest.mark.parametrize("chunk_entries", [600, 600 * 7, 2**25])
@pytest.mark.parametrize(
    "fields",
    [{}, {"pool_factor": 1}, {"pool_group_size": 8}, {"pool_sampling": "proportional"}, {"pool_factor": 99, "k": 2.5}],
    ids=str,
)
def test_per_latent_thresholds_match_sorting_by_hand(monkeypatch, fields, chunk_entries):
    monkeypatch.setattr(sae_lens_sampled.sae.calibration, "CHUNK_ENTRIES", chunk_entries)
    sae = trained(**fields)
    exported, report = calibrate(sae, BATCHES)
    kept = torch.cat([sae.select(batch, draw=i) for i, batch in enumerate(BATCHES)]).T.tolist()
    hidden_pre = sae.encode_with_hidden_pre(torch.cat(BATCHES))[1].T.tolist()
    counts = oracles.precision_weighted_counts(hidden_pre, kept)
    want = [oracles.quantile_threshold(column, count) for column, count in zip(hidden_pre, counts, strict=True)]
    torch.testing.assert_close(exported.threshold, torch.tensor(want))
    fires = exported.encode(torch.cat(BATCHES)) > 0
    assert fires.sum(dim=0).tolist() == counts
    n_kept = sum(value > 0 for column in kept for value in column)
    assert report.l0_after == pytest.approx(report.target_l0) == pytest.approx(n_kept / 600)
    assert report.mean_rate_error == pytest.approx(0, abs=1e-6)
    assert report.n_tokens == 600


def test_precision_keeps_latents_whose_firings_are_selections_and_quietens_the_others():
    sae = trained(pool_sampling="proportional", pool_factor=2)
    exported, _ = calibrate(sae, BATCHES)
    kept = torch.cat([sae.select(batch, draw=i) for i, batch in enumerate(BATCHES)]) > 0
    fires = exported.encode(torch.cat(BATCHES)) > 0
    gain = fires.sum(dim=0) / kept.sum(dim=0)
    precision = (fires & kept).sum(dim=0) / fires.sum(dim=0)
    alive = kept.sum(dim=0) > 20
    assert torch.corrcoef(torch.stack([gain, precision])[:, alive])[0, 1] > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_threshold_lies_between_the_last_entry_above_and_the_first_below(dtype):
    column = torch.tensor([[3, 1, -1], [5, 4, -2], [4, 2, 0]], dtype=dtype)
    want = torch.tensor([3.5, 0.5, torch.inf], dtype=dtype)  # halfway to the next; halfway to 0; none wanted
    assert torch.equal(quantile_threshold(column, torch.tensor([2, 3, 0])), want)


@pytest.mark.parametrize("target", [0.5, 2.0, 6.0, 11.3])
@pytest.mark.parametrize("mode", ["per_latent", "global"])
def test_target_l0_is_reached_exactly(mode, target):
    exported, report = calibrate(trained(pool_group_size=8), BATCHES, mode=mode, target_l0=target)
    n_active = (exported.encode(torch.cat(BATCHES)) > 0).sum().item()
    assert n_active == round(target * 600)
    assert report.l0_after == pytest.approx(target, abs=1e-3)


def test_global_mode_gives_one_threshold_at_the_l0_of_the_selection():
    sae = trained()
    exported, report = calibrate(sae, BATCHES, mode="global")
    assert len(exported.threshold.unique()) == 1
    hidden_pre = sae.encode_with_hidden_pre(torch.cat(BATCHES))[1]
    ordered = hidden_pre.flatten().sort(descending=True).values
    n_target = round(report.target_l0 * 600)
    torch.testing.assert_close(exported.threshold[0], (ordered[n_target - 1] + ordered[n_target]) / 2)


def test_report_compares_with_the_thresholds_learnt_in_training():
    sae = trained()
    exported, report = calibrate(sae, BATCHES)
    x = torch.cat(BATCHES)
    for one, l0, fvu in (
        (to_jumprelu(sae), report.l0_before, report.fvu_before),
        (exported, report.l0_after, report.fvu_after),
    ):
        assert l0 == pytest.approx((one.encode(x) > 0).sum().item() / 600)
        want = (x - one(x)).square().sum() / (x - x.mean(dim=0)).square().sum()
        assert fvu == pytest.approx(want.item(), rel=1e-4)


def test_calibrated_l0_holds_on_new_tokens():
    sae = trained()
    batches = [activations(2000, seed=i) for i in range(100)]
    exported, report = calibrate(sae, batches)
    fresh = torch.cat([activations(2000, seed=10_000 + i) for i in range(100)])
    l0 = (exported.encode(fresh) > 0).sum().item() / len(fresh)
    assert l0 == pytest.approx(report.target_l0, rel=0.01)


def test_no_batch_is_read_beyond_max_tokens():
    read = []

    def stream():
        for batch in BATCHES:
            read.append(batch)
            yield batch

    _, report = calibrate(trained(), stream(), max_tokens=250)
    assert (len(read), report.n_tokens) == (3, 300)


def test_nested_batches_and_a_single_tensor_are_taken():
    sae = trained()
    x = activations(300, seed=9)
    flat, nested = calibrate(sae, x)[0], calibrate(sae, [x.reshape(3, 100, D_IN)])[0]
    assert torch.equal(flat.threshold, nested.threshold)


@pytest.mark.parametrize("counts", [[3, 1, 0, 2], [2, 2, 2, 2], [0, 5, 1, 1]])
def test_quantile_threshold_is_exceeded_by_exactly_count_entries(counts):
    column = torch.rand(9, 4) + 0.1
    threshold = quantile_threshold(column, torch.tensor(counts))
    assert (column > threshold).sum(dim=0).tolist() == counts
    assert threshold.isinf().tolist() == [count == 0 for count in counts]


def test_quantile_threshold_between_neighbouring_floats_still_lets_the_upper_one_through():
    low = torch.tensor(1.0)
    high = torch.nextafter(low, torch.tensor(2.0))
    column = torch.stack([low, high])[:, None]
    assert (column > quantile_threshold(column, torch.tensor([1]))).sum() == 1


def test_quantile_threshold_is_never_negative():
    column = torch.tensor([[-1.0], [2.0], [-3.0]])
    assert quantile_threshold(column, torch.tensor([3])).item() == 0
    assert quantile_threshold(column, torch.tensor([1])).item() == 1


def test_scaled_counts_keep_their_proportions_and_stop_at_what_there_is():
    counts, positive = torch.tensor([10, 20, 0, 30]), torch.tensor([100, 25, 50, 90])
    assert scale_counts(counts, positive, 120).tolist() == [24, 25, 0, 71]  # 24 : 72 rounded, and 25 at its limit
    assert scale_counts(counts, positive, 30).tolist() == [5, 10, 0, 15]
    assert scale_counts(counts, positive, 215).tolist() == [100, 25, 0, 90]


def test_bad_input_is_reported_in_one_sentence():
    sae = trained()
    for batches, message in (
        ([], r"^calibration got 0 tokens; it needs at least 256"),
        ([activations(100)], r"^calibration got 100 tokens; it needs at least 256"),
        ([torch.zeros(300, 13)], r"^activations of shape \(300, 13\) must have last dimension d_in=12\.$"),
        (
            [BATCHES[0], BATCHES[1] / 0],
            r"^100 of 100 rows of calibration batch 2 are not finite; look for overflow in the language model",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(sae, batches)
    with pytest.raises(ValueError, match=r"^mode='mean' must be 'per_latent' or 'global'\.$"):
        calibrate(sae, BATCHES, mode="mean")
    with pytest.raises(ValueError, match="have only 2 positive entries"):  # those that were never selected have more
        scale_counts(torch.tensor([2, 0]), torch.tensor([2, 5]), 3)
    with pytest.raises(ValueError, match=r"^target_l0=0 must be above 0 and at most d_sae=40\.$"):
        calibrate(sae, BATCHES, target_l0=0)
    with pytest.raises(ValueError, match=r"^target_l0 asks for 24,000 active entries.*choose a smaller target_l0\.$"):
        calibrate(sae, BATCHES, target_l0=D_SAE)
    with pytest.raises(ValueError, match=r"^only [\d,]+ activations are positive, fewer than the 24,000 that"):
        calibrate(sae, BATCHES, target_l0=D_SAE, mode="global")


def test_bounds_are_reached_exactly(monkeypatch):
    """The minimum number of tokens, and every positive activation, in one chunk of columns or many."""
    sae, x = trained(pool_factor=99), activations(256, seed=3)
    n_positive = (sae.encode_with_hidden_pre(x)[1] > 0).sum().item()
    thresholds = []
    for chunk_entries in (1, 2**25):
        monkeypatch.setattr(sae_lens_sampled.sae.calibration, "CHUNK_ENTRIES", chunk_entries)
        exported, report = calibrate(sae, x, target_l0=n_positive / 256, mode="global")
        assert report.n_tokens == 256
        assert (exported.encode(x) > 0).sum() == n_positive
        thresholds.append(calibrate(sae, x, target_l0=3.3, mode="global")[0].threshold)
    torch.testing.assert_close(*thresholds)
    with pytest.raises(ValueError, match=f"only {n_positive:,} activations are positive, fewer than the"):
        calibrate(sae, x, target_l0=(n_positive + 1) / 256, mode="global")


def test_the_error_of_rates_is_relative_to_the_mean_rate():
    sae = trained()
    exported, report = calibrate(sae, BATCHES, mode="global")
    selected = torch.cat([sae.select(batch, draw=i) for i, batch in enumerate(BATCHES)]) > 0
    wanted, rates = (each.double().mean(dim=0) for each in (selected, exported.encode(torch.cat(BATCHES)) > 0))
    error = (rates - wanted).abs().mean() / wanted.mean()
    assert report.mean_rate_error == pytest.approx(error.item(), rel=1e-4)
    assert error > 0.1


def test_rare_latents_are_named_with_the_tokens_they_need():
    sae = trained(k=0.4, pool_factor=99)
    with pytest.warns(
        UserWarning, match=r"live latents have fewer than 10 target firings in 300 tokens.*about 3,000 tokens"
    ):
        calibrate(sae, BATCHES[:3])


@pytest.mark.parametrize("fields", [{"score": "entropy"}, {"pool_group_size": 8}], ids=str)
def test_l0_on_held_out_tokens_is_that_of_the_selection_after_a_million_tokens(fields):
    sae = trained(**fields)
    exported, report = calibrate(sae, list(activations(500, 2000, seed=1)))
    assert report.n_tokens == 1_000_000
    held_out = activations(100, 2000, seed=2)
    selected = torch.stack([(sae.select(batch, draw=i) > 0).sum() for i, batch in enumerate(held_out)]).sum()
    assert (exported.encode(held_out) > 0).sum() / selected == pytest.approx(1, abs=0.01)


@pytest.mark.usefixtures("unchecked_types")
def test_an_sae_of_another_kind_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"^a BatchTopKTrainingSAE cannot be calibrated.*from_batchtopk"):
        calibrate_thresholds(batchtopk_sae(), activations(300))


def test_rare_latents_are_counted_and_reported():
    message = r"^2 of 4 live latents have fewer than 10 target firings in 1,000 tokens.*, use about 5,000 tokens\.$"
    with pytest.warns(UserWarning, match=message):
        _warn_of_rare_latents(torch.tensor([0, 2, 9, 10, 30]), 1000)
    sae = trained(pool_group_size=8)
    counts = sum((sae.select(batch, draw=i) > 0).sum(dim=0) for i, batch in enumerate(BATCHES))
    _, report = calibrate(sae, BATCHES, mode="global")
    assert report.n_rare == ((counts > 0) & (counts < 10)).sum()
    assert (counts == 0).any()
    assert 0 < report.n_rare < len(counts)


def test_an_l0_that_keeps_nothing_is_refused():
    for fields in ({"target_l0": 1e-4}, {"target_l0": 1e-4, "mode": "global"}):
        with pytest.raises(ValueError, match=r"^over 600 tokens, this L0 keeps no activation at all; use more tokens"):
            calibrate(trained(), BATCHES, **fields)


def test_attention_heads_are_calibrated_side_by_side():
    flat, heads = trained(), trained()
    heads.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    heads.cfg.reshape_activations = "hook_z"
    want, got = (calibrate(sae, BATCHES) for sae in (flat, heads))
    assert torch.equal(got[0].threshold, want[0].threshold)
    assert got[1] == want[1]
