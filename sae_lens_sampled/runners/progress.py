"""A bar for SAELens' training that moves from the first pass of the language model on.

SAELens' own moves every 100 steps, and not while the language model fills the buffer: on a CPU a run looks dead for
minutes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

from sae_lens import ActivationsStore, SAETrainer
from sae_lens.training import activation_scaler, multi_sae_trainer, sae_trainer
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor
from tqdm.auto import tqdm

SECONDS = 1.0
"""Least time between two changes of the text; losses are read from the device for it."""


@contextmanager
def no_bar() -> Iterator[None]:
    """Training runs of SAELens inside it have no bar: another process has one."""
    with ExitStack() as stack:
        for module in (sae_trainer, activation_scaler):
            stack.enter_context(mock.patch.object(module, "tqdm", partial(tqdm, disable=True)))
        yield


@contextmanager
def live_bar() -> Iterator[None]:
    """Every training run of SAELens inside it counts each step, and says what the language model has read."""
    bars: list[tqdm] = []
    n_read, shown_at = 0, 0.0

    def bar(*args: Any, **kwargs: Any) -> tqdm:
        bars.append(tqdm(*args, **kwargs))
        return bars[-1]

    def is_time() -> bool:
        nonlocal shown_at
        if time.monotonic() < shown_at + SECONDS:
            return False
        shown_at = time.monotonic()
        return True

    def reads(get: Callable[..., Any]) -> Callable[..., Any]:
        def counted(store: ActivationsStore, batch_tokens: Tensor) -> Any:
            nonlocal n_read
            activations = get(store, batch_tokens)
            n_read += batch_tokens.numel()
            if bars and is_time():
                bars[-1].set_postfix_str(f"language model: {n_read:,} tokens")
            return activations

        return counted

    def steps(update: Callable[..., None]) -> Callable[..., None]:
        def step(trainer: Any, output: Any, pbar: tqdm, update_interval: int = 100) -> None:  # noqa: ARG001
            if is_time():
                described = SimpleNamespace(set_description=pbar.set_description, update=lambda n_tokens: None)  # noqa: ARG005
                update(trainer, output, described, 1)  # SAELens' text, whatever the step's number
                pbar.set_postfix_str("", refresh=False)
            pbar.update(trainer.n_training_samples - pbar.n)  # a resumed run does not begin at 0

        return step

    with ExitStack() as stack:
        for module in (sae_trainer, multi_sae_trainer):
            stack.enter_context(mock.patch.object(module, "tqdm", bar))
        for trainer in (SAETrainer, MultiSAETrainer):
            stack.enter_context(mock.patch.object(trainer, "_update_pbar", steps(trainer._update_pbar)))
        for name in ("get_activations", "get_multi_hook_activations"):
            stack.enter_context(mock.patch.object(ActivationsStore, name, reads(getattr(ActivationsStore, name))))
        try:
            yield
        finally:
            for opened in bars:  # or one would write its end below what is said of an error
                opened.close()
