"""SAELens' activations stores: what their activations depend on, and sentences where a store cannot give any."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from sae_lens import ActivationsStore
from torch import nn

from sae_lens_sampled.runners.run_checks import check_width, one_token

SAMPLED_ENTRIES = 4096
"""Entries of each parameter, at most about twice as many, that a model's fingerprint is taken from."""
OF_STORE = (
    "hook_name",
    "hook_head_index",
    "context_size",
    "prepend_bos",
    "seqpos_slice",
    "disable_concat_sequences",
    "sequence_separator_token",
    "use_chat_formatting",
    "autocast_lm",
)
"""Fields of a store that its activations depend on, beside model and text."""


def store_settings(store: ActivationsStore) -> dict[str, Any]:
    """What the store itself knows of what its activations depend on, as JSON has it."""
    excluded = store.exclude_special_tokens
    return {
        "model_weights": fingerprint_model(store.model),
        **{name: getattr(store, name) for name in OF_STORE},
        "hook_names": _hooks(store),
        "exclude_special_tokens": None if excluded is None else sorted(excluded.tolist()),
    }


@torch.no_grad()
def fingerprint_model(model: nn.Module) -> str:
    """16 hexadecimal digits that tell models apart, on whatever device: of names, types, shapes and sampled entries."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        # An odd step: one that rows are a multiple of would stay in a column.
        step = parameter.numel() // SAMPLED_ENTRIES | 1
        sample = parameter.detach().flatten()[::step].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_count(value: Any, name: str) -> None:
    """Refuse what is not a whole number above 0.

    Raises:
        ValueError: with the value.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def check_hooks(store: ActivationsStore) -> None:
    """Refuse a hook that the model does not have, and a width that is not its, by running the model on one token.

    Raises:
        ValueError: with the hook, and its width.
    """
    activations = one_token(store.model, dict.fromkeys(_hooks(store), "hook_name"), "the model", store.model_kwargs)
    check_width(activations, store.d_in, store.hook_head_index, "the model")


@contextmanager
def short_text_told(text: str, store: ActivationsStore | None = None) -> Iterator[None]:
    """Turns SAELens' bare StopIteration, for a text without a single prompt, into a sentence that begins with `text`.

    Args:
        text: how the user has named it, such as "text='folder'".
        store: the store of it, once there is one: before, only a text without rows ends.
    """
    try:
        yield
    except StopIteration as error:
        if store is None or store.is_dataset_tokenized:
            raise ValueError(f"{text} has no rows; take another text.") from error
        rows = [len(tokens) for tokens in store._iterate_raw_dataset_tokens()]
        raise ValueError(
            f"{text} gives no prompt of context_size={store.context_size} tokens: it has {sum(rows):,} tokens, "
            f"{max(rows, default=0):,} in its longest row. Take more text or a smaller context_size."
        ) from error


def _hooks(store: ActivationsStore) -> list[str]:
    return list(store._hook_names or [store.hook_name])
