import gc
import importlib
import json
import re
import runpy
import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest
import torch
from helpers import config, sampled_sae, train_arguments
from process_helpers import run_script
from sae_lens import SAE, JumpReLUSAE, LanguageModelSAERunnerConfig
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from transformer_lens import HookedTransformer, HookedTransformerConfig
from typer.testing import CliRunner

import sae_lens_sampled
from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig, to_jumprelu
from sae_lens_sampled.cli import app
from sae_lens_sampled.runners.run_checks import check_hook


def run(*command: str, cwd=None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def test_train_runs_saelens_with_our_architecture_and_the_output_needs_no_plugin(tiny_lm, tmp_path):
    arguments = train_arguments(tiny_lm, tmp_path)
    run_script("sae_lens_sampled", "train", *arguments, folder=tmp_path, log=tmp_path / "log")
    cfg = json.loads((tmp_path / "output" / "cfg.json").read_text())
    assert cfg["metadata"]["training_architecture_details"]["pool_group_size"] == 16
    script = """
import sys
from sae_lens import SAE
import torch
sae = SAE.load_from_disk(sys.argv[1])
assert "sae_lens_sampled" not in sys.modules
print(sae.cfg.architecture(), tuple(sae.encode(torch.randn(5, 128)).shape))
"""
    assert run(sys.executable, "-c", script, str(tmp_path / "output")) == "jumprelu (5, 192)\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_factor": "four"}, "argument --pool_factor: invalid float value: 'four'"),
        ({"k": 0}, "k=0.0 must be above 0 and at most d_sae=192."),
        ({"train_batch_size_tokens": 0}, "one of train_batch_size_tokens, "),
        ({"training_tokens": 0}, "training_tokens=0 must be at least 1."),
        ({"device": "cuda:99"}, "torch cannot use device='cuda:99' on this machine; available: cpu"),
        ({"act_store_device": "nonsense"}, "torch cannot use act_store_device='nonsense' on this machine; available:"),
        ({"model_name": "./nothing"}, "model_name='./nothing' cannot be loaded: "),
        ({"dataset_path": "/no/such"}, "dataset_path='/no/such' cannot be loaded: "),
        (
            {"use_cached_activations": True, "cached_activations_path": "/no/such"},
            "cached_activations_path='/no/such' is not a folder; cache the activations there",
        ),
        ({"hook_name": "nonsense"}, "hook_names not found as submodules of the model: ['nonsense']"),
        ({"d_in": 64}, "d_in=64, but gpt_neox.layers.2 of "),
        ({"hook_head_index": 3}, "hook_head_index=3 is out of range: gpt_neox.layers.2 has activations of shape "),
        ({"lr_scheduler_name": "nonsense"}, "Unsupported scheduler: nonsense"),
        ({"seed": 1, "resume_from_checkpoint": "/no/such"}, "resume_from_checkpoint='/no/such' is not a folder; there"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_train_ends_with_the_reason_and_no_traceback(changes, message, tiny_lm, tmp_path, capfd):
    with pytest.raises(SystemExit) as exit_info:
        app(["train", *train_arguments(tiny_lm, tmp_path, **changes)])
    assert exit_info.value.code == 1
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith(message) for line in lines[-2:]), lines
    assert not any("Traceback" in line for line in lines)


def test_the_reason_of_an_error_in_the_middle_stands_below_the_progress_bar(tiny_lm, tmp_path, capfd):
    (tmp_path / "short.jsonl").write_text('{"text": "Too few words."}')
    with pytest.raises(SystemExit):
        app(["train", *train_arguments(tiny_lm, tmp_path, dataset_path=tmp_path)])
    gc.collect()  # anything left of the progress bar would write now
    err = capfd.readouterr().err
    assert "Training SAE" in err
    assert err.endswith("\nUnable to fill buffer after starting new epoch. Dataset may be too small.\n")


def test_train_keeps_the_traceback_of_what_no_flag_explains(tiny_lm, tmp_path, monkeypatch):
    def broken(self, step_input):
        raise AttributeError("a bug")

    monkeypatch.setattr(SampledTopKTrainingSAE, "training_forward_pass", broken)
    with pytest.raises(AttributeError, match="a bug"):
        app(["train", *train_arguments(tiny_lm, tmp_path)])


