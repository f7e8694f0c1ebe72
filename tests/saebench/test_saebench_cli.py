"""`sae-lens-sampled eval | report | mmcs`, with the extra `eval` and without it."""

import json
import subprocess
import sys

import pytest
import torch
from eval_helpers import D_IN, D_SAE
from sae_lens.saes.sae import TrainingSAE
from typer.testing import CliRunner

from sae_lens_sampled.cli import _overrides, app
from sae_lens_sampled.similarity import random_baseline

WITHOUT = """
import sys

class Missing:
    name = "sae_bench"

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

missing = Missing()
sys.meta_path.insert(0, missing)
"""


def python(code, *arguments):
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def run_without(*commands):
    """Exit status and stderr of each `(module, *command)` while imports of `module` fail; all in one process."""
    code = (
        WITHOUT
        + f"""
import contextlib, io, json
from sae_lens_sampled.cli import app
results = []
for missing.name, *command in {commands!r}:
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            app(command)
        except SystemExit as end:
            results.append((end.code, errors.getvalue().strip()))
print(json.dumps(results))
"""
    )
    return json.loads(python(code).stdout.splitlines()[-1])


def test_without_the_extra_a_command_says_how_to_install_it_and_the_others_work():
    install = "pip install 'sae-lens-sampled[eval]', or '.[eval]' in a clone (without a GPU, see docs/evaluation.md)."
    *refused, (status, _) = run_without(
        ("sae_bench", "eval", "folder"),
        ("sae_bench", "report", "folder"),
        ("threadpoolctl", "mmcs", "folder", "folder"),
        ("sae_bench", "info"),
    )
    for (code, errors), name in zip(refused, ["SAEBench", "SAEBench", "threadpoolctl"], strict=True):
        assert code == 1
        assert errors.endswith(f"sae_lens_sampled.saebench needs {name}: {install}")
    assert status == 0


def test_settings_are_fields_of_configurations():
    assert _overrides(["core.context_size=64", "core.dataset=a=b", "sparse_probing.k_values=[1, 2]"]) == {
        "core": {"context_size": 64, "dataset": "a=b"},
        "sparse_probing": {"k_values": [1, 2]},
    }


@pytest.mark.parametrize("setting", ["core.context_size", "context_size=64"])
def test_a_setting_of_another_form_is_reported(setting):
    result = CliRunner().invoke(app, ["eval", "folder", "--set", setting])
    assert result.exit_code == 2
    assert "is not of the form EVAL.FIELD=VALUE" in result.output


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    from eval_helpers import trained_sae

    folders = []
    for seed in (0, 1):
        folders.append(tmp_path_factory.mktemp("saes") / f"sampled_seed{seed}")
        trained_sae("sampled_topk", seed, torch.randn(2000, 128), n_steps=3).save_model(folders[-1])
    return [str(folder) for folder in folders]


def test_offline_the_command_takes_what_is_bundled(folders, tmp_path):
    arguments = ["eval", *folders, "--offline", "--evals", "core,sparse_probing,mmcs", "--output-dir", str(tmp_path)]
    small = ["core.n_eval_reconstruction_batches=1", "core.n_eval_sparsity_variance_batches=1"]
    small += ["sparse_probing.probe_train_set_size=80", "sparse_probing.probe_test_set_size=40"]
    for setting in small:
        arguments += ["--set", setting]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    files = sorted((tmp_path / "eval_results").rglob("*.json"))
    assert len(files) == 6
    [probing] = [json.loads(file.read_text()) for file in files if "sparse_probing/sampled_seed0" in str(file)]
    assert [detail["dataset_name"] for detail in probing["eval_result_details"]] == [
        "authors_results",
        "sentence_polarity_results",
        "subjectivity_results",
    ]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert str(tmp_path / "report.html") in CliRunner().invoke(app, ["report", str(tmp_path)]).output


def test_errors_are_reported_in_one_line(folders, tmp_path):
    arguments = ["eval", folders[0], "--offline", "--evals", "mmcs", "--output-dir", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == "mmcs compares SAEs, so it needs at least two; leave it out for one."


def test_a_part_evaluates_its_share_of_the_saes(monkeypatch):
    import sae_lens_sampled.saebench

    given = []
    monkeypatch.setattr(sae_lens_sampled.saebench, "run_evals", lambda saes, *_, **__: given.append([*map(str, saes)]))
    saes = [f"sae_{i}" for i in range(5)]
    for index in (1, 2):
        result = CliRunner().invoke(app, ["eval", *saes, "--evals", "core", "--part", f"{index}/2"])
        assert result.exit_code == 0
    assert given == [["sae_0", "sae_2", "sae_4"], ["sae_1", "sae_3"]]
    for options, reason in {
        ("--evals", "core,mmcs", "--part", "1/2"): "mmcs compares all SAEs",
        ("--evals", "core", "--part", "6/6"): "--part 6/6 of 5 SAEs selects none",
        ("--evals", "core", "--part", "3/2"): "--part 3/2: must be of the form 2/8",
    }.items():
        result = CliRunner().invoke(app, ["eval", *saes, *options])
        assert result.exit_code != 0
        assert reason in " ".join(result.output.split())
    assert len(given) == 2


def test_mmcs_prints_both_directions_of_every_pair(folders):
    result = CliRunner().invoke(app, ["mmcs", *folders, folders[0] + "/../sampled_seed0"])
    assert result.exit_code == 1
    assert "two SAEs are called" in result.output
    result = CliRunner().invoke(app, ["mmcs", *folders])
    assert result.exit_code == 0, result.output
    head, _, forward, backward = result.stdout.strip().splitlines()
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    assert (columns[2], columns[8]) == ("decoder", "random")
    for row, pair in ((forward, ("0", "1")), (backward, ("1", "0"))):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[:2] == [f"sampled_seed{seed}_custom_sae" for seed in pair]
        assert cells[8] == f"{random_baseline(D_SAE, D_IN, absolute=False):.3f}"
        assert 0 < float(cells[7]) <= float(cells[4]) < 1  # a one-to-one match is at most the best match


def test_mmcs_refuses_an_sae_with_nan_in_one_line(folders, tmp_path):
    sae = TrainingSAE.load_from_disk(folders[1])
    sae.W_enc.data[:3, 0] = torch.nan
    sae.save_model(tmp_path / "broken")
    result = CliRunner().invoke(app, ["mmcs", folders[0], str(tmp_path / "broken")])
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "SAE 'broken_custom_sae': 3 of 20,480 entries of W_enc are not finite, so this SAE "
    )
    assert (result.stdout, result.stderr.count("\n")) == ("", 1)


def test_mmcs_of_one_sae_is_refused(folders):
    result = CliRunner().invoke(app, ["mmcs", folders[0]])
    assert result.exit_code == 2
    assert "pass at least two SAEs to compare" in result.output
