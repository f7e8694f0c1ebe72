"""Activations of a language model on disk: one pass of the model for all SAEs of a hook, shuffled over the whole text.

SAELens' own cache stores prompts, shuffles only within its buffer, has no bfloat16, and starts from scratch when
killed. Here each token is a row of one memory-mapped file, and a batch takes rows from anywhere in it.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, IterableDatasetDict
from filelock import FileLock
from jaxtyping import BFloat16, Float
from sae_lens import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor
from tqdm import tqdm

from sae_lens_sampled.files import atomic_write, reserve
from sae_lens_sampled.runners.hooks import switch_on
from sae_lens_sampled.runners.stores import check_count, check_hooks, reporting_short_text, store_settings
from sae_lens_sampled.signals import interruptible

DATA, PROGRESS, SETTINGS, LOCK = "activations.bfloat16", "progress.json", "settings.json", "lock"


def text_store(
    model: Any, dataset: Any, hook_name: str, d_in: int, context_size: int = 128, prompts: int = 32, device: str = "cpu"
) -> ActivationsStore:
    """A store of a text's activations in the order of the text, for `cache_activations`.

    The model reads special tokens, but their activations are left out.

    Args:
        model: the language model.
        dataset: Hub name, folder or `DatasetDict` with a split `train`, or a dataset.
        hook_name: hook at which activations are read.
        d_in: width of the activations.
        context_size: tokens per prompt; each begins with the tokenizer's BOS token, unless the text is tokenized.
        prompts: number of prompts per pass of the model.
        device: device of the activations.

    Raises:
        ValueError: if a number is not a positive whole number, the text has no rows, no split `train` or no column that
            SAELens reads, or the model cannot switch on the hook.
        OSError: if the data set does not exist.
    """
    for name, value in {"d_in": d_in, "context_size": context_size, "prompts": prompts}.items():
        check_count(value, name)
    switch_on(model, [hook_name])
    text = f"dataset={dataset!r}" if isinstance(dataset, (str, Path)) else "dataset"
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        if "train" not in dataset:
            raise ValueError(f"dataset has no split 'train', only {sorted(dataset)}; pass one of these splits.")
        dataset = dataset["train"]
    with reporting_short_text(text):
        return ActivationsStore(
            model,
            str(dataset) if isinstance(dataset, Path) else dataset,
            streaming=True,
            hook_name=hook_name,
            hook_head_index=None,
            context_size=context_size,
            d_in=d_in,
            n_batches_in_buffer=1,
            total_training_tokens=1,
            store_batch_size_prompts=prompts,
            train_batch_size_tokens=1,
            prepend_bos=True,
            normalize_activations="none",
            device=torch.device(device),
            dtype="float32",
            exclude_special_tokens=torch.tensor(get_special_token_ids(model.tokenizer), device=device),
        )


@torch.no_grad()
@interruptible()
def cache_activations(
    store: ActivationsStore, n_tokens: int, folder: Path | str, settings: Mapping[str, Any]
) -> BFloat16[Tensor, "n_tokens d_in"]:
    """The first `n_tokens` rows of `store`, in the order of the text, cached in `folder`.

    Existing rows are not recomputed; a killed run resumes where it stopped. If several processes ask at the same time,
    one runs the model while the others wait.

    Args:
        store: an unused store for one hook that always reads the same text in the same order, such as a `text_store`.
        n_tokens: number of tokens, not counting special ones if the store leaves them out.
        folder: folder of the cache, which takes 2 * d_in bytes per token.
        settings: what the activations depend on but is not taken from `store`: the text and, where it varies, the
            tokenizer; in JSON types. The model's weights and arguments, the hook and how prompts are made are taken
            from `store`.

    Raises:
        ValueError: if `n_tokens` is not a positive whole number, the hook is missing, does not run or has another
            width, `folder` holds activations with other settings, or the text is too short.
        NoSpaceError: if the disk has too little space; that for all activations is reserved after the first pass of the
            model over the text.
    """
    check_count(n_tokens, "n_tokens")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = dict(settings) | store_settings(store) | {"n_tokens": n_tokens, "d_in": store.d_in}
    with FileLock(folder / LOCK):
        check_hooks(store)  # runs the model, which threads may share
        return _complete_activations(store, n_tokens, folder, json.loads(json.dumps(wanted)))


def _complete_activations(
    store: ActivationsStore, n_tokens: int, folder: Path, settings: Mapping[str, Any]
) -> BFloat16[Tensor, "n_tokens d_in"]:
    """Compute the rows missing from the file. Nothing is written before the first activations exist."""
    file, n_entries = folder / DATA, n_tokens * store.d_in
    done = _done(folder, settings)
    is_there = done["tokens"] > 0 and file.exists() and file.stat().st_size >= 2 * n_entries
    activations = _mapped(file, n_entries, n_tokens) if is_there else None
    if activations is None:
        (folder / PROGRESS).unlink(missing_ok=True)
        done = {"prompts": 0, "tokens": 0}
    if done["tokens"] < n_tokens:
        try:
            for _ in range(done["prompts"]):  # read without running the model
                store.get_batch_tokens(1, raise_at_epoch_end=True, move_to_model_device=False)
        except StopIteration as error:
            raise ValueError(
                f"{str(folder)!r} holds activations of {done['prompts']:,} prompts, before which the text now ends, so "
                "it has changed; choose another folder or delete this one."
            ) from error
    with tqdm(total=n_tokens, initial=min(done["tokens"], n_tokens), unit="token", desc="Language model") as bar:
        while done["tokens"] < n_tokens:
            with _reporting_early_end(store, done, n_tokens):
                rows = store.get_filtered_llm_batch(raise_on_epoch_end=True)[: n_tokens - done["tokens"]]
            if activations is None:
                reserve(file, 2 * n_entries, "the activations")
                activations = _mapped(file, n_entries, n_tokens)
                atomic_write(folder / SETTINGS, json.dumps(settings, indent=2))
            activations[done["tokens"] : done["tokens"] + len(rows)] = rows
            _flush(file)  # before the progress says that they are there
            done = {"prompts": done["prompts"] + store.store_batch_size_prompts, "tokens": done["tokens"] + len(rows)}
            atomic_write(folder / PROGRESS, json.dumps(done))
            bar.update(len(rows))
    assert activations is not None  # the loop ends at n_tokens, which is positive
    return activations


def _flush(file: Path) -> None:
    """Write the rows of the mapped file to the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _done(folder: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of prompts and tokens that the file holds; settings are compared only if it holds any tokens.

    Raises:
        ValueError: if its tokens were cached with other settings.
    """
    progress = folder / PROGRESS
    done = json.loads(progress.read_text()) if progress.exists() else {"prompts": 0, "tokens": 0}
    if done["tokens"] > 0:
        file = folder / SETTINGS
        found = json.loads(file.read_text()) if file.exists() else {}
        if done["tokens"] >= settings["n_tokens"]:  # a longer cache begins with the wanted rows
            settings = {**settings, "n_tokens": found.get("n_tokens")}
        _check_settings(folder, found, settings, done["tokens"])
    return done


def _mapped(file: Path, n_entries: int, n_tokens: int) -> BFloat16[Tensor, "n_tokens d_in"]:
    return torch.from_file(str(file), shared=True, size=n_entries, dtype=torch.bfloat16).view(n_tokens, -1)


@contextmanager
def _reporting_early_end(store: ActivationsStore, done: Mapping[str, int], n_tokens: int) -> Iterator[None]:
    """Turns the end of the text into a readable error. Prompts that do not fill a last pass are dropped."""
    try:
        yield
    except StopIteration as error:
        n_prompts = store.store_batch_size_prompts
        raise ValueError(
            f"the text yields about {done['tokens']:,} tokens, but n_tokens={n_tokens:,} are needed: it ends before "
            f"{done['prompts'] + n_prompts:,} prompts of context_size={store.context_size} tokens, and the model reads "
            f"{n_prompts} at a time. Use more text, a smaller n_tokens, or fewer prompts at a time."
        ) from error


def shuffled_batches(
    activations: BFloat16[Tensor, "n_tokens d_in"], batch_size: int, seed: int, first: int = 0
) -> Iterator[Float[Tensor, "batch_size d_in"]]:
    """Endless float32 batches of rows in random order; no row is repeated within an epoch.

    Args:
        activations: the rows that `cache_activations` returns.
        batch_size: rows per batch; the rest of an epoch is dropped.
        seed: seed of the order.
        first: number of batches that a resumed run has already seen.

    Raises:
        ValueError: if `batch_size` is not a positive whole number or exceeds the number of rows.
    """
    check_count(batch_size, "batch_size")
    if len(activations) < batch_size:
        raise ValueError(
            f"activations has {len(activations)} rows, fewer than batch_size={batch_size}; cache more tokens or use "
            "smaller batches."
        )
    return _shuffled_batches(activations, batch_size, seed, first)


def _shuffled_batches(
    activations: BFloat16[Tensor, "n_tokens d_in"], batch_size: int, seed: int, first: int
) -> Iterator[Float[Tensor, "batch_size d_in"]]:
    per_epoch = len(activations) // batch_size
    generator = torch.Generator().manual_seed(seed)
    skipped_epochs, batch = divmod(first, per_epoch)
    for epoch in count():
        order = torch.randperm(len(activations), generator=generator)
        if epoch < skipped_epochs:
            continue
        for rows in order.split(batch_size)[batch:per_epoch]:
            yield activations[rows].float()
        batch = 0


def _check_settings(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], n_done: int) -> None:
    differ = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if differ == ["n_tokens"] and n_done < found["n_tokens"]:
        raise ValueError(
            f"{str(folder)!r} holds an unfinished cache, {n_done} of n_tokens={found['n_tokens']}, so n_tokens cannot "
            f"be {wanted['n_tokens']}; finish it with its own n_tokens, or choose another folder."
        )
    if differ:
        name = differ[0]
        raise ValueError(
            f"{str(folder)!r} holds activations with {name}={found.get(name)!r}, not {wanted.get(name)!r}; "
            "choose another folder or delete this one."
        )
