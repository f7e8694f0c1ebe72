"""Patches of SAELens 6.54 at run time where it has no setting, each with its reason. Its files are not changed."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar
from unittest import mock

from sae_lens import ActivationsStore, SAETrainer
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor

Trainer = TypeVar("Trainer", bound=SAETrainer[Any, Any])


def adopt_trainer(trainer: SAETrainer[Any, Any], trainer_class: type[Trainer]) -> Trainer:
    """Turn the trainer into a `trainer_class`: SAELens' `run` hard-codes its own class."""
    trainer.__class__ = trainer_class
    return trainer  # type: ignore[return-value]


def adopt_store(store: ActivationsStore, store_class: type[ActivationsStore]) -> None:
    """Turn the store into a `store_class`: SAELens' runner hard-codes the class of its store and accepts no other."""
    store.__class__ = store_class


def load_position_from(store: ActivationsStore, file_name: str) -> None:
    """Make `load_from_checkpoint` read `file_name`: SAELens has one file, but each of several processes has its own."""
    store.load_from_checkpoint = lambda checkpoint_path: store.load(str(Path(checkpoint_path) / file_name))


@contextmanager
def bars_made_by(make: Callable[..., Any], *modules: ModuleType) -> Iterator[None]:
    """Replaces the tqdm bars of SAELens' `modules`, which have no setting for them."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "tqdm", make))
        yield


@contextmanager
def steps_shown_by(show: Callable[[Callable[..., None], Any, Any, Any], None]) -> Iterator[None]:
    """Calls `show` at every step in place of SAELens' own method, which moves the bar every 100 steps.

    Its arguments are that method, the trainer, the step's output and the bar.
    """

    def patched(original: Callable[..., None]) -> Callable[..., None]:
        return lambda trainer, output, pbar, update_interval=100: show(original, trainer, output, pbar)  # noqa: ARG005

    with ExitStack() as stack:
        for trainer in (SAETrainer, MultiSAETrainer):
            stack.enter_context(mock.patch.object(trainer, "_update_pbar", patched(trainer._update_pbar)))
        yield


@contextmanager
def reads_counted(on_tokens: Callable[[int], None]) -> Iterator[None]:
    """Calls `on_tokens` with the number of tokens of each pass of the language model, which stores do not report."""

    def patched(original: Callable[..., Any]) -> Callable[..., Any]:
        def read(store: ActivationsStore, batch_tokens: Tensor) -> Any:
            activations = original(store, batch_tokens)
            on_tokens(batch_tokens.numel())
            return activations

        return read

    with ExitStack() as stack:
        for name in ("get_activations", "get_multi_hook_activations"):
            stack.enter_context(mock.patch.object(ActivationsStore, name, patched(getattr(ActivationsStore, name))))
        yield
