"""Validation of a run before it trains: of its configuration, before anything is loaded, and of the model's hooks."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig
from torch import Tensor
from transformer_lens.HookedTransformer import HookedRootModule  # type: ignore[attr-defined]  # where SAELens has it

from sae_lens_sampled.folders import read_runner_config
from sae_lens_sampled.runners.hooks import one_pass
from sae_lens_sampled.runners.language_model import defining_kwargs
from sae_lens_sampled.sae.checks import check_equal_fields

ACTIVATION_FIELDS = ("hook_name", "hook_head_index", "model_class_name", "model_from_pretrained_kwargs")
"""Fields of a runner's config that choose the hook and how the model is loaded, but not its name: a folder may move."""
COUNTS = (
    "training_tokens",
    "train_batch_size_tokens",
    "context_size",
    "store_batch_size_prompts",
    "n_batches_in_buffer",
    "n_batches_for_norm_estimate",
    "feature_sampling_window",
)
"""Fields of a run's configuration that must be at least 1."""


def check_run(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Reject numbers in a run's configuration that SAELens accepts but cannot train with, or rejects only much later.

    Raises:
        ValueError: naming the field and its value.
    """
    for name in COUNTS:
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)} must be at least 1.")
    for name in ("n_checkpoints", "dead_feature_window", "lr_warm_up_steps", "lr_decay_steps"):
        if getattr(cfg, name) < 0:
            raise ValueError(f"{name}={getattr(cfg, name)} must not be negative.")
    if not 0 <= cfg.lr < math.inf:
        raise ValueError(f"lr={cfg.lr} must be finite and not negative.")
    buffer = cfg.n_batches_in_buffer * len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    if buffer < cfg.train_batch_size_tokens:
        raise ValueError(
            f"n_batches_in_buffer={cfg.n_batches_in_buffer} prompts hold {buffer} tokens, fewer than one batch of "
            f"train_batch_size_tokens={cfg.train_batch_size_tokens}; for a buffer that mixes two batches, set it to "
            f"{math.ceil(2 * cfg.train_batch_size_tokens * cfg.n_batches_in_buffer / max(buffer, 1))}."
        )


def check_hook(model: HookedRootModule, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Reject a hook that the model does not have or that is not `d_in` wide, by running the model on one token.

    Raises:
        ValueError: naming the hook and its width, or an invalid `hook_head_index`.
    """
    activations = one_token(model, {cfg.hook_name: "hook_name"}, cfg.model_name, cfg.model_kwargs)
    check_width(activations, cfg.sae.d_in, cfg.hook_head_index, cfg.model_name)


def one_token(
    model: HookedRootModule, hooks: Mapping[str, str], model_name: str, model_kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Activations of one token at hooks, in the order in which these run; `hooks` maps each to the field that names it.

    Raises:
        ValueError: if the model has no such hook or does not run it, or the hook yields no tensor.
    """
    for hook_name, field in hooks.items():
        if hook_name not in model.hook_dict:
            raise ValueError(f"{field}={hook_name!r} is not a hook of {model_name}; model.hook_dict lists them.")
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    activations = one_pass(model, token, hooks, **model_kwargs)
    for hook_name, field in hooks.items():
        if hook_name not in activations:
            raise ValueError(
                f"{field}={hook_name!r} is a hook of {model_name} that does not fire or yields no tensor; use another."
            )
    return activations


def check_width(activations: Mapping[str, Tensor], d_in: int, head: int | None, model_name: str) -> None:
    """Reject hooks whose total width is not `d_in`, or that have no such head, given the result of `one_token`.

    Raises:
        ValueError: naming the hooks and their width, or the head.
    """
    width = 0
    for hook_name, of_hook in activations.items():
        acts = of_hook[0, 0]
        if head is not None and (acts.ndim < 2 or head >= len(acts)):
            raise ValueError(
                f"hook_head_index={head} is out of range: {hook_name} has activations of shape {tuple(acts.shape)} per "
                "token. None reads all heads."
            )
        width += acts.numel() if head is None else acts[head].numel()
    if width != d_in:
        raise ValueError(
            f"d_in={d_in}, but {' and '.join(activations)} of {model_name} is {width} wide; change d_in or the hook."
        )


def check_same_activations(folder: Path, cfg: LanguageModelSAERunnerConfig[Any], own_model: bool) -> None:
    """Reject a checkpoint of a run on other activations; a model passed by the user (`own_model`) is not compared.

    Raises:
        ValueError: naming the field, both values and the way out.
    """
    names = [name for name in ACTIVATION_FIELDS if not (own_model and name.startswith("model_"))]
    check_equal_fields(folder, names, _with_meaning(read_runner_config(folder)), _with_meaning(cfg.to_dict()))


def _with_meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON represents it, with only those `from_pretrained` arguments that change the model."""
    known = json.loads(json.dumps(dict(config), default=str))
    if isinstance(known.get("model_from_pretrained_kwargs"), dict):
        known["model_from_pretrained_kwargs"] = defining_kwargs(known["model_from_pretrained_kwargs"])
    return known
