"""Workarounds for defects of SAEBench 0.6 and its libraries: context managers whose docstrings name the defects.

The installed packages are not modified.
"""

import functools
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets.config
import huggingface_hub.constants
import jaxtyping
import numpy as np
import sae_bench.evals.absorption.common as absorption_common
import sae_bench.evals.absorption.feature_absorption as feature_absorption
import sae_bench.evals.absorption.main as absorption
import sae_bench.evals.absorption.probing as absorption_probing
import sae_bench.evals.core.main as core
import sae_bench.sae_bench_utils.dataset_info as dataset_info
import sae_bench.sae_bench_utils.dataset_utils as dataset_utils
import torch
from threadpoolctl import threadpool_limits
from transformer_lens import HookedTransformer

from sae_lens_sampled.files import reserve
from sae_lens_sampled.saebench.models import EvalModel
from sae_lens_sampled.saebench.probing_data import ProbingDataset
from sae_lens_sampled.saebench.random_draws import restored_random_state


@contextmanager
def for_every_eval(model: EvalModel, work_folder: Path, seed: int, log: Path) -> Iterator[None]:
    """Apply the patches that every eval needs; SAEBench's output goes to `log`, its files to `work_folder`."""
    with ExitStack() as stack:
        for patch in (
            quiet(log),
            model_in_memory(model.hooked),
            no_shape_checks(),
            restored_random_state(seed),
            # Probes are so small that BLAS threads slow them down: sevenfold on a busy machine.
            threadpool_limits(1, user_api="blas"),
            working_directory(work_folder),
            # Several evals enable or disable gradients and do not restore the setting.
            torch.set_grad_enabled(torch.is_grad_enabled()),
        ):
            stack.enter_context(patch)
        yield


@contextmanager
def cache_only() -> Iterator[None]:
    """Read the Hub's cache without contacting the Hub, where each request would be retried for half a minute."""
    with (
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
    ):
        yield


def model_in_memory(hooked: Any) -> AbstractContextManager[Any]:
    """Give every eval the loaded model: SAEBench would load it again for each, and only by an official name."""

    def ready(*_args: Any, dtype: torch.dtype | None = None, **_kwargs: Any) -> Any:
        return hooked if dtype is None else hooked.to(dtype)

    return mock.patch.object(HookedTransformer, "from_pretrained_no_processing", staticmethod(ready))