def test_a_hook_that_a_model_of_transformer_lens_does_not_have_is_named():
    shape = {"n_layers": 1, "d_model": 8, "n_ctx": 4, "d_head": 4, "n_heads": 2, "d_vocab": 5, "act_fn": "relu"}
    model = HookedTransformer(HookedTransformerConfig(**shape))

    def check(hook, d_in, head=None):
        cfg = LanguageModelSAERunnerConfig(
            config(d_in=d_in), hook_name=hook, hook_head_index=head, model_name="small", verbose=False
        )
        check_hook(model, cfg)

    check("blocks.0.attn.hook_z", 8)  # all heads
    check("blocks.0.attn.hook_z", 4, head=1)
    with pytest.raises(ValueError, match=re.escape("hook_name='blocks.7.hook_mlp_out' is not a hook of small")):
        check("blocks.7.hook_mlp_out", 8)
    with pytest.raises(ValueError, match=re.escape("d_in=8, but blocks.0.attn.hook_z of small is 4 wide")):
        check("blocks.0.attn.hook_z", 8, head=1)
    with pytest.raises(ValueError, match=re.escape("hook_head_index=2 is out of range: blocks.0.attn.hook_z has")):
        check("blocks.0.attn.hook_z", 4, head=2)


def test_train_help_is_saelens_own_with_our_fields(capsys):
    with pytest.raises(SystemExit) as exit_info:
        app(["train", "--architecture", "sampled_topk", "--help"], standalone_mode=False)
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--training_tokens" in text
    assert "--pool_group_size [int]" in text
    assert "Number of consecutive tokens that share a pool." in text


def test_info_names_versions_architectures_and_scores():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    for text in (version("sae-lens"), version("torch"), "sampled_topk", "ridge_leverage", "cpu"):
        assert text in result.output


def test_command_is_installed():
    (command,) = entry_points(group="console_scripts", name="sae-lens-sampled")
    assert command.load() is app


def test_a_reader_of_the_entry_point_finds_the_class_and_importing_prints_nothing_and_leaves_sae_bench_alone():
    """Do what a SAELens that looks for plugins would do; nothing else imports ours."""
    script = """
import sys
from importlib.metadata import entry_points
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY, get_sae_training_class
assert "sampled_topk" not in SAE_TRAINING_CLASS_REGISTRY
for plugin in entry_points(group="sae_lens.architectures"):
    plugin.load()
    print(plugin.name, get_sae_training_class(plugin.name)[0].__name__)
print(SAE_CLASS_REGISTRY["sampled_topk"][0].__name__)
import sae_lens_sampled.cli, sae_lens_sampled.similarity
assert not [module for module in sys.modules if module.startswith("sae_bench")]
"""
    assert run(sys.executable, "-c", script).splitlines() == [
        "sampled_topk SampledTopKTrainingSAE",
        "sampled_topk_transcoder SampledTopKTranscoder",
        "SampledTopKSAE",
    ]


def test_version_is_the_distributions():
    assert sae_lens_sampled.__version__ == version("sae-lens-sampled")


def test_importing_twice_and_reloading_are_harmless():
    before = SAE_TRAINING_CLASS_REGISTRY["sampled_topk"]
    importlib.reload(sae_lens_sampled)
    assert SAE_TRAINING_CLASS_REGISTRY["sampled_topk"] is before
    assert before == (sae_lens_sampled.SampledTopKTrainingSAE, sae_lens_sampled.SampledTopKTrainingSAEConfig)


@pytest.mark.parametrize("hook", ["gpt_neox.layers.2", "blocks.2.hook_resid_post"])
def test_calibrate_saves_an_sae_at_the_wanted_l0(tiny_lm, tmp_path, hook):
    sae = SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(d_in=128, d_sae=192, k=8, pool_factor=4))
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.hook_name, metadata.context_size = str(tiny_lm), hook, 64
    metadata.prepend_bos = True
    metadata.model_class_name = "AutoModelForCausalLM" if hook.startswith("gpt") else "HookedTransformer"
    sae.save_model(tmp_path / "checkpoint")
    text, out = str(tiny_lm / "text"), tmp_path / "calibrated"
    arguments = ["--dataset", text, "--out", str(out), "--max-tokens", "3000", "--batch-size", "500"]
    result = CliRunner().invoke(app, ["calibrate", str(tmp_path / "checkpoint"), *arguments, "--target-l0", "5"])
    assert result.exit_code == 0, result.output
    report = dict(line.split() for line in result.stdout.splitlines() if line.startswith(("l0_after", "n_tokens")))
    assert report["n_tokens"] == "3,000"
    # All contexts begin with the same token, so a few activations are equal and one threshold may exclude them all.
    assert float(report["l0_after"]) == pytest.approx(5, abs=0.05)
    assert type(SAE.load_from_disk(out)) is JumpReLUSAE
    again = CliRunner().invoke(app, ["calibrate", str(tmp_path / "checkpoint"), *arguments])
    assert again.exit_code == 2
    assert "already exists; nothing is overwritten" in " ".join(again.output.split())


