"""`run_evals` with existing results, after a kill, and with failing SAEs: nothing is lost or modified."""

import copy
import errno
import fcntl
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

import sae_bench.evals.absorption.common as absorption_common
import sae_bench.evals.core.main as core
from eval_helpers import (
    ALL,
    EXAMPLES,
    GIVEN,
    HOOK,
    PROBING,
    SMALL,
    TINY_LM,
    exported,
    run_small,
)

from sae_lens_sampled.files import NoSpaceError, atomic_path, atomic_write, reporting_no_space, reserve, scratch_folder
from sae_lens_sampled.saebench import EvalError, load_saes, run_evals
from sae_lens_sampled.saebench.evals import EVALS
from sae_lens_sampled.saebench.evals.absorption import Absorption


def test_results_that_exist_are_kept_and_others_are_added(results, saes, output_dir, tmp_path, monkeypatch):
    output_dir = shutil.copytree(output_dir, tmp_path / "out")  # other tests read the original
    ran = []
    for name in ALL:

        def noted(self, sae, original=EVALS[name].run):
            ran.append((self.name, sae.name))
            return original(self, sae)

        monkeypatch.setattr(EVALS[name], "run", noted)
    again = run_evals(saes, ALL, output_dir=output_dir, overrides=SMALL, **GIVEN)
    assert ran == []
    assert again == results
    run_small([*saes[2:3], ("new", saes[0][1])], ["sparse_probing"], output_dir)
    assert ran == [("sparse_probing", "new_custom_sae")]
    ran.clear()
    run_small(saes[2:3], ["sparse_probing"], output_dir, force_rerun=True)
    assert ran == [("sparse_probing", "batchtopk_custom_sae")]


def test_results_of_another_sae_model_or_configuration_are_not_replaced(saes, tmp_path):
    run_small(saes[2:3], ["core"], tmp_path)
    for changed, other_saes, fields in (
        ("sae", [("batchtopk", saes[0][1])], {}),
        ("config", saes[2:3], {"overrides": {"core": SMALL["core"] | {"context_size": 40}}}),
    ):
        with pytest.raises(ValueError, match=rf"batchtopk_custom_sae_eval.*does not match this {changed}; "):
            run_small(other_saes, ["core"], tmp_path, **fields)


KILLED = """
import sys, torch
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from sae_lens_sampled import load_checkpoint
from sae_lens_sampled.saebench import run_evals
sys.path[:0] = {folders_of_helpers!r}
from eval_helpers import PROBING, SMALL, TINY_LM
run_evals([Path(path) for path in {folders!r}], ["core", "sparse_probing"], TINY_LM, {output!r}, text=TINY_LM / "text",
          probing_datasets=[PROBING], overrides={{name: SMALL[name] for name in ("core", "sparse_probing")}})
"""


