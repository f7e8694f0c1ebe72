"""Activations of a language model on disk: one pass of the model for all SAEs of a hook, mixed over the whole text.

SAELens' own cache keeps prompts and mixes only what is in its buffer, has no bfloat16, and starts again when it was
killed. Here a token is a row of one memory-mapped file, and a batch takes rows from anywhere in it.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import BFloat16, Float
from sae_lens import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor
from tqdm import tqdm

from sae_lens_sampled.files import reserve, write_whole
from sae_lens_sampled.hooks import switch_on

DATA, PROGRESS, SETTINGS, LOCK = "activations.bfloat16", "progress.json", "settings.json", "lock"


def text_store(
    model: Any, dataset: Any, hook_name: str, d_in: int, context_size: int = 128, prompts: int = 32, device: str = "cpu"
) -> ActivationsStore:
    """A store that gives a text's activations in order, without those of special tokens.

    Args:
        model: the language model.
        dataset: Hub name, folder or data set with a split `train`.
        hook_name: where the activations are read.
        d_in: their width.
        context_size: tokens in a prompt, each of which begins with the tokenizer's first token.
        prompts: number of prompts in a pass of the model.
        device: where the activations are.

    Raises:
        ValueError: if the model cannot switch on a hook that must be.
    """
    switch_on(model, [hook_name])
    return ActivationsStore(
        model,
        dataset,
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
def cache_activations(
    store: ActivationsStore, n_tokens: int, folder: Path | str, settings: Mapping[str, Any]
) -> BFloat16[Tensor, "n_tokens d_in"]:
    """The first `n_tokens` rows that `store` gives, in the order of the text, from `folder`, where they are kept.

    What is there already is not computed again; a run that was killed goes on where it was. Of several processes that
    ask at the same time one runs the model, and the others wait.

    Args:
        store: a store for one hook that has given nothing yet, always of the same text in the same order, such as a
            `text_store`.
        n_tokens: number of tokens, special ones not counted if the store leaves them out.
        folder: where to keep them; 2 * d_in bytes for each token.
        settings: what the activations depend on, as JSON has it: model, text, hook and the like.

    Raises:
        ValueError: if `folder` has activations of other settings, or if the text ends before.
        NoSpaceError: if the disk is too small, before the model runs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        _check_settings(folder, {**settings, "n_tokens": n_tokens, "d_in": store.d_in})
        return _complete_activations(store, n_tokens, folder)


def _complete_activations(store: ActivationsStore, n_tokens: int, folder: Path) -> BFloat16[Tensor, "n_tokens d_in"]:
    """What of the file is missing is computed."""
    file, progress = folder / DATA, folder / PROGRESS
    n_entries = n_tokens * store.d_in
    done = json.loads(progress.read_text()) if progress.exists() else {"prompts": 0, "tokens": 0}
    if not progress.exists():
        reserve(file, 2 * n_entries, "the activations")
        write_whole(progress, json.dumps(done))
    activations = torch.from_file(str(file), shared=True, size=n_entries, dtype=torch.bfloat16).view(n_tokens, -1)
    if done["tokens"] == n_tokens:
        return activations
    for _ in range(done["prompts"]):
        store.get_batch_tokens(1, move_to_model_device=False)  # read, not run
    with tqdm(total=n_tokens, initial=done["tokens"], unit="token", desc="Language model") as bar:
        while done["tokens"] < n_tokens:
            try:
                rows = store.get_filtered_llm_batch(raise_on_epoch_end=True)
            except StopIteration:
                raise ValueError(
                    f"the text has some {done['tokens']:,} tokens, but {n_tokens:,} are asked for; take more text or "
                    "fewer tokens."
                ) from None
            rows = rows[: n_tokens - done["tokens"]]
            activations[done["tokens"] : done["tokens"] + len(rows)] = rows
            done = {"prompts": done["prompts"] + store.store_batch_size_prompts, "tokens": done["tokens"] + len(rows)}
            write_whole(progress, json.dumps(done))
            bar.update(len(rows))
    return activations


def shuffled_batches(
    activations: BFloat16[Tensor, "n_tokens d_in"], batch_size: int, seed: int, first: int = 0
) -> Iterator[Float[Tensor, "batch_size d_in"]]:
    """Batches of rows in random order, float32, each row once before any comes again; without end.

    Args:
        activations: what `cache_activations` returns.
        batch_size: rows in a batch; what is left of an epoch is dropped.
        seed: of the order.
        first: number of batches that a resumed run has seen.

    Raises:
        ValueError: if there are fewer rows than a batch has.
    """
    per_epoch = len(activations) // batch_size
    if per_epoch == 0:
        raise ValueError(f"{len(activations)} rows are less than a batch of {batch_size}.")
    generator = torch.Generator().manual_seed(seed)
    skipped_epochs, batch = divmod(first, per_epoch)
    for epoch in count():
        order = torch.randperm(len(activations), generator=generator)
        if epoch < skipped_epochs:
            continue
        for rows in order.split(batch_size)[batch:per_epoch]:
            yield activations[rows].float()
        batch = 0


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    wanted = json.loads(json.dumps(settings))
    file = folder / SETTINGS
    if not file.exists():
        write_whole(file, json.dumps(wanted, indent=2))
        return
    found = json.loads(file.read_text())
    differ = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    if differ:
        name = differ[0]
        raise ValueError(
            f"{str(folder)!r} has activations of {name}={found.get(name)!r}, not {wanted.get(name)!r}; "
            "choose another folder, or delete this one."
        )
