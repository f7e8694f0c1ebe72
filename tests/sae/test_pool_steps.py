"""After `pool_steps` training steps every latent is a candidate: from then on, training is BatchTopK's."""

import copy

import pytest
import torch
from helpers import D_SAE, K, activations, batchtopk_sae, config, randomise, sae_of, sampled_sae, step_input
from sae_lens import SAE, MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE

from sae_lens_sampled import SampledTopKTranscoder, to_jumprelu
from sae_lens_sampled.metrics import fraction_of_variance_unexplained
from sae_lens_sampled.step import reduced_scan

N = 4
"""Number of training steps with pools."""
WIDTHS = [4, 13, D_SAE]
POOLS = {
    "one pool": {},
    "columns": {"pool_factor": 1},  # a pool this small is computed by its columns
    "groups": {"pool_group_size": 8},
    "drawn": {"pool_sampling": "proportional", "pool_group_size": 8},
    "nested": {"pool_group_size": 8, "matryoshka_widths": WIDTHS},
    "a score that needs all": {"score": "ridge_leverage", "pool_group_size": 8},
    "transcoder": {"pool_factor": 4, "d_out": 7, "skip": True},
}
pools = pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
steps = pytest.mark.parametrize("step", ["kept", "dense"])


def made(**fields):
    sae = sae_of(config(**fields))
    randomise(sae)
    return sae


def adam(sae):
    return torch.optim.Adam(sae.parameters(), lr=3e-3)


def run(sae, optimizer, numbers):
    """Take one training step per number; returns the outputs. SAELens' step count stays 0: the SAE's own is used."""
    outputs = []
    for number in numbers:
        x = activations(40, seed=number).to(sae.W_dec.dtype)
        if isinstance(sae, SampledTopKTranscoder):
            x = torch.cat([x, x[:, : sae.cfg.d_out].relu()], dim=1)
        outputs.append(sae.training_forward_pass(step_input(x, n_dead=number % 9)))
        outputs[-1].loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return outputs


def losses(outputs):
    return [[output.loss.item(), *(loss.item() for loss in output.losses.values())] for output in outputs]


def assert_same_state(a, b):
    for name, want in b.state_dict().items():
        assert torch.equal(a.state_dict()[name], want), name


def assert_same_moments(a, b):
    for mine, theirs in zip(a.state.values(), b.state.values(), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in ("step", "exp_avg", "exp_avg_sq"))


@steps
@pools
def test_up_to_pool_steps_a_run_is_bit_identical_and_afterwards_not(pool, step):
    ending, endless = made(step=step, pool_steps=N, **pool), made(step=step, **pool)
    optimizers = [adam(ending), adam(endless)]
    mine, theirs = (run(sae, each, range(N)) for sae, each in zip((ending, endless), optimizers, strict=True))
    assert losses(mine) == losses(theirs)
    assert all(torch.equal(a.pool, b.pool) for a, b in zip(mine, theirs, strict=True))
    assert_same_state(ending, endless)
    assert_same_moments(*optimizers)
    [other], [pooled] = (run(sae, each, [N]) for sae, each in zip((ending, endless), optimizers, strict=True))
    assert other.pool is None
    assert pooled.pool is not None
    assert not torch.equal(other.feature_acts.to_dense(), pooled.feature_acts.to_dense())


def saelens_sae(pool):
    if "matryoshka_widths" not in pool:
        return batchtopk_sae()
    given = {"d_in": 12, "d_sae": D_SAE, "k": K, "aux_loss_coefficient": 1 / 32, "matryoshka_widths": list(WIDTHS)}
    return MatryoshkaBatchTopKTrainingSAE(MatryoshkaBatchTopKTrainingSAEConfig(**given))