def test_a_killed_run_goes_on_where_it_was(results, saes, tmp_path):
    folders = []
    for name, sae in saes[:3]:
        sae.save_model(tmp_path / name)
        folders.append(str(tmp_path / name))
    output = tmp_path / "out"
    script = KILLED.format(
        folders_of_helpers=[str(Path(__file__).parents[1]), str(EXAMPLES)], folders=folders, output=str(output)
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not list(output.glob("eval_results/core/*.json")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    kept = {file: file.stat().st_mtime_ns for file in output.glob("eval_results/core/*.json")}
    got = run_small([Path(folder) for folder in folders], ["core", "sparse_probing"], output)
    assert all(file.stat().st_mtime_ns == before for file, before in kept.items())
    assert not list((output / "artifacts").glob("unfinished*"))
    for eval_name, by_name in got.items():
        for name, result in by_name.items():
            assert result["eval_result_metrics"] == results[eval_name][name]["eval_result_metrics"]


def test_nothing_is_written_outside_the_output_folder(run_of_all, output_dir):
    assert run_of_all.after == run_of_all.before
    assert len(run_of_all.before[0]) > 100
    assert run_of_all.before[-1] == set()  # the working directory
    assert {path.name for path in output_dir.iterdir()} == {"eval_results", "artifacts"}


def test_the_callers_saes_random_state_and_gradients_stay_as_they_are(saes, tmp_path):
    sae = copy.deepcopy(saes[0][1])
    weights = {name: value.clone() for name, value in sae.state_dict().items()}
    config, torch_state, grad = sae.cfg.to_dict(), torch.get_rng_state(), torch.is_grad_enabled()
    python_state, numpy_state = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with torch.no_grad():
        run_small([("one", sae)], ["sparse_probing"], tmp_path)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled() == grad
    assert sae.cfg.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in sae.state_dict().items())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert np.random.get_state()[1].tolist() == numpy_state  # noqa: NPY002


def test_an_sae_that_fails_is_named_with_the_reason_and_the_others_have_results(saes, tmp_path, monkeypatch):
    broken = copy.deepcopy(exported(saes, "topk"))
    broken.encode = mock.Mock(side_effect=ArithmeticError("this SAE cannot encode"))
    with pytest.raises(EvalError) as error:
        run_small([("good", saes[2][1]), ("broken", broken)], ["sparse_probing"], tmp_path)
    assert str(error.value).startswith(
        "1 of 2 results are missing:\nsparse_probing of broken_custom_sae: ArithmeticError: this SAE"
    )
    assert [file.name for file in tmp_path.glob("eval_results/*/*")] == ["good_custom_sae_eval_results.json"]


def test_core_goes_on_without_an_sae_that_fails(saes, tmp_path):
    broken = copy.deepcopy(exported(saes, "topk"))
    broken.encode = mock.Mock(side_effect=ArithmeticError("this SAE cannot encode"))
    with pytest.raises(EvalError) as error:
        run_small([("broken", broken), ("good", saes[2][1])], ["core"], tmp_path / "both")
    assert str(error.value).splitlines()[1:] == ["core of broken_custom_sae: ArithmeticError: this SAE cannot encode"]
    [file] = tmp_path.glob("both/eval_results/core/*")
    [alone] = run_small([("good", saes[2][1])], ["core"], tmp_path / "alone")["core"].values()
    assert json.loads(file.read_text())["eval_result_metrics"] == alone["eval_result_metrics"]


def test_saes_with_nan_fail_alone(saes, tmp_path):
    checkpoint, export = copy.deepcopy(saes[0][1]), exported(saes, "batchtopk")
    checkpoint.W_dec.data[:2, 0] = torch.nan
    checkpoint.save_model(tmp_path / "checkpoint")
    export.threshold.data[:3] = torch.nan
    export.threshold.data[3] = torch.inf  # legitimate: a latent that cannot fire
    sources = [tmp_path / "checkpoint", ("export", export), *saes[:2]]
    with pytest.raises(EvalError) as error:
        run_small(sources, ["core", "mmcs"], tmp_path)
    lines = [line.partition(" are not finite, ")[0] for line in str(error.value).splitlines()]
    assert lines == [
        "4 of 8 results are missing:",
        "core of checkpoint_custom_sae, mmcs of checkpoint_custom_sae: ValueError: 2 of 20,480 entries of W_dec",
        "core of export_custom_sae, mmcs of export_custom_sae: ValueError: 3 of 160 entries of threshold",
    ]
    for name in ("core", "mmcs"):
        found = sorted(path.name.partition("_custom")[0] for path in tmp_path.glob(f"eval_results/{name}/*"))
        assert found == ["sampled_seed0", "sampled_seed1"]


def test_an_sae_that_only_broken_ones_could_be_compared_with_has_its_other_results(saes, tmp_path):
    broken = copy.deepcopy(saes[1][1])
    broken.b_dec.data[0] = torch.inf
    with pytest.raises(EvalError) as error:
        run_small([saes[0], ("broken", broken)], ["core", "mmcs"], tmp_path)
    assert str(error.value).startswith("3 of 4 results are missing:\ncore of broken_custom_sae, mmcs of broken_")
    assert str(error.value).endswith(
        "\nmmcs of sampled_seed0_custom_sae: ValueError: the SAEs to compare it with are broken"
    )
    assert [path.parent.name for path in tmp_path.glob("eval_results/*/*")] == ["core"]


def test_another_text_or_other_labelled_texts_are_another_configuration(saes, tmp_path):
    text = tmp_path / "text"
    shutil.copytree(TINY_LM / "text", text)
    fields = {"text": text, "probing_datasets": [tmp_path / "mine"]}
    shutil.copytree(PROBING, tmp_path / "mine")
    evals = ["core", "sparse_probing"]
    run_small(saes[2:3], evals, tmp_path / "out", **fields)
    text.rename(tmp_path / "elsewhere")
    run_small(saes[2:3], evals, tmp_path / "out", **fields | {"text": tmp_path / "elsewhere"})
    for changed, eval_name in (
        (tmp_path / "elsewhere" / "train.jsonl", "core"),
        (tmp_path / "mine" / "test.jsonl", evals[1]),
    ):
        changed.write_text("".join(changed.read_text().splitlines(keepends=True)[1:]))
        with pytest.raises(ValueError, match="holds a result that does not match this config"):
            run_small(saes[2:3], [eval_name], tmp_path / "out", **fields | {"text": tmp_path / "elsewhere"})


def test_errors_that_core_swallows_are_raised(saes, tmp_path, monkeypatch):
    monkeypatch.setattr(core, "calculate_misc_metrics", lambda _metrics: 1 / 0)
    with pytest.raises(EvalError, match="core of one_custom_sae: ZeroDivisionError: division by zero"):
        run_small([("one", saes[2][1])], ["core"], tmp_path)


def test_a_model_with_too_few_first_letters_is_reported(saes, tmp_path, copy_probes):
    copy_probes(tmp_path)
    overrides = {"absorption": SMALL["absorption"] | {"min_GT_probe_f1": 0.999, "min_feats_for_eval": 26}}
    with pytest.raises(EvalError, match=r"fewer than min_feats_for_eval=26 letters have a probe with F1 above"):
        run_small(saes[2:3], ["absorption"], tmp_path, overrides=overrides)


def full(*_args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("eval_name", "need"),
    [
        ("core", "0.3 MB are needed for the activations that core records"),
        ("absorption", r"[\d.]+ MB are needed for the activations for absorption's probes"),
    ],
)
def test_a_file_that_does_not_fit_is_reported_before_it_is_mapped(eval_name, need, saes, tmp_path, monkeypatch):
    """Writing it through a memory map would kill the process. Core has 3 batches of 4 prompts of 48 tokens of 128."""
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpaceError, match=rf"^{need}.*, but {tmp_path}/artifacts\S* has [\d,.]+ MB left "):
        run_small(saes[2:3], [eval_name], tmp_path)
    assert {path.name for path in (tmp_path / "artifacts").iterdir()} <= {"sae_bench.log", "absorption.lock"}