def tokens_counted(model: Any, on_tokens: Callable[[int], None]) -> AbstractContextManager[Any]:
    """Call `on_tokens` with the number of tokens in every forward pass, even one that runs only some of the blocks."""
    forward = model.forward  # a module's forward hook would miss `run_with_hooks`, which calls this directly

    def counted(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        output = result[0] if isinstance(result, tuple) else result
        if isinstance(output, torch.Tensor) and output.ndim > 1:
            on_tokens(output.shape[0] * output.shape[1])
        return result

    return mock.patch.object(model, "forward", counted)


@contextmanager
def no_shape_checks() -> Iterator[None]:
    """Disable jaxtyping: beartype 0.18 and later reject two uses of one dimension name in sparse probing."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@contextmanager
def working_directory(folder: Path) -> Iterator[None]:
    """Change to `folder`: absorption writes `./artifacts/absorption` into the current directory."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Redirect SAEBench's output and its many progress bars to a log file."""
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def absorption_folders(probes: Path, work: Path) -> AbstractContextManager[Any]:
    """Keep absorption's files in the folders `probes` and `work`.

    SAEBench would keep probes in site-packages and reuse them for any model with the same last part of its name.
    """
    k_sparse, features = work / "k_sparse_probing", work / "feature_absorption"
    return mock.patch.multiple(
        absorption,
        run_k_sparse_probing_experiment=functools.partial(
            absorption.run_k_sparse_probing_experiment, experiment_dir=k_sparse, probes_dir=probes
        ),
        run_feature_absortion_experiment=functools.partial(
            absorption.run_feature_absortion_experiment,
            experiment_dir=features,
            sparse_probing_experiment_dir=k_sparse,
            probes_dir=probes,
        ),
    )


def reserved_memory_maps() -> AbstractContextManager[Any]:
    """Allocate memory-mapped files in full: absorption's are sparse, so a full disk would kill the process silently."""

    def memmap(filename: str, dtype: str, mode: str, shape: tuple[int, ...]) -> np.memmap:  # noqa: ARG001
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        reserve(Path(filename), n_bytes, "the activations for absorption's probes")
        return np.memmap(filename, dtype, mode="r+", shape=shape)

    return mock.patch.object(absorption_probing, "np", SimpleNamespace(**{**vars(np), "memmap": memmap}))


def short_passes(
    model: Any, position: int, memory: dict[tuple[str, ...], torch.Tensor] | None = None
) -> AbstractContextManager[Any]:
    """Run only the blocks that are needed and, with `memory`, each batch of prompts once; results are bit-identical.

    SAEBench's absorption runs every block and the unembedding to read one block's output at one token of each prompt,
    and repeats that for every SAE.

    Args:
        model: a HookedTransformer.
        position: index of the token that is read in each prompt.
        memory: cache of activations by hook and prompts of a batch, filled here; None for no cache.
    """
    run_with_cache = model.run_with_cache

    def short(prompts: Sequence[str], names_filter: list[str]) -> tuple[None, dict[str, torch.Tensor]]:
        [hook_name] = names_filter
        key = (hook_name, *prompts)
        if memory is not None and key in memory:
            n_tokens = position + 1 if position >= 0 else -position
            return None, {hook_name: memory[key][:, None].expand(-1, n_tokens, -1)}  # only this token is read
        layer = int(hook_name.split(".")[1])
        _, cache = run_with_cache(prompts, names_filter=names_filter, stop_at_layer=layer + 1)
        if memory is not None:
            memory[key] = cache[hook_name][:, position].clone()
        return None, cache

    return mock.patch.object(model, "run_with_cache", short)


@contextmanager
def ordered_vocabulary() -> Iterator[None]:
    """Sort the vocabulary: fast tokenizers order it differently in each process, so absorption is not reproducible."""
    original = absorption_common.get_alpha_tokens

    def ordered(*args: Any, **kwargs: Any) -> list[str]:
        return sorted(original(*args, **kwargs))

    with (
        mock.patch.object(absorption_common, "get_alpha_tokens", ordered),
        mock.patch.object(feature_absorption, "get_alpha_tokens", ordered),
    ):
        yield


@contextmanager
def core_errors_raised(text: str) -> Iterator[None]:
    """On exit, raise the first error that core logged: core itself logs the failure of an SAE and continues.

    Raises:
        ValueError: beginning with `text`, if that gives no prompt.
    """
    errors: list[BaseException] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = sys.exc_info()[1]  # core logs from inside its `except`
            errors.append(error if error is not None else RuntimeError(record.getMessage()))

    handler = Collect(level=logging.ERROR)
    core.logger.addHandler(handler)
    try:
        yield
    finally:
        core.logger.removeHandler(handler)
    if errors and isinstance(errors[0], StopIteration):  # raised by SAELens' store if the text gives no prompt
        raise ValueError(
            f"{text} has no rows or gives no prompt; use more text or a smaller context_size."
        ) from errors[0]
    if errors:
        raise errors[0]


@contextmanager
def core_inputs(model: Any, from_sae: Callable[..., Any], losses: Sequence[Any]) -> Iterator[None]:
    """Replace core's model, activation store and losses: core would run the model over its text again for every SAE.

    Args:
        model: stand-in for the model.
        from_sae: stand-in for `ActivationsStore.from_sae`.
        losses: losses of each reconstruction batch, in order, as `get_recons_loss` returns them.
    """
    replaced = {
        "ActivationsStore": SimpleNamespace(from_sae=from_sae),
        "get_recons_loss": mock.Mock(side_effect=losses),
        "gc": mock.Mock(),  # core collects garbage for a quarter of a second after every SAE, but the model stays
    }
    with model_in_memory(model), mock.patch.multiple(core, **replaced), core_errors_raised("the recorded text"):
        yield


def two_widths() -> AbstractContextManager[Any]:
    """Set encoder-decoder cosines to 0 for a transcoder whose input and output differ in width: core would fail."""
    original = core.get_featurewise_weight_based_metrics

    def metrics(sae: Any) -> dict[str, Any]:
        if len(sae.W_enc) == sae.W_dec.shape[1]:
            return original(sae)
        one_width: list[Any] = [
            SimpleNamespace(cfg=sae.cfg, b_enc=sae.b_enc, W_enc=W, W_dec=W.T) for W in (sae.W_enc, sae.W_dec.T)
        ]
        encoder, decoder = map(original, one_width)
        none = {"encoder_decoder_cosine_sim": [0.0] * sae.cfg.d_sae}
        return encoder | none | {"max_decoder_cosine_sim": decoder["max_decoder_cosine_sim"]}

    return mock.patch.object(core, "get_featurewise_weight_based_metrics", metrics)


@contextmanager
def own_probing_datasets(own: list[ProbingDataset], sizes: tuple[int, int]) -> Iterator[None]:
    """Add the user's data sets `own`, split into `sizes`: SAEBench can read only its eight, which it knows by name."""
    by_name = {dataset.name: dataset for dataset in own}
    original = dataset_utils.get_multi_label_train_test_data

    def get(name: str, train_size: int, test_size: int, seed: int) -> Any:
        if name in by_name:
            return by_name[name].split(*sizes, seed)
        return original(name, train_size, test_size, seed)

    classes = {dataset.name: dataset.classes for dataset in own}
    with (
        mock.patch.object(dataset_utils, "get_multi_label_train_test_data", get),
        mock.patch.dict(dataset_info.chosen_classes_per_dataset, classes),
    ):
        yield
