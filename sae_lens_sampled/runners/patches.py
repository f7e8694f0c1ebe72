"""Where SAELens 6.54 can be told nothing and must be reached into, each place with its reason. Its files stay as is."""

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
    """The trainer as one of `trainer_class`: SAELens' `run` names its own class in the middle of what it does."""
    trainer.__class__ = trainer_class
    return trainer  # type: ignore[return-value]


def adopt_store(store: ActivationsStore, store_class: type[ActivationsStore]) -> None:
    """Make the store one of `store_class`: SAELens' runner and `from_sae` make theirs by name, and take none."""
    store.__class__ = store_class


def load_position_from(store: ActivationsStore, file_name: str) -> None:
    """SAELens knows one file in a checkpoint for the place in the text; of several processes each has its own."""
    store.load_from_checkpoint = lambda checkpoint_path: store.load(str(Path(checkpoint_path) / file_name))


@contextmanager
def bars_made_by(make: Callable[..., Any], *modules: ModuleType) -> Iterator[None]:
    """SAELens' `modules` show bars of tqdm, and take no word about them."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "tqdm", make))
        yield


@contextmanager
def steps_shown_by(show: Callable[[Callable[..., None], Any, Any, Any], None]) -> Iterator[None]:
    """Trainers move their bar every 100 steps; `show` gets SAELens' own method, trainer, output and bar at each."""

    def patched(original: Callable[..., None]) -> Callable[..., None]:
        return lambda trainer, output, pbar, update_interval=100: show(original, trainer, output, pbar)  # noqa: ARG005

    with ExitStack() as stack:
        for trainer in (SAETrainer, MultiSAETrainer):
            stack.enter_context(mock.patch.object(trainer, "_update_pbar", patched(trainer._update_pbar)))
        yield


@contextmanager
def reads_counted(on_tokens: Callable[[int], None]) -> Iterator[None]:
    """Stores do not say what they read: `on_tokens` gets the number of tokens of every pass of the language model."""

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