def test_upload_dry_run_writes_card_and_folders_and_refusals_are_one_line(tmp_path):
    sae = SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(d_in=16, d_sae=32, k=4))
    sae.save_model(tmp_path / "checkpoint")
    to_jumprelu(sae).save_model(tmp_path / "exported")
    folders, staged = [str(tmp_path / "checkpoint"), str(tmp_path / "exported")], tmp_path / "staged"
    result = CliRunner().invoke(app, ["upload", *folders, "--repo-id", "me/saes", "--dry-run", str(staged)])
    assert result.exit_code == 0, result.output
    assert 'SAE.from_pretrained("me/saes"' in (staged / "README.md").read_text()
    for name in ("checkpoint", "exported"):
        assert type(SAE.load_from_disk(staged / name)) is JumpReLUSAE
    refused = CliRunner().invoke(
        app, ["upload", str(tmp_path), "--repo-id", "me/saes", "--dry-run", str(tmp_path / "x")]
    )
    assert refused.exit_code == 1
    assert len(refused.output.strip().splitlines()) == 1


def test_version_is_that_of_the_package():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, version("sae-lens-sampled"))


def test_command_line_starts_with_transformer_lens_2_which_has_no_bridge(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_lens.model_bridge", None)
    fresh = runpy.run_module("sae_lens_sampled.cli")["app"]  # a fresh import; other tests keep their module
    assert "training step, cpu" in CliRunner().invoke(fresh, ["info"]).output


@pytest.mark.parametrize(
    ("has_mkl", "words"),
    [(True, "on the kept entries"), (False, "on the columns of one small pool, else dense: torch has no")],
)
def test_info_says_how_a_step_is_done(monkeypatch, has_mkl, words):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    [line] = [line for line in CliRunner().invoke(app, ["info"]).output.splitlines() if "training step, cpu" in line]
    assert words in line


def test_info_says_on_which_devices_the_path_is_timed(monkeypatch):
    monkeypatch.setattr("sae_lens_sampled.cli.MEASURED_DEVICES", ("cpu",))  # as if it were a GPU
    [line] = [line for line in CliRunner().invoke(app, ["info"]).output.splitlines() if "training step, cpu" in line]
    assert line.endswith("the fastest path, timed at the first step and a few times later")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--dataset", "d"], "no readable training checkpoint in 'nowhere'"),
        (["CHECKPOINT", "--dataset", "d", "--model", "no/such/model"], "model='no/such/model' cannot be loaded: "),
        (
            ["CHECKPOINT", "--dataset", "d", "--device", "cuda:99"],
            "torch cannot use device='cuda:99' on this machine; available:",
        ),
        (["CHECKPOINT", "--dataset", "/no/such", "--model", "MODEL"], "/no/such"),
        (["CHECKPOINT", "--dataset", "TEXT", "--model", "MODEL", "--mode", "mean"], "mode='mean' must be"),
    ],
    ids=["checkpoint", "model", "device", "dataset", "mode"],
)
def test_calibrate_says_what_is_wrong_without_a_traceback(arguments, message, tiny_lm, tmp_path):
    sae = sampled_sae(d_in=128)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.context_size = "blocks.2.hook_resid_post", 16
    sae.cfg.metadata.prepend_bos = True
    sae.save_model(tmp_path / "sae")
    places = {"CHECKPOINT": tmp_path / "sae", "MODEL": tiny_lm, "TEXT": tiny_lm / "text"}
    given = [str(places.get(argument, argument)) for argument in arguments]
    result = CliRunner().invoke(app, ["calibrate", *given, "--out", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in result.output
    assert not (tmp_path / "out").exists()
