"""Ctrl-C ends any work, also after a SAELens run in the same process, and handlers are restored."""

import os
import signal
import threading
from unittest import mock

import pytest
import torch
from helpers import sampled_sae
from runner_worker import runner_config
from sae_lens.training._interruption import InterruptedException, interrupt_callback

from sae_lens_sampled import SampledTopKTrainingSAE, calibrate_thresholds, upload_to_hub
from sae_lens_sampled.runners.resumable import ResumableRunner
from sae_lens_sampled.signals import Interrupted, Signals, interruptible

BOTH = (signal.SIGINT, signal.SIGTERM)


def handlers():
    return [signal.getsignal(number) for number in BOTH]


@pytest.fixture(autouse=True)
def _restored():
    before = handlers()
    yield
    for number, handler in zip(BOTH, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def after_a_run_of_saelens():
    """Install SAELens' handlers, which its runs leave behind."""
    for number in BOTH:
        signal.signal(number, interrupt_callback)


def press_ctrl_c(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGINT)
    torch.zeros(1).sum()  # Python handles signals between two instructions


def at_call(n, original):
    """`original`, with Ctrl-C before the n-th call."""
    calls = iter(range(1000))

    def call(*args, **kwargs):
        if next(calls) == n:
            press_ctrl_c()
        return original(*args, **kwargs)

    return call


@pytest.mark.usefixtures("after_a_run_of_saelens")
@pytest.mark.parametrize("place", ["an SAE", "the model", "reconstructions", "SAEBench's retries", "comparisons"])
def test_ctrl_c_in_an_eval_ends_it_and_keeps_what_is_finished(saes, tmp_path, monkeypatch, place):
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    import sae_bench.evals.core.main as core
    from eval_helpers import run_small
    from sae_lens import ActivationsStore

    from sae_lens_sampled.saebench import recording
    from sae_lens_sampled.saebench.evals import EVALS, mmcs

    evals, finished = ["core"], 0
    if place == "an SAE":
        evals, finished = ["sparse_probing"], 1
        monkeypatch.setattr(EVALS["sparse_probing"], "run", at_call(1, EVALS["sparse_probing"].run))
    elif place == "the model":
        monkeypatch.setattr(recording, "record", at_call(0, recording.record))
    elif place == "reconstructions":
        monkeypatch.setattr("sae_lens_sampled.saebench.evals.core._reconstruct", press_ctrl_c)
    elif place == "SAEBench's retries":
        monkeypatch.setattr(recording, "is_shareable", lambda sae: False)
        monkeypatch.setattr(core, "ActivationsStore", mock.Mock(from_sae=at_call(0, ActivationsStore.from_sae)))
    else:
        evals = ["mmcs"]
        monkeypatch.setattr(mmcs, "compare_all", at_call(0, mmcs.compare_all))
    with pytest.raises(KeyboardInterrupt):
        run_small(saes[:2], evals, tmp_path)
    assert len(list(tmp_path.glob("eval_results/*/*"))) == finished
    assert handlers() == [interrupt_callback] * 2


@pytest.mark.usefixtures("after_a_run_of_saelens")
def test_ctrl_c_ends_calibration_caching_loading_and_uploads(tmp_path, monkeypatch):
    from sae_lens_sampled.hub import upload as hub
    from sae_lens_sampled.runners import activation_cache
    from sae_lens_sampled.saebench import load_saes, sources

    sae = sampled_sae()
    with pytest.raises(KeyboardInterrupt):
        calibrate_thresholds(sae, (press_ctrl_c() for _ in range(3)))
    monkeypatch.setattr(activation_cache, "store_settings", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        activation_cache.cache_activations(mock.Mock(), 9, tmp_path, {})
    monkeypatch.setattr(sources, "is_checkpoint", lambda folder: False)
    monkeypatch.setattr(sources.SAE, "load_from_disk", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        load_saes([tmp_path])
    monkeypatch.setattr(hub, "_check_names", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        upload_to_hub({"sae": sae}, "me/sae")
    assert handlers() == [interrupt_callback] * 2


@pytest.mark.usefixtures("after_a_run_of_saelens")
def test_within_signals_do_what_they_do_in_python_and_then_as_before():
    with interruptible():
        assert handlers() == [signal.default_int_handler, signal.SIG_DFL]
        with interruptible():
            assert handlers() == [signal.default_int_handler, signal.SIG_DFL]
    assert handlers() == [interrupt_callback] * 2


def test_a_run_of_saelens_within_ends_like_ctrl_c_and_leaves_nothing():
    before = handlers()

    def run():
        with interruptible():
            for number in BOTH:
                signal.signal(number, interrupt_callback)
            raise InterruptedException

    with pytest.raises(KeyboardInterrupt):
        run()
    assert handlers() == before


def test_handlers_of_the_users_own_are_left_alone():
    own = mock.Mock()
    signal.signal(signal.SIGTERM, own)
    with interruptible():
        assert signal.getsignal(signal.SIGTERM) is own
        os.kill(os.getpid(), signal.SIGTERM)
    assert own.call_count == 1
    assert signal.getsignal(signal.SIGTERM) is own


def in_a_thread(function):
    """What `function` returns or raises in another thread."""
    outcome = []

    def call():
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return outcome[0]


def test_in_another_thread_nothing_is_changed():
    def work():
        with Signals() as signals, interruptible():
            signals.hold()
            signals.release()
            return handlers()

    assert in_a_thread(work) == handlers()


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("before", ["python", "saelens", "user", "nobody"])
def test_signals_give_back_what_was_there(error, before):
    there = {"python": signal.default_int_handler, "saelens": interrupt_callback, "user": mock.Mock()}
    for number in BOTH:
        signal.signal(number, there.get(before, signal.SIG_DFL))
    was = handlers()

    def work():
        with Signals():
            assert handlers() != was
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(error):
            work()
    assert handlers() == was


def test_a_handler_from_outside_python_stays(monkeypatch):
    """Python returns None for such a handler and cannot restore it."""
    installed = mock.Mock()
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", installed)
    with Signals(), interruptible():
        pass
    assert not installed.called


def test_a_signal_while_the_handlers_are_installed_leaves_none(monkeypatch):
    was, install = handlers(), signal.signal

    def installs(number, handler):
        result = install(number, handler)
        if number == signal.SIGINT and handler not in was:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(signal, "signal", installs)
    with pytest.raises(Interrupted), Signals():
        pytest.fail("the work began")
    assert handlers() == was


@pytest.mark.parametrize("ends", ["well", "by an error", "by a signal", "in another thread"])
def test_a_run_of_ours_gives_back_what_was_there(tiny_lm, tmp_path, monkeypatch, ends):
    was = handlers()
    runner = ResumableRunner(runner_config(tiny_lm, tmp_path, "none", training_tokens=256))
    step = SampledTopKTrainingSAE.training_forward_pass
    by = {"by an error": mock.Mock(side_effect=ZeroDivisionError), "by a signal": at_call(0, step)}
    monkeypatch.setattr(SampledTopKTrainingSAE, "training_forward_pass", by.get(ends, step))
    if ends == "well":
        runner.run()
    elif ends == "in another thread":
        assert in_a_thread(runner.run) is runner.sae
    else:
        with pytest.raises((ZeroDivisionError, Interrupted)):
            runner.run()
    assert handlers() == was
    assert runner.signals is None
