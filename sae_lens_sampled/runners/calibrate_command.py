"""`sae-lens-sampled calibrate`: runs the language model with the settings of the training run, and sets thresholds."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens import ActivationsStore
from sae_lens.saes.sae import TrainingSAE
from sae_lens.util import str_to_dtype

from sae_lens_sampled.files import atomic_path, check_new, reserve
from sae_lens_sampled.metrics import differs
from sae_lens_sampled.runners.hooks import switch_on
from sae_lens_sampled.runners.language_model import load_model_of_run
from sae_lens_sampled.runners.stores import reporting_short_text
from sae_lens_sampled.runners.training_data import (
    TokenSettings,
    expected_first_token_share,
    first_token_share,
    store_of_run,
    token_settings,
)
from sae_lens_sampled.runners.transcoder import hooks_of, read_both, unnamed_hook
from sae_lens_sampled.sae.calibration import MIN_TOKENS, CalibrationReport, calibrate_thresholds, check_calibration
from sae_lens_sampled.sae.inference import load_checkpoint
from sae_lens_sampled.sae.training import SampledTopKTrainingSAE
from sae_lens_sampled.sae.transcoder import SampledTopKTranscoder


def calibrate(
    checkpoint: Path,
    dataset: str,
    out: Path,
    *,
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    mode: str = "per_latent",
    target_l0: float | None = None,
    max_tokens: int = 1_000_000,
    batch_size: int = 4096,
    device: str = "cpu",
) -> list[str]:
    """Calibrate the SAE of a checkpoint and save it to `out`; returns the lines of the report.

    Arguments, model, text and disk space are checked first. `model` and `model_kwargs` default to those of the run.
    If the run's settings are known, warns when the share of first tokens differs from the one that they imply.

    Raises:
        ValueError: if the checkpoint, an argument, the model or the text is invalid.
        OSError: if the data set does not exist.
        NoSpaceError: if the disk has no room for the calibrated SAE.
    """
    check_new(out, "out")
    if batch_size > max_tokens:
        raise ValueError(
            f"batch_size={batch_size} is larger than max_tokens={max_tokens}: even one batch would exceed it; "
            "lower batch_size or raise max_tokens."
        )
    if -(-max_tokens // batch_size) * batch_size < MIN_TOKENS:  # whole batches are read
        raise ValueError(
            f"max_tokens={max_tokens} must be at least {MIN_TOKENS} to calibrate; 100,000 or more are recommended."
        )
    sae = load_checkpoint(checkpoint, device=device)
    if not isinstance(sae, SampledTopKTrainingSAE):
        raise ValueError(  # noqa: TRY004  a wrong folder, not a wrong type
            f"checkpoint={str(checkpoint)!r} holds a {sae.cfg.architecture()} SAE, but only sampled_topk SAEs and "
            "transcoders can be calibrated here. For a TopK, BatchTopK or Matryoshka checkpoint, call in Python: "
            "calibrate_thresholds(from_batchtopk(checkpoint, cfg), activations)."
        )
    check_calibration(sae, mode, target_l0, max_tokens)
    if torch.device(device).type != "cuda":  # which has a memory of its own
        entry = str_to_dtype(sae.cfg.dtype).itemsize
        _check_memory(max_tokens, sum(sae.cfg.batch_parts.values()), entry)
    _hooks(sae)
    settings = token_settings(sae.cfg.metadata, checkpoint)
    with atomic_path(out) as unfinished:
        held = unfinished.with_name("held")
        reserve(held, sum(p.numel() * p.element_size() for p in sae.parameters()) + 2**20, "the calibrated SAE")
        store = activations_of_run(sae, settings, dataset, batch_size, device, model, model_kwargs)
        tokenizer: Any = store.model.tokenizer
        with reporting_short_text(_named(dataset), store):
            share = first_token_share(store)
        expected = expected_first_token_share(settings, tokenizer.bos_token_id)
        exported, report = calibrate_thresholds(sae, store, mode=mode, target_l0=target_l0, max_tokens=max_tokens)
        held.unlink()
        exported.save_model(unfinished)
    if expected is not None and differs(share, expected):
        warnings.warn(
            f"{share:.1%} of the calibration tokens are the first of their prompt, but {expected:.1%} of the training "
            "tokens, by the settings of the run: the thresholds fit the calibration tokens, not those of training.",
            stacklevel=2,
        )
    return _lines(report, settings, share, expected)


def activations_of_run(
    sae: TrainingSAE[Any],
    settings: TokenSettings,
    dataset: Any,
    batch_size: int,
    device: str = "cpu",
    model: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> ActivationsStore:
    """Endless batches, shape (batch_size, width), of activations like those that `sae` was trained on, from `dataset`.

    The width is d_in; for a transcoder, d_in + d_out. `model` and `model_kwargs` default to those of the run.

    Raises:
        ValueError: if the metadata names no hook or no model is named, the model cannot be loaded or cannot switch a
            hook on, or the text has no rows or no column that SAELens reads.
        OSError: if the data set does not exist.
    """
    hooks = _hooks(sae)
    language_model = load_model_of_run(sae.cfg.metadata, hooks, device, model, model_kwargs)
    switch_on(language_model, hooks)
    with reporting_short_text(_named(dataset)):
        store = store_of_run(language_model, sae, settings, dataset, batch_size, device)
    if isinstance(sae, SampledTopKTranscoder):
        read_both(store, hooks, sae.cfg.batch_parts)
    return store


def _named(dataset: Any) -> str:
    return f"dataset={dataset!r}" if isinstance(dataset, str) else "dataset"


def _hooks(sae: TrainingSAE[Any]) -> list[str]:
    """Hooks that `sae` was trained on, from its metadata: one, or a transcoder's input and output hooks."""
    if isinstance(sae, SampledTopKTranscoder):
        return hooks_of(sae)
    if sae.cfg.metadata.hook_name is None:
        raise ValueError(unnamed_hook(sae, "hook_name"))
    return [sae.cfg.metadata.hook_name]


def _check_memory(max_tokens: int, width: int, itemsize: int) -> None:
    """Reject more tokens than fit in memory; the length of the text is no limit, because it is repeated."""
    per_token, memory = 2 * itemsize * width, _memory()  # the batches, and all of them in one tensor
    needed = per_token * max_tokens
    if memory is not None and needed > memory:
        raise ValueError(
            f"max_tokens={max_tokens} needs {needed / 1e9:,.0f} GB ({width} numbers per token), but this machine has "
            f"{memory / 1e9:,.0f} GB of memory; lower max_tokens, for example to {memory // (2 * per_token)}."
        )


def _memory() -> int | None:
    """Bytes of main memory; None if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def _lines(report: CalibrationReport, settings: TokenSettings, share: float, expected: float | None) -> list[str]:
    measured = dataclasses.asdict(report)
    mean_norm, in_training = measured.pop("mean_norm"), measured.pop("mean_norm_in_training")
    rows = {name: f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" for name, value in measured.items()}
    known = "unknown" if in_training is None else f"{in_training:,.4g}"
    rows["mean_norm"] = f"{mean_norm:,.4g} (in training {known})"
    of_run = "unknown" if expected is None else f"{expected:.2%}"
    rows["first_tokens"] = f"{share:.2%} (expected by the training settings: {of_run})"
    rows["tokens"] = settings.described()
    return [f"{name:16} {value}" for name, value in rows.items()]
