"""Checkpoints with other parameters or activations are rejected, naming the field, before anything is loaded."""

import copy
import json
import re

import pytest
import sae_lens.llm_sae_training_runner
import torch
from runner_worker import runner_config
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.saes.sae import TrainingSAE
from safetensors.torch import save_file

from sae_lens_sampled import DataParallelRunner, SampledTopKTranscoder, SampledTopKTranscoderConfig, TranscoderRunner
from sae_lens_sampled.runners.resumable import ResumableRunner
from sae_lens_sampled.runners.run_checks import check_same_activations
from sae_lens_sampled.sae.config import SampledTopKTrainingSAEConfig

SIZES = {"d_in": 128, "d_sae": 192, "k": 4, "pool_factor": 3}
OUT = "gpt_neox.layers.2.mlp"


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Do not look for a missing model on the Hub, which would take half a minute."""

    def load_model(*_args, **_kwargs):
        raise OSError("it is nowhere")

    monkeypatch.setattr(sae_lens.llm_sae_training_runner, "load_model", load_model)


def sae_config(**fields):
    return SampledTopKTrainingSAEConfig(**SIZES | fields)


def transcoder_config(**fields):
    return SampledTopKTranscoderConfig(**SIZES | {"hook_name_out": OUT, "skip": True} | fields)


def resuming(sae, folder, **fields):
    """Config of a run that resumes from `folder / "checkpoint"`, with a model that does not exist."""
    fields = {"model_name": "not there", "resume_from_checkpoint": str(folder / "checkpoint"), **fields}
    return runner_config(folder, folder, "none", sae=sae, **fields)


def save_checkpoint(sae_cfg, folder, **fields):
    """Write a checkpoint that describes what was trained, as a run in `folder` would; its states are empty."""
    cfg, checkpoint = resuming(sae_cfg, folder, resume_from_checkpoint=None, **fields), folder / "checkpoint"
    TrainingSAE.from_dict(copy.deepcopy(sae_cfg).to_dict()).save_model(checkpoint)
    torch.save({}, checkpoint / TRAINER_STATE_FILENAME)
    (checkpoint / ACTIVATION_SCALER_CFG_FILENAME).write_text("{}")
    save_file({}, checkpoint / ACTIVATIONS_STORE_STATE_FILENAME)
    (checkpoint / "runner_cfg.json").write_text(json.dumps(cfg.to_dict()))


def refused(runner, cfg, **given):
    with pytest.raises(ValueError) as error:  # noqa: PT011  compared by the caller
        runner(cfg, **given)
    return str(error.value)


@pytest.mark.parametrize(
    ("ours", "name", "value", "theirs"),
    [
        ({"d_sae": 256}, "d_sae", 256, 192),
        ({"d_in": 64}, "d_in", 64, 128),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input", False, True),
        ({"rescale_acts_by_decoder_norm": False}, "rescale_acts_by_decoder_norm", False, True),
        (
            {"normalize_activations": "expected_average_only_in"},
            "normalize_activations",
            "expected_average_only_in",
            "none",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("runner", [ResumableRunner, DataParallelRunner])
def test_other_weights_are_refused_before_the_model_is_loaded(tmp_path, runner, ours, name, value, theirs):
    save_checkpoint(sae_config(), tmp_path)
    said = refused(runner, resuming(sae_config(**ours), tmp_path))
    assert said == (
        f"{name}={value!r}, but {str(tmp_path / 'checkpoint')!r} was trained with {name}={theirs!r}: its weights do "
        f"not fit, or would mean something else. Use {name}={theirs!r}, or start over without this checkpoint (leave "
        "out resume_from_checkpoint)."
    )


@pytest.mark.parametrize("runner", [ResumableRunner, DataParallelRunner])
def test_the_folder_of_a_run_stands_for_its_newest_checkpoint(tmp_path, runner):
    save_checkpoint(sae_config(), tmp_path)
    cfg = resuming(sae_config(d_sae=256), tmp_path, resume_from_checkpoint=str(tmp_path))
    assert f"d_sae=256, but {str(tmp_path / 'checkpoint')!r} was trained with d_sae=192" in refused(runner, cfg)
    assert cfg.resume_from_checkpoint == str(tmp_path)  # the caller's config is not changed
    (tmp_path / "checkpoint" / TRAINER_STATE_FILENAME).unlink()
    assert "holds no complete checkpoint" in refused(runner, cfg)


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ({"skip": False}, "skip=False, but "),
        ({"d_out": 64}, "d_out=64, but "),
        ({"hook_name_out": "gpt_neox.layers.3.mlp"}, "hook_name_out='gpt_neox.layers.3.mlp', but "),
    ],
    ids=str,
)
def test_another_transcoder_is_refused_before_the_model_is_loaded(tmp_path, ours, said):
    save_checkpoint(transcoder_config(), tmp_path)
    assert refused(TranscoderRunner, resuming(transcoder_config(**ours), tmp_path)).startswith(said)


def test_an_sae_is_no_transcoder_and_the_other_way_round(tmp_path):
    save_checkpoint(transcoder_config(), tmp_path)
    said = refused(DataParallelRunner, resuming(sae_config(), tmp_path))
    assert "holds a 'sampled_topk_transcoder' SAE, which cannot be resumed as 'sampled_topk';" in said
    save_checkpoint(sae_config(), tmp_path)
    said = refused(TranscoderRunner, resuming(transcoder_config(), tmp_path))
    assert "holds a 'sampled_topk' SAE, which cannot be resumed as 'sampled_topk_transcoder';" in said


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (
            {"hook_name": "gpt_neox.layers.3"},
            "hook_name='gpt_neox.layers.3', but {} was trained with hook_name='gpt_neox.layers.2': its weights do not "
            "fit, or would mean something else. Use hook_name='gpt_neox.layers.2', or start over without this ",
        ),
        ({"hook_head_index": 1}, "hook_head_index=1, but {} was trained with hook_head_index=None: "),
        ({"model_class_name": "HookedTransformer"}, "model_class_name='HookedTransformer', but {} was trained with "),
        (
            {"model_from_pretrained_kwargs": {"revision": "step1", "device_map": "cpu"}},
            "model_from_pretrained_kwargs={{'revision': 'step1'}}, but {} was trained with ",
        ),
    ],
    ids=str,
)
def test_other_activations_are_refused_before_the_model_is_loaded(tmp_path, ours, said):
    save_checkpoint(sae_config(), tmp_path)
    assert refused(ResumableRunner, resuming(sae_config(), tmp_path, **ours)).startswith(
        said.format(repr(str(tmp_path / "checkpoint")))
    )


def test_the_sae_that_is_given_is_the_one_that_is_compared(tmp_path):
    save_checkpoint(transcoder_config(), tmp_path)
    other = SampledTopKTranscoder(transcoder_config(d_sae=256))
    said = refused(TranscoderRunner, resuming(transcoder_config(), tmp_path), override_sae=other)
    assert said.startswith("d_sae=256, but ")
    other.save_model(tmp_path / "pretrained")
    cfg = resuming(transcoder_config(), tmp_path, from_pretrained_path=str(tmp_path / "pretrained"))
    assert refused(TranscoderRunner, cfg) == said


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lr": 1e-4, "training_tokens": 4096, "n_checkpoints": 7, "context_size": 16, "n_batches_in_buffer": 64},
        {"model_from_pretrained_kwargs": {"device_map": "cpu", "cache_dir": "elsewhere"}},
        {"sae": sae_config(k=8, pool_factor=2, pool_group_size=16, matryoshka_widths=[96, 192])},
        {"sae": sae_config(normalize_activations="none")},
    ],
    ids=str,
)
def test_fields_that_do_not_affect_the_activations_may_change(tmp_path, changes):
    """If nothing is rejected, the next step is to load the model, which fails here."""
    save_checkpoint(sae_config(), tmp_path)
    cfg = resuming(**{"sae": sae_config(), "folder": tmp_path, "model_name": "moved/away", **changes})
    assert refused(ResumableRunner, cfg).startswith("model_name='moved/away' cannot be loaded")


def test_fields_that_a_checkpoint_lacks_are_not_compared(tmp_path):
    save_checkpoint(transcoder_config(), tmp_path)
    for name in ("cfg.json", "runner_cfg.json"):
        path = tmp_path / "checkpoint" / name
        known = json.loads(path.read_text())
        for field in ("skip", "hook_name", "rescale_acts_by_decoder_norm"):
            known.pop(field, None)
        path.write_text(json.dumps(known))
    changed = transcoder_config(skip=False, rescale_acts_by_decoder_norm=False)
    cfg = resuming(changed, tmp_path, hook_name="gpt_neox.layers.1")
    assert refused(TranscoderRunner, cfg).startswith("model_name='not there' cannot be loaded")
    save_checkpoint(transcoder_config(), tmp_path)
    (tmp_path / "checkpoint" / "runner_cfg.json").write_text("[]")
    assert "cannot be loaded" in refused(TranscoderRunner, resuming(transcoder_config(), tmp_path))


def test_the_end_of_a_normalised_run_may_be_asked_for_as_it_was_trained(tmp_path):
    """The final checkpoint says "none", because the factor is folded into its weights."""
    trained = sae_config(normalize_activations="expected_average_only_in")
    save_checkpoint(trained, tmp_path)
    path = tmp_path / "checkpoint" / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalize_activations": "none"}))
    for wanted in ("expected_average_only_in", "none"):
        cfg = resuming(sae_config(normalize_activations=wanted), tmp_path)
        assert refused(ResumableRunner, cfg).startswith("model_name=")
    cfg = resuming(sae_config(normalize_activations="covariance_whitening"), tmp_path)
    assert re.match(
        "normalize_activations='covariance_whitening', but .* with normalize", refused(ResumableRunner, cfg)
    )


def test_a_transcoder_of_given_batches_can_go_on_with_a_named_hook(tmp_path):
    save_checkpoint(transcoder_config(hook_name_out=None, d_out=None), tmp_path)
    cfg = resuming(transcoder_config(d_out=128), tmp_path)
    assert refused(TranscoderRunner, cfg).startswith("model_name=")


def test_config_fields_of_the_model_are_ignored_for_a_model_passed_in(tmp_path):
    save_checkpoint(sae_config(), tmp_path)
    cfg = resuming(sae_config(), tmp_path, model_class_name="HookedTransformer")
    check_same_activations(tmp_path / "checkpoint", cfg, own_model=True)
    with pytest.raises(ValueError, match=r"^model_class_name="):
        check_same_activations(tmp_path / "checkpoint", cfg, own_model=False)


def test_a_checkpoint_that_is_not_there_is_reported_before_the_model_loads(tmp_path):
    said = refused(ResumableRunner, resuming(sae_config(), tmp_path))
    assert said.startswith(
        f"resume_from_checkpoint='{tmp_path / 'checkpoint'}' is not a folder; there is no complete checkpoint"
    )
