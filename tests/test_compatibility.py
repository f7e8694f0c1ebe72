"""Files of earlier versions load: a checkpoint and an export of `sampled_sae(pool_group_size=16)` after 30 steps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import activations, sampled_sae, step_input
from sae_lens import SAE

from sae_lens_sampled import load_checkpoint

BEFORE = Path(__file__).parent / "data" / "before"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())


def test_an_export_of_before_gives_the_same_activations():
    sae = SAE.load_from_disk(BEFORE / "export")
    x = activations(64, seed=7)
    assert sae.threshold.tolist() == [torch.inf if t is None else t for t in EXPECTED["thresholds"]]
    assert (sae.encode(x) > 0).sum(dim=0).tolist() == EXPECTED["fired"]
    assert sae(x).double().sum().item() == pytest.approx(EXPECTED["reconstruction"], rel=1e-5)


def test_a_checkpoint_of_before_exports_the_same_sae_and_trains_on():
    sae = load_checkpoint(BEFORE / "checkpoint")
    assert sae.pool_record.n_steps.item() == EXPECTED["n_steps"] == 30
    assert (sae.encode(activations(64, seed=7)) > 0).sum().item() == EXPECTED["selected"]
    want = SAE.load_from_disk(BEFORE / "export")
    learnt = sae.rate_matcher.threshold
    fires = want.threshold.isfinite()
    torch.testing.assert_close((learnt * 1.0)[fires], (want.threshold * 1.0)[fires])
    # A value missing from such a checkpoint is set by the next step.
    assert sae.pool_record.input_norm == 0
    x = activations(64, seed=8)
    sae.training_forward_pass(step_input(x, step=30))
    assert sae.pool_record.input_norm.item() == pytest.approx(x.norm(dim=-1).mean().item())


def test_pool_steps_of_the_resuming_run_apply_to_checkpoints_of_earlier_versions():
    assert "pool_steps" not in json.loads((BEFORE / "checkpoint" / "cfg.json").read_text())
    x = activations(64, seed=8)
    assert load_checkpoint(BEFORE / "checkpoint").cfg.pool_steps is None
    for pool_steps, has_pool in ((None, True), (31, True), (30, False)):
        sae = sampled_sae(pool_group_size=16, pool_steps=pool_steps)
        sae.load_weights_from_checkpoint(BEFORE / "checkpoint")
        assert (sae.training_forward_pass(step_input(x)).pool is not None) == has_pool


def test_checkpoints_with_the_removed_pool_quota_are_refused(tmp_path):
    checkpoint = shutil.copytree(BEFORE / "checkpoint", tmp_path / "checkpoint")
    config = json.loads((checkpoint / "cfg.json").read_text())
    assert config["pool_quota"] is None  # as in such checkpoints without a quota, which load
    (checkpoint / "cfg.json").write_text(json.dumps(config | {"pool_quota": [0.5, 0.5]}))
    message = r"pool_quota=\[0.5, 0.5\] was an option of earlier versions.*Its JumpReLU export still works\.$"
    for load in (load_checkpoint, SAE.load_from_disk, sampled_sae(pool_group_size=16).load_weights_from_checkpoint):
        with pytest.raises(ValueError, match=message):
            load(checkpoint)