@steps
@pytest.mark.parametrize("pool", [POOLS[name] for name in POOLS if name != "transcoder"], ids=str)
def test_after_it_a_run_is_saelens_own_from_the_same_weights_and_moments(pool, step):
    """Bit-identical on the dense path; up to rounding on that of the kept entries, here in float64."""
    ours, theirs = made(step=step, pool_steps=N, **pool), saelens_sae(pool)
    if step == "kept":
        ours, theirs = ours.double(), theirs.double()
    optimizer, their_optimizer = adam(ours), adam(theirs)
    run(ours, optimizer, range(N))
    for mine, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        parameter.data.copy_(mine)
    theirs.topk_threshold = ours.topk_threshold.clone()
    their_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    tolerance = {"rtol": 0, "atol": 0} if step == "dense" else {"rtol": 1e-9, "atol": 1e-9}
    for number in range(N, N + 6):
        [mine], [want] = run(ours, optimizer, [number]), run(theirs, their_optimizer, [number])
        assert mine.path == step
        torch.testing.assert_close(mine.feature_acts.to_dense(), want.feature_acts, **tolerance)
        torch.testing.assert_close(mine.losses, want.losses, **tolerance)
        torch.testing.assert_close(mine.loss, want.loss, **tolerance)
    for (name, parameter), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter, want, msg=name, **tolerance)
    torch.testing.assert_close(ours.topk_threshold, theirs.topk_threshold, **tolerance)


@steps
@pools
def test_after_it_a_run_is_that_of_a_pool_of_all_latents_from_the_same_state_to_the_last_bit(pool, step):
    """Last cutoff, thresholds and records included."""
    ours, theirs = made(step=step, pool_steps=N, **pool), made(step=step, **pool | {"pool_factor": None})
    optimizer, their_optimizer = adam(ours), adam(theirs)
    run(ours, optimizer, range(N))
    theirs.load_state_dict(ours.state_dict())
    their_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    mine, want = run(ours, optimizer, range(N, N + 6)), run(theirs, their_optimizer, range(N, N + 6))
    assert losses(mine) == losses(want)
    assert {output.path for output in mine} == {output.path for output in want} == {step}
    assert_same_state(ours, theirs)
    assert_same_moments(optimizer, their_optimizer)
    names = ("extracted_per_kept", "recomputed_per_kept", "pooled_latents", "pool_churn", "selection_gini")
    assert {ours.pool_statistics()[name] for name in names} == {theirs.pool_statistics()[name] for name in names}


@steps
@pytest.mark.parametrize("at", [N - 2, N, N + 2], ids=["inside", "at the end", "after"])
@pytest.mark.parametrize("name", ["columns", "nested", "transcoder"])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, name, at, step):
    sae = made(step=step, pool_steps=N, **POOLS[name])
    optimizer = adam(sae)
    run(sae, optimizer, range(at))
    sae.save_model(tmp_path)
    moments = copy.deepcopy(optimizer.state_dict())
    want = losses(run(sae, optimizer, range(at, N + 4)))
    loaded, resumed = TrainingSAE.load_from_disk(tmp_path), made(step=step, pool_steps=N, **POOLS[name])
    resumed.load_weights_from_checkpoint(tmp_path)
    for again in (loaded, resumed):
        again_optimizer = adam(again)
        again_optimizer.load_state_dict(copy.deepcopy(moments))
        assert losses(run(again, again_optimizer, range(at, N + 4))) == want
        assert_same_state(again, sae)
        assert_same_moments(again_optimizer, optimizer)


def test_one_line_in_the_log_says_it_and_then_the_path_if_that_changes(caplog, tmp_path):
    sae = sampled_sae(pool_factor=1, pool_steps=N, step="kept")
    optimizer = adam(sae)
    said = []
    with caplog.at_level("INFO", logger="sae_lens"):
        for number in range(N + 3):
            if number == N:
                sae.save_model(tmp_path)
            run(sae, optimizer, [number])
            said.append([record.message for record in caplog.records])
            caplog.clear()
        resumed = TrainingSAE.load_from_disk(tmp_path)
        run(resumed, adam(resumed), [N])
    assert [len(lines) for lines in said] == [2, 0, 0, 0, 2, 0, 0]
    assert said[N] == [
        "sampled_topk: after 4 training steps with pools, every latent is a candidate",
        "sampled_topk: training steps of 40 tokens on cpu take the path 'kept'",
    ]
    assert [record.message for record in caplog.records] == said[N]


