"""SAELens' activations stores: what their activations depend on, and readable errors if the text is too short."""

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
"""Approximate number of entries sampled from each parameter for a model's fingerprint: less than twice as many."""
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
"""Fields of a store that its activations depend on, besides the model, its arguments and the text."""


def store_settings(store: ActivationsStore) -> dict[str, Any]:
    """Settings that the store's activations depend on, as far as the store knows them, in JSON types."""
    excluded = store.exclude_special_tokens
    arguments = {name: repr(value) for name, value in store.model_kwargs.items()}
    return {
        "model_weights": fingerprint_model(store.model),
        **{name: getattr(store, name) for name in OF_STORE},
        "hook_names": _hooks(store),
        "exclude_special_tokens": None if excluded is None else sorted(excluded.tolist()),
        **({"model_kwargs": arguments} if arguments else {}),
    }


@torch.no_grad()
def fingerprint_model(model: nn.Module) -> str:
    """16 hexadecimal digits that identify a model on any device, from names, dtypes, shapes and sampled entries."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        # An odd step: one that divides the row length would always hit the same columns.
        step = parameter.numel() // SAMPLED_ENTRIES | 1
        sample = parameter.detach().flatten()[::step].cpu().contiguous()
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def check_count(value: Any, name: str) -> None:
    """Reject anything but a whole number of at least 1.

    Raises:
        ValueError: naming the value.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")


def check_hooks(store: ActivationsStore) -> None:
    """Reject a hook that the model does not have or run, or a wrong width, by running the model on one token.

    Raises:
        ValueError: naming the hook, and its width or the head that it lacks.
    """
    activations = one_token(store.model, dict.fromkeys(_hooks(store), "hook_name"), "the model", store.model_kwargs)
    check_width(activations, store.d_in, store.hook_head_index, "the model")


@contextmanager
def reporting_short_text(text: str, store: ActivationsStore | None = None) -> Iterator[None]:
    """Turns SAELens' bare StopIteration, for a text without a single prompt, into an error that begins with `text`.

    Args:
        text: the text as the user named it, such as "text='folder'".
        store: its store, once there is one; before that, StopIteration can only come from a text without rows.
    """
    try:
        yield
    except StopIteration as error:
        if store is None or store.is_dataset_tokenized:
            raise ValueError(f"{text} has no rows; use another text.") from error
        rows = [len(tokens) for tokens in store._iterate_raw_dataset_tokens()]
        raise ValueError(
            f"{text} gives no prompt of context_size={store.context_size} tokens: it has {sum(rows):,} tokens, "
            f"{max(rows, default=0):,} in its longest row. Use more or longer texts or, where it can be set, a smaller "
            "context_size."
        ) from error


def _hooks(store: ActivationsStore) -> list[str]:
    return list(store._hook_names or [store.hook_name])
