"""Reproducible random draws in SAEBench, which seeds some generators, in some evals, and never restores them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias
from unittest import mock

import numpy as np
import sae_bench.evals.sparse_probing.main as sparse_probing
import sae_bench.sae_bench_utils.activation_collection as activation_collection
import torch

RandomState: TypeAlias = tuple[Any, Any, Any]


@contextmanager
def restored_random_state(seed: int) -> Iterator[None]:
    """Seed all generators, and restore them at the end: absorption ignores its `random_seed`, and core has none."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002  the generator that SAEBench draws from
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def same_draws_for_every_sae(states: dict[tuple[str, str], RandomState]) -> Iterator[None]:
    """Make sparse probing's random draws for an SAE independent of the other SAEs and of their order.

    SAEBench seeds once per SAE. For the first SAE it also draws for the probes on the language model, whose results it
    then caches, so later SAEs get other draws. Here the generators are seeded for every data set, and the probes on an
    SAE always start from the random state after the probes on the model, which is kept in `states`.
    """
    run_dataset, encode = sparse_probing.run_eval_single_dataset, activation_collection.get_sae_meaned_activations
    place, is_first = ("", ""), True

    def dataset(name: str, config: Any, sae: Any, *args: Any) -> Any:
        nonlocal place, is_first
        place, is_first = (name, sae.cfg.hook_name), True
        random.seed(config.random_seed)
        torch.manual_seed(config.random_seed)
        return run_dataset(name, config, sae, *args)

    def meaned(*args: Any) -> Any:
        nonlocal is_first
        if is_first:  # the first of two calls (training texts, test texts), right after the probes on the model
            set_random_state(states.setdefault(place, random_state()))
            is_first = False
        return encode(*args)

    with (
        mock.patch.object(sparse_probing, "run_eval_single_dataset", dataset),
        mock.patch.object(activation_collection, "get_sae_meaned_activations", meaned),
    ):
        yield


def random_state() -> RandomState:
    """State of the generators that SAEBench draws from: Python's, NumPy's and torch's."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def set_random_state(state: RandomState) -> None:
    """Set the three generators to a state from `random_state`."""
    python_state, numpy_state, torch_state = state
    random.setstate(python_state)
    np.random.set_state(numpy_state)  # noqa: NPY002
    torch.set_rng_state(torch_state)
