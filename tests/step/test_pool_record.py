import oracles
import pytest
import torch
from helpers import D_SAE, activations, sampled_sae, step_input, train
from sae_lens.training.sae_trainer import _unwrap_item

from sae_lens_sampled.metrics import gini
from sae_lens_sampled.step.selection import sampled_topk
from sae_lens_sampled.step.thresholds import count_dense


@pytest.mark.parametrize("fields", [{}, {"pool_group_size": 8}, {"pool_sampling": "proportional"}, {"pool_factor": 99}])
def test_record_matches_sets_kept_by_hand(fields):
    sae = sampled_sae(**fields)
    counts, ever, previous, cutoff = [0] * D_SAE, set(), set(), 0.0
    for step in range(5):
        output = sae.training_forward_pass(step_input(activations(20, seed=step), step=step))
        pool = set(sae.pool_record.pool.nonzero().flatten().tolist())
        acts = output.feature_acts.to_dense().tolist()
        for row in acts:
            for latent, value in enumerate(row):
                counts[latent] += value > 0
        ever |= pool
        cutoff = min(value for row in acts for value in row if value > 0)
        churn = 1 - len(pool & previous) / len(pool | previous) if step else 0.0
        previous = pool

        assert sae.pool_record.selection_counts.tolist() == counts
        assert sae.pool_statistics() == pytest.approx(
            {
                "pooled_latents": len(pool),
                "pool_churn": churn,
                "ever_pooled_share": len(ever) / D_SAE,
                "starved_share": 1 - len(ever) / D_SAE,
                "selection_gini": oracles.gini(counts),
                "cutoff": cutoff,
                "second_scans": 0,
                "dense_steps": 0,
                "extracted_per_kept": 0,
                "recomputed_per_kept": 0,
            }
        )
        assert output.metrics.keys() == {"topk_threshold", "export_l0", "export_fvu", *sae.pool_statistics()}
        logged = {name: _unwrap_item(output.metrics[name]) for name in sae.pool_statistics()}
        assert logged == sae.pool_statistics()
    assert sae.pool_record.n_steps == 5


def test_one_pool_holds_as_many_latents_as_asked_for_and_groups_more():
    one, grouped = sampled_sae(pool_factor=3), sampled_sae(pool_factor=3, pool_group_size=4)
    for sae in (one, grouped):
        sae.training_forward_pass(step_input(activations(20)))
    assert one.pool_statistics()["pooled_latents"] == 9
    assert 9 < grouped.pool_statistics()["pooled_latents"] <= 45


def test_a_pool_that_never_changes_has_no_churn():
    sae = sampled_sae()
    for step in range(3):
        sae.training_forward_pass(step_input(activations(20), step=step))
    assert sae.pool_statistics()["pool_churn"] == 0


def test_a_batch_that_keeps_nothing_leaves_the_cutoff():
    sae = sampled_sae()
    train(sae, 2)
    before = sae.pool_statistics()["cutoff"]
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    sae.training_forward_pass(step_input(activations(20)))
    assert sae.pool_statistics()["cutoff"] == before > 0


def test_recording_reads_nothing_back_from_the_device():
    """On the meta device, reading any value raises an error."""
    sae = sampled_sae(device="cpu").to("meta")
    acts = torch.zeros(8, D_SAE, device="meta")
    pool = sampled_topk(acts, sae.cfg, sae.pool_record.n_steps)[1]
    sae._record(count_dense(acts, acts, sae.latent_threshold), pool, len(acts))
    assert sae.pool_record.selection_counts.is_meta


@pytest.mark.parametrize("counts", [[3], [1, 1, 1, 1], [0, 0, 0, 8], [5, 1, 0, 2, 2]])
def test_gini_matches_mean_absolute_difference(counts):
    assert gini(torch.tensor(counts)).item() == pytest.approx(oracles.gini(counts))


def test_gini_of_nothing_is_zero():
    assert gini(torch.zeros(4, dtype=torch.int64)) == 0
