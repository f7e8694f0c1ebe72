"""A progress bar for SAELens' training that moves from the first pass of the language model on.

SAELens' own moves every 100 steps, and not while the language model fills the buffer, so on a CPU a run looks dead for
minutes.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

from sae_lens.training import activation_scaler, multi_sae_trainer, sae_trainer
from tqdm.auto import tqdm

from sae_lens_sampled.runners.patches import bars_made_by, reads_counted, steps_shown_by

SECONDS = 1.0
"""Minimum seconds between two updates of the text; one after a training step reads losses from the device."""


@contextmanager
def no_bar() -> Iterator[None]:
    """Hides the progress bars of SAELens' training run: the first process shows them."""
    with bars_made_by(partial(tqdm, disable=True), sae_trainer, activation_scaler):
        yield


@contextmanager
def live_bar() -> Iterator[None]:
    """Makes the bars of SAELens' training runs count each step and show what the language model has read."""
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

    def read(n_tokens: int) -> None:
        nonlocal n_read
        n_read += n_tokens
        if bars and is_time():
            bars[-1].set_postfix_str(f"language model: {n_read:,} tokens")

    def step(update: Callable[..., None], trainer: Any, output: Any, pbar: tqdm) -> None:
        if is_time():
            described = SimpleNamespace(set_description=pbar.set_description, update=lambda n_tokens: None)  # noqa: ARG005
            update(trainer, output, described, 1)  # SAELens' text, at any step
            pbar.set_postfix_str("", refresh=False)
        pbar.update(trainer.n_training_samples - pbar.n)  # a resumed run does not start at 0

    with bars_made_by(bar, sae_trainer, multi_sae_trainer), steps_shown_by(step), reads_counted(read):
        try:
            yield
        finally:
            for opened in bars:  # an open bar would print its last line below an error message
                opened.close()
