"""`calibrate` uses the model and the tokens of the training run, whatever the run's options were."""

import json
import shutil

import pytest
import torch
from eval_helpers import official
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.load_model import load_model
from sae_lens.saes.sae import SAE, SAEMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from sae_lens_sampled import SampledTopKTrainingSAEConfig, calibrate_thresholds, load_checkpoint
from sae_lens_sampled.cli import app
from sae_lens_sampled.metrics import fraction_of_variance_unexplained
from sae_lens_sampled.runners.calibrate_command import activations_of_run
from sae_lens_sampled.runners.language_model import dtype_of, load_model_of_run, meaningful_kwargs, model_kwargs_of
from sae_lens_sampled.runners.resumable import ResumableRunner
from sae_lens_sampled.runners.training_data import (
    TokenSettings,
    buffer_prompts,
    expected_first_token_share,
    first_token_share,
    remember_settings,
    token_settings,
)

HOOK = "gpt_neox.layers.2"
TOKEN_OPTIONS = {
    "all tokens": {},
    "no special tokens": {"exclude_special_tokens": True},
    "without two tokens": {"exclude_special_tokens": [0, 14]},
    "whole passages": {"disable_concat_sequences": True},
    "separated by eos": {"sequence_separator_token": "eos", "exclude_special_tokens": True},
    "no separator, no bos": {"sequence_separator_token": None, "prepend_bos": False},
    "from the third position": {"seqpos_slice": (2, None)},
}


def run_config(model, text, **fields):
    sae = SampledTopKTrainingSAEConfig(d_in=128, d_sae=192, k=8, pool_factor=8, pool_group_size=16)
    return LanguageModelSAERunnerConfig(
        **{
            "sae": sae,
            "model_class_name": "AutoModelForCausalLM",
            "model_name": str(model),
            "hook_name": HOOK,
            "dataset_path": str(text),
            "is_dataset_tokenized": False,
            "context_size": 32,
            "training_tokens": 60 * 256,
            "train_batch_size_tokens": 256,
            "store_batch_size_prompts": 32,
            "n_batches_in_buffer": 32,
            "lr": 3e-3,
            "checkpoint_path": None,
            "output_path": None,
            "logger": LoggingConfig(log_to_wandb=False),
            "verbose": False,
            **fields,
        }
    )


@pytest.fixture(scope="module")
def loud_first_token(tiny_lm, tmp_path_factory):
    """The bundled model with its first token's embedding scaled by 50, to imitate the outliers of large models."""
    folder = tmp_path_factory.mktemp("models") / "loud"
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    model.get_input_embeddings().weight.data[tokenizer.bos_token_id] *= 50
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", TOKEN_OPTIONS.values(), ids=TOKEN_OPTIONS)
@pytest.mark.parametrize("known_from", ["metadata", "runner_cfg"])
def test_the_tokens_are_those_of_the_run(options, known_from, tiny_lm, tmp_path):
    runner = ResumableRunner(run_config(tiny_lm, tiny_lm / "text", **options))
    runner._set_sae_metadata()
    metadata = SAEMetadata.from_dict(json.loads(json.dumps(runner.sae.cfg.metadata.to_dict())))
    if known_from == "runner_cfg":
        (tmp_path / "runner_cfg.json").write_text(json.dumps(runner.cfg.to_dict()))
        metadata = SAEMetadata(hook_name=HOOK, model_name=str(tiny_lm), model_class_name="AutoModelForCausalLM")
    settings = token_settings(metadata, tmp_path)
    assert settings.unknown == ()
    runner.sae.cfg.metadata = metadata
    store = activations_of_run(runner.sae, settings, str(tiny_lm / "text"), batch_size=256)
    assert torch.equal(store.get_filtered_llm_batch(), runner.activations_store.get_filtered_llm_batch())


@pytest.mark.parametrize("options", TOKEN_OPTIONS.values(), ids=TOKEN_OPTIONS)
def test_the_share_of_first_tokens_is_that_of_the_options(options, tiny_lm):
    runner = LanguageModelSAETrainingRunner(run_config(tiny_lm, tiny_lm / "text", **options))
    store = runner.activations_store
    share = first_token_share(store)
    first, total = 0, 0
    for _ in range(8):  # the same prompts, one by one
        for prompt in store.get_batch_tokens(32):
            for position in range(32)[slice(*store.seqpos_slice)]:
                if store.exclude_special_tokens is None or prompt[position] not in store.exclude_special_tokens:
                    first, total = first + (position == 0), total + 1
    assert share == pytest.approx(first / total)
    runner._set_sae_metadata()
    settings = token_settings(runner.sae.cfg.metadata)
    want = expected_first_token_share(settings, runner.model.tokenizer.bos_token_id)
    assert share == pytest.approx(want, rel=0.1)


