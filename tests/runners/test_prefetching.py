"""Evaluations that change the model, while a thread prefetches batches with it."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from sae_lens import llm_sae_training_runner
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.prefetch import PrefetchingIterator

from sae_lens_sampled.runners import resumable, transcoder


@pytest.mark.parametrize("evaluator", [resumable.WholeHookEvaluator, transcoder.TranscoderEvaluator])
def test_the_model_is_changed_only_between_the_batches_of_a_prefetching_thread(evaluator, monkeypatch):
    """A pass that has begun would otherwise meet hooks and flags of the evaluation halfway through."""
    began, may_end, events = threading.Event(), threading.Event(), []

    def batches():
        began.set()
        may_end.wait()
        events.append("batch read")
        yield torch.zeros(1)

    @contextmanager
    def changed(*_):
        events.append("model changed")
        yield sae
        events.append("model restored")

    def run_evals(sae, **_):
        events.append("evaluated")
        return {"sae": sae}, {}

    monkeypatch.setattr(resumable, "heads_side_by_side", changed)
    monkeypatch.setattr(transcoder, "as_sae_on_outputs", changed)
    monkeypatch.setattr(llm_sae_training_runner, "run_evals", run_evals)
    sae = SimpleNamespace(cfg=SimpleNamespace(metadata=SimpleNamespace(hook_head_index=None, hook_name="hook")))
    store = SimpleNamespace(exclude_special_tokens=None)
    evaluate = evaluator(None, store, eval_batch_size_prompts=None, n_eval_batches=1, model_kwargs={})
    provider, results = PrefetchingIterator(batches()), []
    began.wait()
    evaluation = threading.Thread(target=lambda: results.append(evaluate(sae, provider, ActivationScaler())))
    evaluation.start()
    time.sleep(0.2)  # long enough to change the model, were it not paused
    may_end.set()
    evaluation.join()
    provider.close()
    assert events == ["batch read", "model changed", "evaluated", "model restored"]
    assert results == [{"sae": sae}]
    assert evaluate(sae, iter(()), ActivationScaler()) == {"sae": sae}  # without prefetching