@pytest.mark.parametrize("n_free", [999, 1000])
def test_without_an_allocation_the_free_space_decides(n_free, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=n_free))
    if n_free < 1000:
        with pytest.raises(NoSpaceError):
            reserve(tmp_path / "file", 1000, "numbers")
    else:
        reserve(tmp_path / "file", 1000, "numbers")
    assert (tmp_path / "file").exists() == (n_free == 1000)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # torch.save
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_writer_of_a_full_disk_is_understood(error, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=4096))
    message = rf"^there is more to write, but {tmp_path} has 0\.0 MB left \(less under a quota\); make room"
    with pytest.raises(NoSpaceError, match=message), reporting_no_space(tmp_path):
        raise error
    with pytest.raises(ValueError, match="another"), reporting_no_space(tmp_path):
        raise ValueError("another")


def test_a_file_that_does_not_fit_leaves_the_one_that_was_there(tmp_path, monkeypatch):
    atomic_write(tmp_path / "result.json", "before")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(NoSpaceError, match="there is more to write"):
        atomic_write(tmp_path / "result.json", "after")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


def test_runs_of_other_hosts_into_one_folder_leave_each_other_alone(results, saes, tmp_path, monkeypatch):
    """Another host with the same process ID completes a whole run during core of the first run."""
    core_eval, name = EVALS["core"], "batchtopk_custom_sae"
    prepare, metrics = core_eval.prepare, []

    def interrupted(self, pending):
        prepare(self, pending)
        monkeypatch.setattr(core_eval, "prepare", prepare)
        monkeypatch.setattr(platform, "node", lambda: "other")
        metrics.append(run_small(saes[2:3], ["core"], tmp_path)["core"][name]["eval_result_metrics"])
        assert self.setup.scratch.exists()

    monkeypatch.setattr(core_eval, "prepare", interrupted)
    metrics.append(run_small(saes[2:3], ["core"], tmp_path)["core"][name]["eval_result_metrics"])
    assert metrics == 2 * [results["core"][name]["eval_result_metrics"]]
    assert {path.name for path in (tmp_path / "artifacts").iterdir()} <= {"sae_bench.log", "absorption.lock"}