@pytest.mark.parametrize("options", TOKEN_OPTIONS.values(), ids=TOKEN_OPTIONS)
def test_calibration_costs_no_fvu_on_the_tokens_of_training(options, loud_first_token, tiny_lm, tmp_path):
    """After training without first tokens, calibrating on all tokens raised FVU on the others from .34 to .39."""
    text = tiny_lm / "text"
    fields = {"hook_name": "gpt_neox.layers.0", "training_tokens": 150 * 256, "save_final_checkpoint": True}
    cfg = run_config(loud_first_token, text, checkpoint_path=str(tmp_path / "checkpoints"), **fields, **options)
    runner = LanguageModelSAETrainingRunner(cfg)  # SAELens' own
    runner.run()
    [checkpoint] = (tmp_path / "checkpoints").glob("*/final_*")
    arguments = ["--max-tokens", "8000", "--batch-size", "256"]
    result = CliRunner().invoke(
        app, ["calibrate", str(checkpoint), "--dataset", str(text), "--out", str(tmp_path / "out"), *arguments]
    )
    assert result.exit_code == 0, result.output
    x = torch.cat([runner.activations_store.get_filtered_llm_batch() for _ in range(8)])
    sae = load_checkpoint(checkpoint)
    sae.save_inference_model(tmp_path / "learnt")
    learnt, calibrated = (SAE.load_from_disk(tmp_path / name) for name in ("learnt", "out"))
    with torch.no_grad():
        before, after = (fraction_of_variance_unexplained(x, each(x)).item() for each in (learnt, calibrated))
    assert after < 1.01 * before
    norm = sae.pool_record.input_norm.item()
    assert norm == pytest.approx(x.norm(dim=-1).mean().item(), rel=0.1)
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert f"(in training {norm:,.4g})" in lines["mean_norm"]
    assert lines["tokens"].startswith(f"context_size=32, prepend_bos={options.get('prepend_bos', True)}")
    assert all(f"{name}={value!r}" in lines["tokens"] for name, value in options.items())
    measured, in_training = (
        float(share.strip("%)")) for share in lines["first_tokens"].split(" (expected by the training settings: ")
    )
    assert measured == pytest.approx(in_training, rel=0.1)
    with pytest.warns(UserWarning, match=r"have a mean norm of [\d.]+, those of training had [\d.]+: the text or"):
        calibrate_thresholds(sae, [1.2 * x], show_progress=False)


def test_unknown_token_settings_are_assumed_and_named(tmp_path):
    settings = token_settings(SAEMetadata(context_size=16, prepend_bos=True, exclude_special_tokens=None), tmp_path)
    assert settings == TokenSettings(16, True, unknown=settings.unknown)
    assert settings.described().startswith("context_size=16, prepend_bos=True; unknown, so assumed: seqpos_slice=")
    assert "exclude_special_tokens=False" in settings.described()
    assert expected_first_token_share(settings, 0) is None
    for missing in ("context_size", "prepend_bos"):
        metadata = SAEMetadata(context_size=16, prepend_bos=True)
        metadata[missing] = None
        with pytest.raises(ValueError, match=rf"^the metadata of this SAE has no {missing}, so the tokens"):
            token_settings(metadata, tmp_path)


def test_the_settings_of_a_run_replace_those_of_the_run_that_its_weights_are_from():
    metadata = SAEMetadata(context_size=32, prepend_bos=False, autocast_lm=True, use_chat_formatting=True)
    settings = TokenSettings(context_size=16, prepend_bos=True)
    remember_settings(metadata, settings)
    assert token_settings(metadata) == settings


def test_an_unknown_value_in_the_metadata_does_not_hide_the_runs(tmp_path):
    (tmp_path / "runner_cfg.json").write_text(json.dumps({"context_size": 64, "prepend_bos": True}))
    assert token_settings(SAEMetadata(context_size=None), tmp_path).context_size == 64


@pytest.mark.parametrize(("batch_size", "context_size"), [(4096, 16), (4096, 32), (4096, 63), (16384, 128), (1, 1024)])
def test_the_buffer_follows_from_batch_and_context(batch_size, context_size):
    settings = TokenSettings(context_size, True, seqpos_slice=(1, None))
    prompts = buffer_prompts(batch_size, settings)
    assert prompts == 64 or 4 * batch_size <= prompts * (context_size - 1) < 4 * batch_size + context_size


