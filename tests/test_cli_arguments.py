"""Invalid numbers and paths: commands reject each in one sentence, before any work."""

import errno
import os

import pytest
import sae_lens.llm_sae_training_runner
import torch
from helpers import train_arguments
from sae_lens.saes.sae import SAE
from typer.testing import CliRunner

from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig, to_jumprelu
from sae_lens_sampled.cli import app
from sae_lens_sampled.runners import calibrate_command as command

RUN = {
    "calibrate": ["calibrate", "SAE", "--dataset", "TEXT", "--out", "NEW"],
    "eval": ["eval", "SAE", "--evals", "core", "--model", "MODEL", "--text", "TEXT", "--output-dir", "NEW"],
}
OF_CALIBRATE = {
    "--batch-size": {"0": "--batch-size", "-1": "--batch-size", "10000000": "larger than max_tokens=1000000"},
    "--max-tokens": {
        "0": "--max-tokens",
        "-1": "--max-tokens",
        "10**15": "GB of memory; lower max_tokens",
    },
    "--target-l0": {
        "0": "above 0 and at most d_sae=192",
        "-1": "above 0",
        "nan": "target_l0=nan",
        "1e9": "at most d_sae",
    },
    "--device": {"cuda:99": "torch cannot use device='cuda:99'"},
    "--mode": {"mean": "mode='mean' must be"},
    "--model-kwargs": {"[1]": "is not a JSON object", "{": "is not a JSON object"},
}
OF_EVAL = {
    "--seed": {"-1": "--seed", str(2**32): "--seed", "nan": "--seed"},
    "--part": {"0/1": "--part 0/1", "2/1": "--part 2/1", "-1/2": "--part -1/2"},
    "--set": {
        "core.context_size=0": "core.context_size=0 must be",
        "core.context_size=-3": "core.context_size=-3 must be",
        "core.context_size=NaN": "core.context_size=nan must be",
        "core.batch_size_prompts=0": "core.batch_size_prompts=0 must be",
        "core.n_eval_sparsity_variance_batches=-1": "core.n_eval_sparsity_variance_batches=-1 must be",
        'core.context_size="two"': "core.context_size='two' must be",
        "sparse_probing.llm_batch_size=-5": "sparse_probing.llm_batch_size=-5 must be a positive integer",
        "sparse_probing.k_values=[0]": "sparse_probing.k_values=[0] must be a list of positive integers",
        "sparse_probing.k_values=[]": "must be a list of positive integers",
        "core.context_size": "is not of the form EVAL.FIELD=VALUE",
    },
    "--evals": {"core, mmcz": "'mmcz'", ",": "must be one or more of"},
    "--device": {"cuda:99": "torch cannot use device='cuda:99'"},
    "--dtype": {"float7": "dtype='float7'"},
}
CASES = [
    (name, option, value, message)
    for name, table in (("calibrate", OF_CALIBRATE), ("eval", OF_EVAL))
    for option, values in table.items()
    for value, message in values.items()
]


@pytest.fixture(scope="module")
def folders(tiny_lm, tmp_path_factory):
    """Paths that the words in capitals stand for."""
    folder = tmp_path_factory.mktemp("saes")
    sae = SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(d_in=128, d_sae=192, k=8, pool_factor=4))
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.hook_name, metadata.context_size = str(tiny_lm), "blocks.2.hook_resid_post", 64
    metadata.prepend_bos = True
    sae.save_model(folder / "checkpoint")
    return {"SAE": folder / "checkpoint", "TEXT": tiny_lm / "text", "MODEL": tiny_lm}


def invoke(name, folders, new, *more):
    places = {**folders, "NEW": new}
    return CliRunner().invoke(app, [str(places.get(word, word)) for word in [*RUN[name], *more]])


def refusal(result):
    assert result.exit_code in (1, 2), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(("name", "option", "value", "message"), CASES)
