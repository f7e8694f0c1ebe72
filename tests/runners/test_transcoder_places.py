"""Pairs of hooks between which a transcoder can be trained and evaluated, and pairs that are rejected."""

import pytest
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, LanguageModelSAETrainingRunner
from sae_lens.training.activation_scaler import ActivationScaler
from transcoder_runner_helpers import BRIDGED_IN, runner_config
from typer.testing import CliRunner

from sae_lens_sampled import (
    SampledTopKTrainingSAE,
    SampledTopKTrainingSAEConfig,
    SampledTopKTranscoder,
    SampledTopKTranscoderConfig,
    TranscoderRunner,
    as_sae_on_outputs,
)
from sae_lens_sampled.cli import app


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hook_name_out": None},
            "hook_name_out is None; set it to the hook whose activations are to be reconstructed.",
        ),
        ({"hook_name_out": "gpt_neox.layers.9.mlp"}, "hook_names not found as submodules of the model: "),
        ({"d_out": 64}, "d_out=64, but gpt_neox.layers.2.mlp of "),
        ({"hook_name": "gpt_neox.layers.2.mlp.act"}, "d_in=128, but gpt_neox.layers.2.mlp.act of "),
        ({"hook_head_index": 1}, "hook_head_index=1 must be None for a transcoder"),
        ({"use_cached_activations": True}, "use_cached_activations=True caches one hook, but a transcoder"),
    ],
    ids=str,
)
def test_what_a_transcoder_cannot_read_is_reported_at_the_start(tiny_lm, fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  compared below
        TranscoderRunner(runner_config(tiny_lm, **fields))
    assert str(error.value).startswith(message)


def test_hooks_of_transformer_lens_are_checked_too(tiny_lm, bridge):
    with pytest.raises(ValueError, match=r"hook_name_out='blocks\.9\.hook_mlp_out' is not a hook of "):
        TranscoderRunner(
            runner_config(tiny_lm, hook_name=BRIDGED_IN, hook_name_out="blocks.9.hook_mlp_out"), override_model=bridge
        )
    # In attention patterns the second dimension is the heads; elsewhere it is the tokens.
    cfg = runner_config(tiny_lm, hook_name=BRIDGED_IN, hook_name_out="blocks.2.attn.hook_pattern")
    with pytest.raises(ValueError, match=r"shapes \(1, 1, 128\) and \(1, 4, 1, 1\) for one token: a transcoder needs"):
        TranscoderRunner(cfg, override_model=bridge)


def test_heads_are_side_by_side_in_evaluations_too(tiny_lm, tmp_path):
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    from eval_helpers import run_small

    from sae_lens_sampled.saebench.models import load_model

    hooks = {"hook_name": "blocks.2.attn.hook_z", "hook_name_out": "blocks.2.hook_attn_out"}
    runner = TranscoderRunner(runner_config(tiny_lm, **hooks), override_model=load_model(tiny_lm).hooked)
    made = runner.run()
    metrics = runner.evaluator(made, runner.activations_store, ActivationScaler())
    assert metrics["sparsity"]["l0"] == 8
    assert metrics["reconstruction_quality"]["cossim"] > 0.1
    with pytest.raises(ValueError, match="'heads_custom_sae' is a transcoder from or to attention heads, which core"):
        run_small([("heads", made)], ["core"], tmp_path)


def test_an_sae_that_is_given_must_be_such_a_transcoder(tiny_lm):
    cfg, wider = runner_config(tiny_lm), runner_config(tiny_lm, d_out=512).sae
    sae = SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(d_in=256, d_sae=256, k=8))
    batchtopk = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=256, d_sae=256, k=8))
    for given, named in (
        (sae, "a SampledTopKTrainingSAE"),
        (batchtopk, "a BatchTopKTrainingSAE"),
        (SampledTopKTranscoder(wider), "512}"),
    ):
        with pytest.raises(ValueError, match=f"{named}, but the config asks for a transcoder with {{'d_in': 128"):
            TranscoderRunner(cfg, override_sae=given)


def test_hooks_that_are_not_named_are_reported(tiny_lm, bridge, tmp_path):
    nameless = SampledTopKTranscoder(runner_config(tiny_lm, hook_name_out=None).sae)
    nameless.cfg.metadata.hook_name = BRIDGED_IN
    told = r"the metadata of this SampledTopKTranscoder has no hook_name_out; set sae.cfg.metadata.hook_name_out to"
    with pytest.raises(ValueError, match=told), as_sae_on_outputs(nameless, bridge):
        pass
    nameless.save_model(tmp_path / "checkpoint")
    arguments = ["--dataset", str(tiny_lm / "text"), "--out", str(tmp_path / "out"), "--model", str(tiny_lm)]
    result = CliRunner().invoke(app, ["calibrate", str(tmp_path / "checkpoint"), *arguments])
    assert result.exit_code == 1
    assert told in result.output


def test_an_sae_is_not_for_this_runner_nor_a_transcoder_for_saelens_own(tiny_lm):
    sae = runner_config(tiny_lm)
    sae.sae = SampledTopKTranscoderConfig.__mro__[1](d_in=128, d_sae=256, k=8)
    with pytest.raises(
        ValueError, match="architecture='sampled_topk' is not sampled_topk_transcoder, the only one that"
    ):
        TranscoderRunner(sae)
    with pytest.raises(
        ValueError, match=r"\(256, 128\) must have last dimension d_in \+ d_out=256: .*, as TranscoderRunner"
    ):
        LanguageModelSAETrainingRunner(runner_config(tiny_lm)).run()


def test_core_takes_transcoders_between_widths(tiny_lm, bridge, tmp_path):
    """From the MLP's input to its neurons, which are more numerous."""
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    from eval_helpers import run_small

    hooks = {"hook_name": BRIDGED_IN, "hook_name_out": "blocks.2.mlp.hook_post"}
    made = TranscoderRunner(runner_config(tiny_lm, d_out=512, **hooks), override_model=bridge).run()
    result = run_small([("wide", made)], ["core"], tmp_path)["core"]["wide_custom_sae"]
    assert result["eval_result_metrics"]["reconstruction_quality"]["explained_variance"] > 0
    assert all(latent["encoder_decoder_cosine_sim"] == 0 for latent in result["eval_result_details"])
    W_dec = made.W_dec.detach() / made.W_dec.norm(dim=1, keepdim=True)
    cosines = (W_dec @ W_dec.T).fill_diagonal_(-1).amax(dim=1)
    for latent in result["eval_result_details"][::20]:
        assert latent["max_decoder_cosine_sim"] == pytest.approx(cosines[latent["index"]].item(), abs=1e-5)
