"""Cached activations equal the store's, stay complete after any failure, and are batched from the whole text."""

import copy
import errno
import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from datasets import Dataset, DatasetDict
from sae_lens import ActivationsStore
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_sampled.files import NoSpaceError
from sae_lens_sampled.runners import activation_cache
from sae_lens_sampled.runners.activation_cache import DATA, PROGRESS, cache_activations, shuffled_batches, text_store
from sae_lens_sampled.runners.stores import fingerprint_model

SETTINGS = {"model": "m", "hook": "blocks.1.hook_resid_post"}


@pytest.fixture(scope="module")
def language_model(tiny_lm):
    return TransformerBridge.boot_transformers(str(tiny_lm), device="cpu")


@pytest.fixture
def store(language_model):
    def new(n_texts: int = 40, model: Any = language_model, **fields: Any) -> ActivationsStore:
        texts = [
            f"It was number {i} of the many books that she had read, and so she slept. " * 3 for i in range(n_texts)
        ]
        dataset = Dataset.from_dict({"text": texts})
        given = {"hook_name": SETTINGS["hook"], "d_in": 128, "context_size": 16, "prompts": 3}
        return text_store(model, dataset, **given | fields)

    return new


def test_rows_are_those_of_the_store(store, tmp_path):
    cached = cache_activations(store(), 100, tmp_path, SETTINGS)
    direct = store()
    want = torch.cat([direct.get_filtered_llm_batch() for _ in range(3)])
    assert 100 < len(want) < 3 * 3 * 16  # special tokens are left out
    assert torch.equal(cached, want[:100].bfloat16())
    assert (tmp_path / DATA).stat().st_size == 2 * 100 * 128


def test_existing_activations_are_not_computed_again(store, tmp_path, monkeypatch):
    cached = cache_activations(store(), 100, tmp_path, SETTINGS)
    other = store()
    monkeypatch.setattr(other, "get_batch_tokens", lambda *_, **__: pytest.fail("the text was read again"))
    assert torch.equal(cache_activations(other, 100, tmp_path, SETTINGS), cached)


