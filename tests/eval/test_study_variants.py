"""Studies on SmolLM2 that vary one thing: what they share, and SAEs that are not trained by SAELens' own step."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from study_helpers import storage, unit_of

from sae_lens_sampled import load_checkpoint, to_jumprelu
from study import training
from study.plan import absorption_units, arms, runs, units
from study.studies import BLOCK_10, LONG, OTHER_BLOCKS, SPLIT_10, smoke
from study.training import new_sae, train


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka"])
def test_saelens_architectures_are_trained_by_this_packages_step_and_saved_as_their_own(name, tmp_path):
    """Equal to SAELens' step up to rounding; SAELens' trainer gives both the same batches."""
    theirs = storage(tmp_path / "theirs", replace(smoke(BLOCK_10), own_steps=False))
    ours = storage(tmp_path / "ours", smoke(BLOCK_10))
    unit = unit_of(name, 3, ours.study)
    for study in (theirs, ours):
        train(study, [unit])
    want, got = (load_checkpoint(study.sae(unit)) for study in (theirs, ours))
    assert type(got) is type(want)
    assert got.cfg.to_dict() == want.cfg.to_dict()
    for (key, mine), value in zip(got.state_dict().items(), want.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, value, rtol=1e-3, atol=1e-5, msg=key)


def test_controls_have_a_decoder_as_it_was_drawn_and_a_tenth_of_the_steps(tmp_path):
    study = storage(tmp_path, replace(smoke(BLOCK_10), steps=20))
    frozen, short = (unit_of(name, 3, study.study) for name in ("frozen_decoder", "short"))
    assert [len({unit.arm.steps_share for unit in run}) for run in runs(study.study)] == [1] * len(runs(study.study))
    train(study, [frozen])
    untrained, trained = new_sae(study.study, frozen), load_checkpoint(study.sae(frozen))
    assert torch.equal(trained.W_dec, untrained.W_dec)
    assert not torch.equal(trained.W_enc, untrained.W_enc)
    torch.testing.assert_close(trained.W_dec.norm(dim=1), torch.ones(len(trained.W_dec)))
    x = training.cached_activations(study).float()
    torch.testing.assert_close(training.mean_activation(study.study), x.mean(dim=0), rtol=0.2, atol=0.2)
    off = trained.b_dec - x.mean(dim=0)
    assert off.norm() < 0.5 * x.mean(dim=0).norm()  # it began there, and not at 0
    settings = training.runner_config(study.study, [short], 3, shuffled=True)
    assert (settings.training_tokens, settings.dead_feature_window) == (2 * 512, round(study.study.dead_window / 10))


@pytest.mark.parametrize("fields", [{"own_steps": True}, {"own_steps": False}, {"cached": False}], ids=str)
def test_a_control_with_few_steps_is_exported_with_the_cutoff_of_its_selection(fields, tmp_path, monkeypatch):
    """After 2 steps, SAELens' running mean of rate 0.01 has reached 2 % of the cutoffs, and nearly all latents fire."""
    batches, set_threshold = [], training.set_threshold

    def noted(sae, shown):
        batches.extend(shown)
        set_threshold(sae, shown)

    monkeypatch.setattr(training, "set_threshold", noted)
    study = storage(tmp_path, replace(smoke(BLOCK_10), steps=20, **fields))
    units = [unit_of(name, 3, study.study) for name in ("batchtopk", "short")]
    train(study, units[:1])
    assert batches == []
    train(study, units[1:])
    x = torch.cat(batches).float()
    fired = to_jumprelu(load_checkpoint(study.sae(units[1]))).encode(x) > 0
    assert fired.sum().item() == pytest.approx(study.study.k * len(x), rel=0.02)


def test_variants_of_a_study_have_seeds_and_saes_in_common(tmp_path):
    """Absorption with other settings uses the same SAEs, and the SAEBench results do not collide."""
    two = [storage(tmp_path, study) for study in (BLOCK_10, SPLIT_10)]
    unit = unit_of("batchtopk", 3, BLOCK_10)
    assert unit in absorption_units(SPLIT_10)
    seeds = {arm.name: [unit.seed for unit in units(BLOCK_10) if unit.arm == arm] for arm in arms(BLOCK_10)}
    assert len(seeds) == len(BLOCK_10.arms)
    assert {name for name, of_arm in seeds.items() if of_arm == [3, 4, 5]} == {"narrow_5", "frozen_decoder", "short"}
    assert all(of_arm == [3, 4, 5, 6, 7] for name, of_arm in seeds.items() if name not in BLOCK_10.seeds_by_arm)
    assert two[0].sae(unit) == two[1].sae(unit)
    assert two[0].sae_bench == two[1].sae_bench
    assert two[0].release(unit) != two[1].release(unit)
    assert two[0].activations == two[1].activations != storage(tmp_path, LONG).activations  # more tokens
    assert storage(tmp_path, LONG).sae(unit) != two[0].sae(unit)
    assert len({storage(tmp_path, study).activations for study in (BLOCK_10, *OTHER_BLOCKS)}) == 3
