import importlib
import json
import runpy
import subprocess
import sys
from importlib.metadata import entry_points, version

import pytest
import torch
from helpers import sampled_sae
from sae_lens import SAE, JumpReLUSAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from typer.testing import CliRunner

import sae_lens_sampled
from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig, to_jumprelu
from sae_lens_sampled.cli import app


def run(*command: str, cwd=None) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


def test_train_runs_saelens_with_our_architecture_and_the_output_needs_no_plugin(tiny_lm, tmp_path):
    flags = {
        "architecture": "sampled_topk",
        "model_class_name": "AutoModelForCausalLM",
        "model_name": tiny_lm,
        "hook_name": "gpt_neox.layers.2",
        "dataset_path": tiny_lm / "text",
        "is_dataset_tokenized": False,
        "d_in": 128,
        "d_sae": 192,
        "k": 8,
        "pool_factor": 3,
        "pool_group_size": 16,
        "context_size": 32,
        "training_tokens": 1024,
        "train_batch_size_tokens": 128,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 8,
        "output_path": tmp_path / "output",
        "checkpoint_path": tmp_path / "checkpoints",
        "log_to_wandb": False,
    }
    arguments = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    run(sys.executable, "-m", "sae_lens_sampled", "train", *arguments, cwd=tmp_path)
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


def test_a_reader_of_the_entry_point_finds_the_class():
    """What a SAELens that looks for plugins would do; nothing else imports ours."""
    script = """
from importlib.metadata import entry_points
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, get_sae_class, get_sae_training_class
assert "sampled_topk" not in SAE_TRAINING_CLASS_REGISTRY
for plugin in entry_points(group="sae_lens.architectures"):
    plugin.load()
    print(plugin.name, get_sae_training_class(plugin.name)[0].__name__, get_sae_class(plugin.name)[0].__name__)
"""
    assert run(sys.executable, "-c", script) == "sampled_topk SampledTopKTrainingSAE SampledTopKSAE\n"


def test_version_is_the_distributions():
    assert sae_lens_sampled.__version__ == version("sae-lens-sampled")


def test_importing_twice_and_reloading_are_harmless():
    before = SAE_TRAINING_CLASS_REGISTRY["sampled_topk"]
    importlib.reload(sae_lens_sampled)
    assert SAE_TRAINING_CLASS_REGISTRY["sampled_topk"] is before
    assert before == (sae_lens_sampled.SampledTopKTrainingSAE, sae_lens_sampled.SampledTopKTrainingSAEConfig)


def test_importing_prints_nothing_and_leaves_sae_bench_alone():
    script = "import sys, sae_lens_sampled; assert not [m for m in sys.modules if m.startswith('sae_bench')]"
    assert run(sys.executable, "-c", script) == ""


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
    # Contexts begin with the same token, so a few activations are equal and a threshold may leave out all of these.
    assert float(report["l0_after"]) == pytest.approx(5, abs=0.05)
    assert type(SAE.load_from_disk(out)) is JumpReLUSAE
    again = CliRunner().invoke(app, ["calibrate", str(tmp_path / "checkpoint"), *arguments])
    assert again.exit_code == 2
    assert "exists already; nothing is overwritten" in " ".join(again.output.split())


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
    fresh = runpy.run_module("sae_lens_sampled.cli")["app"]  # as it is imported anew; the module of the others stays
    assert "training step, cpu" in CliRunner().invoke(fresh, ["info"]).output


@pytest.mark.parametrize(
    ("has_mkl", "words"),
    [(True, "on the kept entries"), (False, "one small pool by its columns, others dense: torch has no")],
)
def test_info_says_how_a_step_is_done(monkeypatch, has_mkl, words):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    [line] = [line for line in CliRunner().invoke(app, ["info"]).output.splitlines() if "training step, cpu" in line]
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--dataset", "d"], "no readable training checkpoint in 'nowhere'"),
        (["CHECKPOINT", "--dataset", "d", "--model", "no/such/model"], "no/such/model"),
        (["CHECKPOINT", "--dataset", "no-such-folder", "--model", "MODEL"], "no-such-folder"),
        (["CHECKPOINT", "--dataset", "TEXT", "--model", "MODEL", "--mode", "mean"], "mode='mean' must be"),
    ],
    ids=["checkpoint", "model", "dataset", "mode"],
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