def test_only_one_of_several_concurrent_calls_runs_the_model(store, tmp_path, monkeypatch):
    """Threads stand in for processes: each call opens the lock file anew, as a separate process would."""
    n_passes, get = itertools.count(), ActivationsStore.get_activations

    def slow(store, tokens):
        next(n_passes)
        time.sleep(0.05)
        return get(store, tokens)

    monkeypatch.setattr(ActivationsStore, "get_activations", slow)
    stores = [store() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        cached = list(pool.map(lambda given: cache_activations(given, 100, tmp_path, SETTINGS), stores))
    assert next(n_passes) == 3  # of about 45 tokens each
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
    for n_tokens in (150, 300):
        with pytest.raises(
            ValueError, match=rf"unfinished cache, {done['tokens']} of n_tokens=200, so .* be {n_tokens};"
        ):
            cache_activations(store(), n_tokens, tmp_path / "killed", SETTINGS)
    with pytest.raises(ValueError, match=r"holds activations of 6 prompts, before which the text now ends, so it has"):
        cache_activations(store(n_texts=1), 200, tmp_path / "killed", SETTINGS)
    resumed, n_passes = store(), itertools.count()
    monkeypatch.setattr(resumed, "get_activations", lambda tokens: (next(n_passes), get(resumed, tokens))[1])
    assert torch.equal(cache_activations(resumed, 200, tmp_path / "killed", SETTINGS), want)
    assert next(n_passes) == 3  # five in all; the two finished ones are not repeated


def test_text_that_is_too_short_is_refused(store, tmp_path):
    with pytest.raises(ValueError, match=r"the text yields about [\d,]+ tokens, but n_tokens=100,000 are needed: it"):
        cache_activations(store(n_texts=10), 100_000, tmp_path, SETTINGS)
    known = json.loads((tmp_path / PROGRESS).read_text())["tokens"]
    assert len(cache_activations(store(n_texts=10), known, tmp_path, SETTINGS)) == known > 100


def test_text_that_does_not_fill_a_pass_is_refused_with_what_it_takes(store, tmp_path):
    with pytest.raises(
        ValueError, match=r"yields about 0 tokens, but n_tokens=5 are needed: it ends before 30 prompts"
    ):
        cache_activations(store(n_texts=1, prompts=30), 5, tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_fewer_tokens_are_the_first_of_more(store, tmp_path):
    more = cache_activations(store(), 100, tmp_path, SETTINGS)
    assert torch.equal(cache_activations(store(), 60, tmp_path, SETTINGS), more[:60])
    assert torch.equal(cache_activations(store(), 100, tmp_path, SETTINGS), more)


def test_activations_of_other_settings_are_refused(store, tmp_path):
    cache_activations(store(), 100, tmp_path, SETTINGS)
    with pytest.raises(ValueError, match=r"holds activations with model='m', not 'other'; choose another folder"):
        cache_activations(store(), 100, tmp_path, SETTINGS | {"model": "other"})
    with pytest.raises(ValueError, match=r"holds activations with n_tokens=100, not 101"):
        cache_activations(store(), 101, tmp_path, SETTINGS)


def test_what_the_store_knows_is_a_setting_too(store, tmp_path):
    cache_activations(store(), 100, tmp_path, {})
    for name, value, there in (
        ("context_size", 8, 16),
        ("hook_name", "blocks.0.hook_resid_post", SETTINGS["hook"]),
        ("prepend_bos", False, True),
        ("seqpos_slice", (1, None), None),
        ("exclude_special_tokens", torch.tensor([5]), None),
        ("disable_concat_sequences", True, False),
        ("sequence_separator_token", "eos", "bos"),
        ("model_kwargs", {"padding_side": "left"}, None),
    ):
        other = store()
        setattr(other, name, value)
        with pytest.raises(ValueError, match=rf"holds activations with {name}=.*, not .*; choose another") as error:
            cache_activations(other, 100, tmp_path, {})
        assert there is None or repr(there) in str(error.value)


def test_the_same_model_processed_is_another_setting(store, tiny_lm, tmp_path):
    cache_activations(store(), 100, tmp_path, SETTINGS)
    changed = TransformerBridge.boot_transformers(str(tiny_lm), device="cpu")
    changed.enable_compatibility_mode()  # folds layer norms and centres writing weights
    digits = "'[0-9a-f]{16}'"
    with pytest.raises(ValueError, match=rf"holds activations with model_weights={digits}, not {digits}; choose"):
        cache_activations(store(model=changed), 100, tmp_path, SETTINGS)


def test_a_folder_that_does_not_say_its_model_is_refused(store, tmp_path):
    """Folders written by older versions have no model fingerprint."""
    cache_activations(store(), 100, tmp_path, SETTINGS)
    (tmp_path / "settings.json").write_text(json.dumps({**SETTINGS, "n_tokens": 100, "d_in": 128}))
    with pytest.raises(ValueError, match=r"holds activations with model_weights=None, not '.*'; choose another"):
        cache_activations(store(), 100, tmp_path, SETTINGS)


def test_a_model_is_known_by_a_sample_of_its_weights():
    def model(**changes: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        made = torch.nn.Sequential(torch.nn.Linear(512, 256), torch.nn.LayerNorm(256)).to(changes.get("dtype"))
        for name, scale in changes.get("scales", {}).items():
            made.get_parameter(name).data *= scale
        return made

    rows = torch.ones(256, 1)
    rows[7] = 2
    columns = torch.ones(512)
    columns[11] = 2
    variants = [
        model(),
        model(dtype=torch.bfloat16),
        model(scales={"0.bias": -1}),
        model(scales={"0.weight": rows}),
        model(scales={"0.weight": columns}),
        torch.nn.Sequential(model()),
    ]
    assert len({fingerprint_model(variant) for variant in variants}) == len(variants)
    assert fingerprint_model(model()) == fingerprint_model(copy.deepcopy(variants[0]))


@pytest.mark.parametrize(
    ("n_tokens", "fields", "message"),
    [
        (0, {}, "n_tokens=0 must be a whole number of at least 1."),
        (-5, {}, "n_tokens=-5 must be a whole number of at least 1."),
        (1e3, {}, "n_tokens=1000.0 must be a whole number of at least 1."),
        (100, {"d_in": 64}, "d_in=64, but blocks.1.hook_resid_post of the model is 128 wide; change d_in or the hook."),
        (100, {"hook_name": "blocks.9.hook_resid_post"}, "hook_name='blocks.9.hook_resid_post' is not a hook of the"),
        (
            100,
            {"hook_name": "blocks.1.ln1.hook_scale"},
            "d_in=128, but blocks.1.ln1.hook_scale of the model is 1 wide; change d_in or the hook.",
        ),
        (100, {"prompts": 0}, "prompts=0 must be a whole number of at least 1."),
        (100, {"context_size": -1}, "context_size=-1 must be a whole number of at least 1."),
    ],
    ids=str,
)
def test_a_wrong_argument_is_reported_and_the_corrected_call_works(store, tmp_path, n_tokens, fields, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  compared below
        cache_activations(store(**fields), n_tokens, tmp_path, SETTINGS)
    assert str(error.value).startswith(message)
    assert {path.name for path in tmp_path.iterdir()} <= {"lock"}
    assert cache_activations(store(), 100, tmp_path, SETTINGS).any()


@pytest.mark.parametrize("killed_at", ["reserve", "atomic_write"])
def test_an_aborted_pass_does_not_block_the_next(store, tmp_path, monkeypatch, killed_at):
    with monkeypatch.context() as patched:
        patched.setattr(activation_cache, killed_at, mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache_activations(store(), 200, tmp_path, SETTINGS)
    other = SETTINGS | {"model": "other"}
    cached = cache_activations(store(), 100, tmp_path, other)
    assert torch.equal(cached, cache_activations(store(), 100, tmp_path / "undisturbed", other))


def test_data_that_is_gone_is_computed_again(store, tmp_path):
    want = cache_activations(store(), 100, tmp_path, SETTINGS).clone()
    (tmp_path / DATA).unlink()
    assert torch.equal(cache_activations(store(), 100, tmp_path, SETTINGS), want)


def test_the_train_split_of_several_is_read(language_model, tmp_path):
    texts, hook = Dataset.from_dict({"text": ["She had read it, and so she slept. " * 9] * 9}), SETTINGS["hook"]
    splits = DatasetDict({"test": texts.select([0]), "train": texts})
    sizes = {"d_in": 128, "context_size": 16, "prompts": 3}
    cached = cache_activations(text_store(language_model, splits, hook, **sizes), 60, tmp_path, SETTINGS)
    want = text_store(language_model, texts, hook, **sizes).get_filtered_llm_batch()
    assert torch.equal(cached[: len(want)], want[:60].bfloat16())
    with pytest.raises(ValueError, match=r"^dataset has no split 'train', only \['test'\]; pass one of these splits"):
        text_store(language_model, DatasetDict({"test": texts}), hook, **sizes)
    with pytest.raises(ValueError, match=r"^dataset has no rows; use another text\.$"):
        text_store(language_model, Dataset.from_dict({"text": []}), hook, **sizes)


def test_a_disk_that_is_too_small_is_reported_after_one_pass_of_the_model(store, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    of_full_disk, n_passes, get = store(), itertools.count(), ActivationsStore.get_activations
    monkeypatch.setattr(of_full_disk, "get_activations", lambda tokens: (next(n_passes), get(of_full_disk, tokens))[1])
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        NoSpaceError, match=r"2,560.0 MB are needed for the activations, but .* make room or choose another"
    ):
        cache_activations(of_full_disk, 10**7, tmp_path, SETTINGS)
    assert next(n_passes) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


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
    with pytest.raises(ValueError, match="activations has 3 rows, fewer than batch_size=4; cache more"):
        shuffled_batches(torch.zeros(3, 2).bfloat16(), 4, seed=0)
    for batch_size in (0, -2):
        with pytest.raises(ValueError, match=rf"^batch_size={batch_size} must be a whole number of at least 1\.$"):
            shuffled_batches(torch.zeros(3, 2).bfloat16(), batch_size, seed=0)