def test_the_scan_is_in_bfloat16_from_there_on_where_that_is_so_without_pools(monkeypatch, caplog):
    for name in ("MIN_D_IN", "MIN_TOKENS"):
        monkeypatch.setattr(reduced_scan, name, 1)
    monkeypatch.setattr(reduced_scan, "has_bfloat16_instructions", lambda: True)
    sae = sampled_sae(pool_group_size=8, pool_steps=N, step="kept")
    optimizer = adam(sae)
    with caplog.at_level("INFO", logger="sae_lens"):
        run(sae, optimizer, range(N))
        assert sae.pool_statistics()["recomputed_per_kept"] == 0
        run(sae, optimizer, [N])
    assert sae.pool_statistics()["recomputed_per_kept"] > 0
    assert caplog.records[-1].message.endswith(
        "path 'kept', with a scan in bfloat16 where possible and kept values in float32"
    )


def test_records_and_statistics_are_of_a_pool_of_all_latents():
    sae = sampled_sae(pool_factor=1, pool_steps=N)
    optimizer = adam(sae)
    run(sae, optimizer, range(N))
    before = sae.pool_statistics()
    assert (before["pooled_latents"], before["ever_pooled_share"] < 0.5) == (3, True)
    for churn in (1 - 3 / D_SAE, 0):
        run(sae, optimizer, [N])
        after = sae.pool_statistics()
        assert (after["pooled_latents"], after["ever_pooled_share"], after["starved_share"]) == (D_SAE, 1, 0)
        assert after["pool_churn"] == pytest.approx(churn)
    assert after["cutoff"] > 2 * before["cutoff"] > 0


def test_encoding_selects_as_the_next_step_would():
    """`calibrate_thresholds` and evaluations use `select`."""
    sae, plain, pooled = sampled_sae(pool_steps=N), batchtopk_sae(), sampled_sae()
    optimizer = adam(sae)
    run(sae, optimizer, range(N - 1))
    for others in (plain, pooled):
        others.load_state_dict(sae.state_dict(), strict=False)
    x = activations(30)
    assert torch.equal(sae.select(x, draw=3), pooled.select(x, draw=3))
    assert not torch.equal(sae.encode(x), plain.encode(x))
    run(sae, optimizer, [N - 1])
    plain.load_state_dict(sae.state_dict(), strict=False)
    for got in (sae.encode(x), sae.select(x, draw=3), sae.encode_with_hidden_pre(x)[0]):
        assert torch.equal(got, plain.encode(x))
    assert sae.encode_with_pool(x)[2] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_selects_in_plain_saelens_as_its_run_would(dtype, tmp_path):
    sae, x = sampled_sae(pool_steps=N, dtype=dtype), activations(30).to(getattr(torch, dtype))
    optimizer, has_pools = adam(sae), []
    for number in range(N + 1):
        run(sae, optimizer, [number])
        sae.save_model(tmp_path / "checkpoint")
        loaded = SAE.load_from_disk(tmp_path / "checkpoint")
        assert torch.equal(loaded.encode(x), sae.encode(x))
        loaded.save_model(tmp_path / "again")
        assert torch.equal(SAE.load_from_disk(tmp_path / "again").encode(x), sae.encode(x))
        has_pools.append(loaded.cfg.n_candidates < D_SAE)
    assert has_pools == [True] * (N - 1) + [False] * 2
    assert sae.cfg.pool_steps == N  # no config is modified


@pytest.mark.parametrize("pool", [{"pool_factor": 1}, {"pool_factor": 2, "pool_group_size": 8}], ids=str)
def test_the_export_after_it_is_of_the_end_of_training(pool):
    """Long after `pool_steps`, latents that were in no pool fire, and L0 and FVU are close to those in training."""
    sae = sampled_sae(pool_steps=50, **pool)
    optimizer = adam(sae)
    run(sae, optimizer, range(50))
    silent = to_jumprelu(sae).threshold.isinf()
    run(sae, optimizer, range(50, 250))
    held_out = torch.cat([activations(40, seed=10_000 + i) for i in range(30)])
    exported, selected = to_jumprelu(sae), torch.cat([sae.select(rows, draw=0) for rows in held_out.split(40)])
    assert (pool["pool_factor"] > 1) or silent.sum() > D_SAE / 2
    assert exported.threshold.isfinite().all()
    assert (exported.encode(held_out) > 0).sum() / (selected > 0).sum() == pytest.approx(1, abs=0.06)
    fvu, in_training = (
        fraction_of_variance_unexplained(held_out, reconstruction).item()
        for reconstruction in (exported(held_out), sae.decode(selected))
    )
    assert fvu == pytest.approx(in_training, rel=0.06)