@pytest.mark.parametrize(
    ("host", "locks", "deleted"),
    [(platform.node(), True, True), ("other", True, False), (platform.node(), False, False)],
)
def test_scratch_is_deleted_on_its_own_host_once_its_lock_is_gone(host, locks, deleted, tmp_path, monkeypatch):
    abandoned = tmp_path / f"unfinished_0@{host}"
    abandoned.mkdir()
    (tmp_path / f"{abandoned.name}.lock").touch()
    if not locks:
        monkeypatch.setattr(fcntl, "flock", mock.Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))))
    with scratch_folder(tmp_path) as first, scratch_folder(tmp_path) as second:
        assert first.exists()
        assert second.exists()
        assert abandoned.exists() == (not deleted)
    assert len(list(tmp_path.iterdir())) == (0 if deleted else 2)


def test_what_somebody_else_finished_first_stays_and_is_success(tmp_path):
    with atomic_path(tmp_path / "saes" / "one") as mine:
        mine.mkdir()
        with atomic_path(tmp_path / "saes" / "one") as other:
            other.mkdir()
            (other / "weights").write_text("theirs")
        (mine / "weights").write_text("mine")
    assert (tmp_path / "saes" / "one" / "weights").read_text() == "theirs"
    assert [path.name for path in (tmp_path / "saes").iterdir()] == ["one"]


def test_probes_that_another_run_finished_first_are_taken(saes, tmp_path, monkeypatch):
    def train_probes(hooked, layers, probes_dir, **_settings):
        for folder in (probes_dir, evaluation._probes):
            place = folder / hooked.cfg.model_name / f"layer_{layers[0]}"
            place.mkdir(parents=True)
            (place / "probe.pth").write_text(folder.parent.name)

    monkeypatch.setattr(absorption_common, "train_and_save_probes", train_probes)
    model = SimpleNamespace(
        name="lm", hooked=SimpleNamespace(cfg=SimpleNamespace(model_name="lm"), run_with_cache=None)
    )
    folders = {"scratch": tmp_path / "scratch", "artifacts": tmp_path / "kept", "output_dir": tmp_path}
    (tmp_path / "artifacts").mkdir()
    setup = SimpleNamespace(model=model, seed=1, llm_batch_size=2, dtype="float32", d_sae=8, device="cpu", **folders)
    evaluation = EVALS["absorption"](setup, {})
    evaluation.prepare(load_saes(saes[2:3]))
    assert (evaluation._probes / "lm" / "layer_2" / "probe.pth").read_text() == "absorption"


def test_probes_are_trained_by_one_process_and_the_others_wait(tmp_path, monkeypatch):
    trained = []

    def train_slowly(evaluation, layer, folder):
        trained.append(layer)
        time.sleep(0.3)
        folder.mkdir(parents=True)

    monkeypatch.setattr(Absorption, "_train_probes", train_slowly)
    monkeypatch.setattr(Absorption, "_probes", tmp_path / "probes")
    model = SimpleNamespace(hooked=SimpleNamespace(cfg=SimpleNamespace(model_name="a_model")))
    evaluation = Absorption.__new__(Absorption)
    evaluation.setup = SimpleNamespace(output_dir=tmp_path, model=model)
    (tmp_path / "artifacts").mkdir()
    sae = SimpleNamespace(sae=SimpleNamespace(cfg=SimpleNamespace(metadata=SimpleNamespace(hook_name=HOOK))))
    with ThreadPoolExecutor(3) as beside:
        list(beside.map(lambda _: evaluation.prepare([sae]), range(3)))
    assert trained == [2]
