"""The life cycle of SAEs of random configurations (train, save, resume, export, calibrate), and damaged files.

`LIVES=2000 pytest tests/test_whole_life.py -k live` tests more configurations and takes some minutes.
"""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers import config_of, sae_of, sampled_sae, train
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE, TrainStepInput

from sae_lens_sampled import calibrate_thresholds, load_checkpoint, to_jumprelu
from sae_lens_sampled.step.scores import SCORES

N_LIVES = int(os.environ.get("LIVES", "50"))
FILES = ["cfg.json", "sae_weights.safetensors"]


@st.composite
def configs(draw):
    d_in, d_sae = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    k = draw(st.one_of(st.integers(1, d_sae), st.floats(0.05, d_sae)))
    score = draw(st.sampled_from(sorted(SCORES)))
    sampling = "proportional" if score == "uniform" else draw(st.sampled_from(["top", "proportional"]))
    fields = {
        "pool_factor": draw(st.floats(1, 2 * d_sae / k + 1)),
        "pool_group_size": draw(st.one_of(st.none(), st.integers(1, 20))),
        "pool_seed": draw(st.integers(0, 3)),
        "step": draw(st.sampled_from(["auto", "kept", "dense"])),
        "use_sparse_activations": draw(st.booleans()),
        "inference_threshold": draw(st.sampled_from(["per_latent", "global"])),
        "aux_loss_coefficient": draw(st.sampled_from([0.0, 1 / 32, 1.0])),
        "rescale_acts_by_decoder_norm": draw(st.booleans()),
        "apply_b_dec_to_input": draw(st.booleans()),
        "dtype": draw(st.sampled_from(["float32", "float32", "float64", "bfloat16"])),
    }
    if fields["pool_factor"] < d_sae / k:
        fields["pool_steps"] = draw(st.sampled_from([None, 1, 3]))
    if d_sae > 2 and draw(st.booleans()):
        inner = sorted(draw(st.sets(st.integers(1, d_sae - 1), min_size=1, max_size=3)))
        fields |= {"matryoshka_widths": [*inner, d_sae], "inner_loss_steps": draw(st.sampled_from([None, 2]))}
        fields["inner_loss_coefficient"] = draw(st.sampled_from([0, 0.5, 1]))
    if draw(st.booleans()):  # a transcoder
        fields |= {"d_out": draw(st.integers(1, 12)), "skip": draw(st.booleans()), "apply_b_dec_to_input": False}
    return {"d_in": d_in, "d_sae": d_sae, "k": k, "score": score, "pool_sampling": sampling} | fields


SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=3)