def test_invalid_values_are_refused(name, option, value, message, folders, tmp_path, monkeypatch):
    if name == "eval":
        pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    else:
        monkeypatch.setattr(command, "load_model_of_run", lambda *_: pytest.fail("the model was loaded first"))
    value = str(10**15) if value == "10**15" else value
    result = invoke(name, folders, tmp_path / "out", f"{option}={value}")
    assert message in refusal(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--batch-size", "--max-tokens"])
@pytest.mark.parametrize("value", ["1e400", "nan", "two"])
def test_calibrate_refuses_what_is_not_a_number(option, value, folders, tmp_path):
    assert option in refusal(invoke("calibrate", folders, tmp_path / "out", f"{option}={value}"))


COUNTS = (
    "training_tokens",
    "train_batch_size_tokens",
    "context_size",
    "store_batch_size_prompts",
    "d_in",
    "d_sae",
    "k",
)
FLAGS_OF_TRAIN = [*COUNTS, "n_batches_in_buffer", "pool_factor", "pool_group_size", "lr", "n_checkpoints"]
TAKEN = {("n_checkpoints", "0"), ("lr", "0"), ("pool_factor", "1e400")}
"""Accepted values: no checkpoint but the last, a learning rate that trains nothing, and inf for every latent."""


@pytest.mark.parametrize("flag", FLAGS_OF_TRAIN)
def test_numbers_of_train_are_refused_by_their_name(flag, tiny_lm, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(sae_lens.llm_sae_training_runner, "load_model", lambda *_, **__: pytest.fail("too late"))
    for value in ("0", "-1", "1e400", "nan", "two"):
        if (flag, value) in TAKEN:
            continue
        with pytest.raises(SystemExit) as exit_info:
            app(["train", *train_arguments(tiny_lm, tmp_path, **{flag: value})])
        last = capfd.readouterr().err.splitlines()[-1]
        assert exit_info.value.code in (1, 2), (flag, value)
        assert flag in last, (value, last)


def test_a_buffer_smaller_than_a_batch_is_refused_with_one_that_is_not(tiny_lm, tmp_path, capfd):
    with pytest.raises(SystemExit):
        app(["train", *train_arguments(tiny_lm, tmp_path, n_batches_in_buffer=8, train_batch_size_tokens=512)])
    err = capfd.readouterr().err
    assert "n_batches_in_buffer=8 prompts hold 256 tokens, fewer than one batch of train_batch_size_tokens=512" in err
    assert "for a buffer that mixes two batches, set it to 32." in err


@pytest.mark.parametrize("name", RUN)
def test_an_output_path_that_cannot_be_a_folder_is_refused_before_the_work(name, folders, tmp_path, monkeypatch):
    if name == "eval":
        pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    monkeypatch.setattr(command, "load_checkpoint", lambda *_, **__: pytest.fail("the SAE was loaded first"))
    (tmp_path / "afile").write_text("")
    below = refusal(invoke(name, folders, tmp_path / "afile" / "x"))
    assert "cannot be a folder: " in below
    assert "afile' is a file." in below
    itself = refusal(invoke(name, folders, tmp_path / "afile"))
    assert ("already exists" if name == "calibrate" else "afile' is a file.") in itself
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    assert "' is not writable." in refusal(invoke(name, folders, tmp_path / "new" / "x"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["afile"]


def test_a_dry_run_folder_below_a_file_is_refused(folders, tmp_path):
    (tmp_path / "afile").write_text("")
    arguments = ["upload", str(folders["SAE"]), "--repo-id", "me/saes", "--dry-run", str(tmp_path / "afile" / "x")]
    assert "dry_run_folder=" in refusal(CliRunner().invoke(app, arguments))


def test_a_full_disk_is_reported_before_calibrating(folders, tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(command, "load_model_of_run", lambda *_: pytest.fail("the model was loaded first"))
    result = invoke("calibrate", folders, tmp_path / "out")
    assert "1.2 MB are needed for the calibrated SAE, but" in refusal(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [("", "train.jsonl"), ('{"text": "Too few words."}\n', "gives no prompt of context_size=64 tokens: it has")],
    ids=["no rows", "no prompt"],
)
def test_a_text_too_short_to_calibrate_on_is_reported(rows, message, folders, tmp_path):
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "train.jsonl").write_text(rows)
    result = invoke("calibrate", {**folders, "TEXT": tmp_path / "short"}, tmp_path / "out")
    assert message in refusal(result) or "has no rows" in refusal(result)
    assert not (tmp_path / "out").exists()


def test_a_calibration_that_fails_leaves_nothing_behind(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "calibrate_thresholds", lambda *_, **__: 1 / 0)
    result = invoke("calibrate", folders, tmp_path / "out")
    assert isinstance(result.exception, ZeroDivisionError)
    assert list(tmp_path.iterdir()) == []


def test_upload_takes_names_as_eval_does(folders, tmp_path):
    staged = tmp_path / "staged"
    exported = to_jumprelu(SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(d_in=16, d_sae=32, k=4)))
    exported.save_model(tmp_path / "a" / "sae")
    exported.save_model(tmp_path / "b" / "sae")
    pair = [str(tmp_path / name / "sae") for name in "ab"]
    arguments = ["--repo-id", "me/saes", "--dry-run", str(staged)]
    assert "pass NAME=FOLDER" in refusal(CliRunner().invoke(app, ["upload", *pair, *arguments]))
    result = CliRunner().invoke(app, ["upload", f"first={pair[0]}", f"second={pair[1]}", *arguments])
    assert result.exit_code == 0, result.output
    for name in ("first", "second"):
        assert torch.equal(SAE.load_from_disk(staged / name).W_dec, exported.W_dec)