@pytest.mark.parametrize(("context_size", "batch_size"), [(16, 4096), (63, 4096), (128, 16384)])
def test_calibrate_takes_batches_longer_than_its_old_buffer(context_size, batch_size, tiny_lm, tmp_path):
    sae = ResumableRunner(run_config(tiny_lm, tiny_lm / "text", context_size=context_size)).sae
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.hook_name, metadata.model_class_name = str(tiny_lm), HOOK, "AutoModelForCausalLM"
    store = activations_of_run(sae, TokenSettings(context_size, True), str(tiny_lm / "text"), batch_size)
    assert next(store).shape == (batch_size, 128)


@pytest.fixture(scope="module")
def two_models(tiny_lm, tmp_path_factory):
    """Folder with the bundled model, and a different model in its subfolder `step1000`."""
    folder = tmp_path_factory.mktemp("models") / "two"
    shutil.copytree(tiny_lm, folder, ignore=shutil.ignore_patterns("text"))
    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    for weights in model.parameters():
        weights.data += 0.1 * torch.randn_like(weights) * weights.data.abs().mean()
    model.save_pretrained(folder / "step1000")
    return folder


MODELS = {
    "another subfolder": ("AutoModelForCausalLM", HOOK, {"subfolder": "step1000"}),
    "in bfloat16": ("AutoModelForCausalLM", HOOK, {"dtype": "bfloat16"}),
    "a subfolder as HookedTransformer": ("HookedTransformer", "blocks.2.hook_resid_post", {"subfolder": "step1000"}),
    "centred": ("HookedTransformer", "blocks.2.hook_resid_post", {"center_writing_weights": True}),
    "folded": ("HookedTransformer", "blocks.2.hook_resid_post", {"fold_ln": True, "center_writing_weights": True}),
    "HookedTransformer in bfloat16": ("HookedTransformer", "blocks.2.hook_resid_post", {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize(("class_name", "hook", "kwargs"), MODELS.values(), ids=MODELS)
def test_the_model_is_that_of_the_run(class_name, hook, kwargs, two_models):
    with official(two_models):
        want = load_model(class_name, str(two_models), "cpu", kwargs, [hook])
    metadata = SAEMetadata(
        model_name=str(two_models), model_class_name=class_name, model_from_pretrained_kwargs=kwargs, hook_name=hook
    )
    got = load_model_of_run(metadata, [hook])
    plain = load_model_of_run(metadata, [hook], kwargs={})
    tokens = torch.arange(2, 26).view(2, 12)
    want, got, plain = (m.run_with_cache(tokens, names_filter=[hook])[1][hook].float() for m in (want, got, plain))
    assert torch.equal(got, want)
    assert not torch.allclose(plain, want, atol=1e-3)


def test_kwargs_that_cannot_be_had_are_refused_in_a_sentence(two_models):
    metadata = SAEMetadata(model_name=str(two_models), model_from_pretrained_kwargs={"subfolder": "step7"})
    with pytest.raises(ValueError, match=r"has no step7/config.json; .* the subfolder that model_from_pretrained"):
        load_model_of_run(metadata, ["blocks.2.hook_resid_post"])
    metadata.model_from_pretrained_kwargs = {"checkpoint_value": 3}
    with pytest.raises(
        ValueError,
        match=r"cannot be loaded with .*'checkpoint_value': 3.*; if these .* another model, pass other model_kwargs",
    ):
        load_model_of_run(metadata, ["blocks.2.hook_resid_post"])
    with pytest.raises(ValueError, match=r"^the metadata of this SAE has no model_name; pass the model"):
        load_model_of_run(SAEMetadata(), [])


def test_only_kwargs_that_make_it_another_model_count():
    defaults = {"center_writing_weights": False, "fold_ln": False, "device_map": "auto", "n_devices": 2}
    assert model_kwargs_of(SAEMetadata(model_from_pretrained_kwargs=defaults)) == {}
    assert model_kwargs_of(SAEMetadata()) == {}
    assert meaningful_kwargs({"revision": "step3", "fold_ln": True}) == {"fold_ln": True, "revision": "step3"}
    assert dtype_of({"torch_dtype": "torch.bfloat16"}) == dtype_of({"dtype": torch.bfloat16}) == "bfloat16"
    assert dtype_of({}) is None
    with pytest.raises(ValueError, match=r"has dtype='auto', which is not a dtype; pass that of the training run"):
        dtype_of({"torch_dtype": "auto"})
