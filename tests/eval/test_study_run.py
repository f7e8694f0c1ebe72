"""The study's command in this process: unavailable devices, and signals after a stage that trains."""

import signal
import sys
from dataclasses import replace

import pytest

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from sae_lens.training._interruption import InterruptedException, interrupt_callback
from study_helpers import SMOKE, storage, unit_of

from study import evaluation, training
from study.stages import STAGES, Stage


@pytest.fixture
def main(monkeypatch, tmp_path):
    """The command, for the training stage of the smoke run."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script modifies it
    from study import run

    monkeypatch.setattr(run.warnings, "filterwarnings", lambda *_: None)
    monkeypatch.setattr(run.logging, "disable", lambda *_: None)
    folders = ["--work-dir", str(tmp_path / "work"), "--results-dir", str(tmp_path / "results")]
    return lambda *flags: run.main(["--config", "tiny", "--smoke", "--stages", "train", *folders, *flags])


def test_a_device_that_is_not_here_is_reported_in_a_sentence(main, capsys):
    with pytest.raises(SystemExit, match=r"^torch cannot use device='cuda:99' on this machine; available: cpu"):
        main("--device", "cuda:99")
    main("--device", "cuda:99", "--dry-run")
    assert capsys.readouterr().out


def test_a_stage_ends_with_the_handlers_from_before_and_by_ctrl_c_as_in_python(main, monkeypatch):
    before, stopped = signal.getsignal(signal.SIGINT), []

    def trains(_storage, _items):
        signal.signal(signal.SIGINT, interrupt_callback)  # as SAELens' runners do
        if stopped:
            raise InterruptedException

    monkeypatch.setitem(STAGES, "train", Stage(lambda study, has: [1], lambda storage: bool, trains))
    main()
    assert signal.getsignal(signal.SIGINT) is before
    stopped.append(True)
    with pytest.raises(KeyboardInterrupt):
        main()
    assert signal.getsignal(signal.SIGINT) is before


def test_evals_load_the_model_in_the_dtype_of_training(monkeypatch, tmp_path):
    study, seen = replace(SMOKE, dtype="bfloat16"), {}
    unit = unit_of("batchtopk", study=study)
    assert training.runner_config(study, [unit], 0, True).model_from_pretrained_kwargs == {"dtype": "bfloat16"}
    assert training.runner_config(SMOKE, [unit], 0, True).model_from_pretrained_kwargs == {}
    monkeypatch.setattr(evaluation, "run_evals", lambda *_args, **fields: seen.update(fields))
    evaluation.train_probes(storage(tmp_path, study), {})
    assert seen["dtype"] == "bfloat16"
