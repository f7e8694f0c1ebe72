"""Activations on disk: those of the store, whole whatever happens, and in batches from the whole text."""

import errno
import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from datasets import Dataset
from sae_lens import ActivationsStore
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_sampled.activation_cache import DATA, PROGRESS, cache_activations, shuffled_batches, text_store
from sae_lens_sampled.files import NoSpaceError

SETTINGS = {"model": "m", "hook": "blocks.1.hook_resid_post"}


@pytest.fixture(scope="module")
def language_model(tiny_lm):
    return TransformerBridge.boot_transformers(str(tiny_lm), device="cpu")


@pytest.fixture
def store(language_model):
    def new(n_texts: int = 40) -> ActivationsStore:
        texts = [
            f"It was number {i} of the many books that she had read, and so she slept. " * 3 for i in range(n_texts)
        ]
        dataset = Dataset.from_dict({"text": texts})
        return text_store(language_model, dataset, SETTINGS["hook"], d_in=128, context_size=16, prompts=3)

    return new


def test_rows_are_those_of_the_store(store, tmp_path):
    cached = cache_activations(store(), 100, tmp_path, SETTINGS)
    direct = store()
    want = torch.cat([direct.get_filtered_llm_batch() for _ in range(3)])
    assert 100 < len(want) < 3 * 3 * 16  # special tokens are left out
    assert torch.equal(cached, want[:100].bfloat16())
    assert (tmp_path / DATA).stat().st_size == 2 * 100 * 128


def test_what_is_there_is_not_computed_again(store, tmp_path, monkeypatch):
    cached = cache_activations(store(), 100, tmp_path, SETTINGS)
    other = store()
    monkeypatch.setattr(other, "get_batch_tokens", lambda *_, **__: pytest.fail("the text was read again"))
    assert torch.equal(cache_activations(other, 100, tmp_path, SETTINGS), cached)


def test_of_several_that_ask_at_once_one_runs_the_model(store, tmp_path, monkeypatch):
    """Threads here: each call opens the lock's file anew, as a process of its own would."""
    n_passes, get = itertools.count(), ActivationsStore.get_activations

    def slow(store, tokens):
        next(n_passes)
        time.sleep(0.05)
        return get(store, tokens)

    monkeypatch.setattr(ActivationsStore, "get_activations", slow)
    stores = [store() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        cached = list(pool.map(lambda given: cache_activations(given, 100, tmp_path, SETTINGS), stores))
    assert next(n_passes) == 3  # of some 45 tokens
    assert all(torch.equal(other, cached[0]) for other in cached)


def test_a_killed_run_goes_on_where_it_was(store, tmp_path, monkeypatch):
    want = cache_activations(store(), 200, tmp_path / "undisturbed", SETTINGS)
    killed, get = store(), ActivationsStore.get_activations
    calls = itertools.count()

    def dies_at_the_third(tokens):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return get(killed, tokens)

    monkeypatch.setattr(killed, "get_activations", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        cache_activations(killed, 200, tmp_path / "killed", SETTINGS)
    done = json.loads((tmp_path / "killed" / PROGRESS).read_text())
    assert done["prompts"] == 6
    resumed, n_passes = store(), itertools.count()
    monkeypatch.setattr(resumed, "get_activations", lambda tokens: (next(n_passes), get(resumed, tokens))[1])
    assert torch.equal(cache_activations(resumed, 200, tmp_path / "killed", SETTINGS), want)
    assert next(n_passes) == 3  # of five, the two that were done not again


def test_text_that_ends_before_is_refused(store, tmp_path):
    with pytest.raises(ValueError, match=r"the text has some [\d,]+ tokens, but 100,000 are asked for"):
        cache_activations(store(n_texts=10), 100_000, tmp_path, SETTINGS)


def test_activations_of_other_settings_are_refused(store, tmp_path):
    cache_activations(store(), 100, tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=r"has activations of model='m', not 'other'; choose another folder"):
        cache_activations(store(), 100, tmp_path, SETTINGS | {"model": "other"})
    with pytest.raises(ValueError, match=r"has activations of n_tokens=100, not 101"):
        cache_activations(store(), 101, tmp_path, SETTINGS)


def test_a_disk_that_is_too_small_is_told_before_the_model_runs(store, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    of_full_disk = store()
    monkeypatch.setattr(of_full_disk, "get_activations", lambda tokens: pytest.fail("the model ran"))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoSpaceError, match=r"the activations need 2,560.0 MB, but .* make room or choose another"):
        cache_activations(of_full_disk, 10**7, tmp_path, SETTINGS)
    assert not (tmp_path / PROGRESS).exists()


def test_batches_are_epochs_in_random_order():
    activations = torch.arange(10).repeat_interleave(2).view(10, 2).bfloat16()
    batches = shuffled_batches(activations, 4, seed=0)
    first, second = ([next(batches) for _ in range(2)] for _ in range(2))
    for epoch in (first, second):
        rows = torch.cat(epoch)[:, 0].tolist()
        assert len(set(rows)) == 8
        assert set(rows) <= set(range(10))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert first[0].dtype == torch.float32
    assert not torch.equal(next(shuffled_batches(activations, 4, seed=1)), first[0])


@pytest.mark.parametrize("n_seen", [0, 1, 2, 5])
def test_a_resumed_run_sees_the_batches_that_come_next(n_seen):
    activations = torch.randn(10, 2).bfloat16()
    want = list(itertools.islice(shuffled_batches(activations, 4, seed=3), 8))[n_seen:]
    resumed = itertools.islice(shuffled_batches(activations, 4, seed=3, first=n_seen), 8 - n_seen)
    assert all(torch.equal(a, b) for a, b in zip(want, resumed, strict=True))


def test_less_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="3 rows are less than a batch of 4"):
        next(shuffled_batches(torch.zeros(3, 2).bfloat16(), 4, seed=0))