def step_of(sae, shape, seed, dead, autocast):
    generator = torch.Generator().manual_seed(seed)
    width = sum(sae.cfg.batch_parts.values())
    x = (torch.randn(*shape, width, generator=generator) + 0.3).to(sae.W_enc.dtype)
    given_input = TrainStepInput(x, {}, dead, n_training_steps=seed, is_logging_step=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = sae.training_forward_pass(given_input)
    return sae.inputs_and_targets(x)[0], output


def trained(sae, shape, dead, autocast, steps):
    """Take training steps and check their outputs; returns the last inputs."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for seed in steps:
        x, output = step_of(sae, shape, seed, dead, autocast)
        assert output.loss.isfinite()
        acts = output.feature_acts.to_dense().detach()
        assert acts.shape == (*x.shape[:-1], sae.cfg.d_sae)
        assert acts.isfinite().all()
        assert (acts >= 0).all()
        assert (acts > 0).sum() <= int(sae.cfg.k * x[..., 0].numel())
        output.loss.backward()
        assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in sae.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return x


def assert_same_state(a, b):
    theirs = b.state_dict()
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
        assert tensor.dtype == theirs[name].dtype, name


@settings(max_examples=N_LIVES, deadline=None, suppress_health_check=list(HealthCheck))
@given(fields=configs(), shape=SHAPES, autocast=st.booleans(), dead=st.floats(0, 1))
def test_every_configuration_lives(fields, shape, autocast, dead):
    torch.manual_seed(0)
    try:
        sae = sae_of(config_of(fields))
    except ValueError as refusal:
        event(f"refused: {str(refusal).partition('=')[0]}")
        assume(False)
    cfg, is_dead = sae.cfg, torch.rand(sae.cfg.d_sae) < dead
    x = trained(sae, shape, is_dead, autocast, range(3))
    with TemporaryDirectory() as folder, torch.no_grad():
        # The checkpoint: loading restores what was saved, and training continues as it would have.
        sae.save_model(f"{folder}/checkpoint")
        assert_same_state(sae, TrainingSAE.load_from_disk(f"{folder}/checkpoint"))
        resumed = sae_of(config_of(fields))
        resumed.load_weights_from_checkpoint(f"{folder}/checkpoint")
        with torch.enable_grad():
            for each in (sae, resumed):
                trained(each, shape, is_dead, autocast, [3])
        assert_same_state(sae, resumed)
        sae.save_model(f"{folder}/checkpoint")
        assert_same_state(sae, load_checkpoint(f"{folder}/checkpoint"))
        # The export: plain SAELens loads what `to_jumprelu` returns.
        sae.save_inference_model(f"{folder}/export")
        exported = SAE.load_from_disk(f"{folder}/export")
        assert_same_state(exported, to_jumprelu(sae))
        assert exported(x).isfinite().all()
        # Calibration needs latents that are selected often enough.
        try:
            rows = torch.randn(400, sum(cfg.batch_parts.values()), generator=torch.Generator().manual_seed(9)).to(
                x.dtype
            )
            calibrated, report = calibrate_thresholds(sae, rows.split(100), show_progress=False)
        except ValueError as refusal:
            event(f"not calibrated: {str(refusal)[:40]}")
        else:
            assert report.l0_after <= cfg.d_sae
            assert calibrated.encode(x).isfinite().all()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with a checkpoint and an export."""
    folder = tmp_path_factory.mktemp("saved")
    sae = sampled_sae()
    train(sae, 2)
    sae.save_model(folder / "checkpoint")
    sae.save_inference_model(folder / "export")
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncate,
    "foreign": lambda path: path.write_bytes(b"\x89PNG\r\n" * 100),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_words_of_ours(saved, tmp_path, damage, file):
    """Never with an error of json, safetensors or the file system."""
    folder = shutil.copytree(saved / "checkpoint", tmp_path / "checkpoint")
    DAMAGES[damage](folder / file)
    with pytest.raises(ValueError, match=r"checkpoint"):
        load_checkpoint(folder)


@pytest.mark.parametrize("fields", [{"d_sae": 50}, {"d_in": 8}, {"dtype": "float64"}], ids=str)
def test_weights_of_another_checkpoint_are_refused_or_cast(saved, tmp_path, fields):
    """A different size is an error; a different dtype is cast to the config's, as in SAELens."""
    folder, other = shutil.copytree(saved / "checkpoint", tmp_path / "checkpoint"), sampled_sae(**fields)
    other.save_model(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "sae_weights.safetensors", folder)
    if "dtype" in fields:
        assert load_checkpoint(folder).W_dec.dtype == torch.float32
        return
    with pytest.raises(ValueError, match="checkpoint"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["with spaces", "Grüße", "SAE ☃", "a'b"])
def test_names_of_folders_may_be_any(saved, tmp_path, name):
    folder = shutil.copytree(saved / "checkpoint", tmp_path / name)
    assert torch.equal(load_checkpoint(folder).W_dec, load_checkpoint(saved / "checkpoint").W_dec)
    linked = tmp_path / f"link to {name}"
    linked.symlink_to(folder, target_is_directory=True)
    assert torch.equal(load_checkpoint(linked).W_dec, load_checkpoint(saved / "checkpoint").W_dec)
