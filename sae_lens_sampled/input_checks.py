"""What comes from outside, looked at before anything is computed from it; errors say what is at fault, and where."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput
from torch import Tensor
from transformer_lens.HookedTransformer import HookedRootModule  # type: ignore[attr-defined]  # where SAELens has it

from sae_lens_sampled.hooks import one_pass
from sae_lens_sampled.ranks import ALONE, Ranks

LOSS_CHECK_STEPS = 100
"""Steps between two looks at the loss, where nothing else makes the host wait for it."""


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
    """Refuse numbers of a run's configuration that SAELens takes and cannot train with, or only says so much later.

    Raises:
        ValueError: with the field and its value.
    """
    for name in COUNTS:
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name}={getattr(cfg, name)} must be above 0.")
    for name in ("n_checkpoints", "dead_feature_window", "lr_warm_up_steps", "lr_decay_steps"):
        if getattr(cfg, name) < 0:
            raise ValueError(f"{name}={getattr(cfg, name)} must not be negative.")
    if not 0 <= cfg.lr < math.inf:
        raise ValueError(f"lr={cfg.lr} must be a finite number, and not negative.")
    buffer = cfg.n_batches_in_buffer * len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    if buffer < cfg.train_batch_size_tokens:
        raise ValueError(
            f"n_batches_in_buffer={cfg.n_batches_in_buffer} prompts are {buffer} tokens, fewer than the "
            f"train_batch_size_tokens={cfg.train_batch_size_tokens} of a batch; "
            f"{math.ceil(2 * cfg.train_batch_size_tokens * cfg.n_batches_in_buffer / max(buffer, 1))} mix two batches."
        )


def check_shape(sae: TrainingSAE, x: Tensor) -> None:
    """Refuse activations of another width, and an empty batch.

    Raises:
        ValueError: with the shape.
    """
    if not sae.hook_z_reshaping_mode:
        check_width(x, {"d_in": sae.cfg.d_in})
    if x.numel() == 0:
        raise ValueError(f"got an empty batch, of shape {tuple(x.shape)}; there is nothing to select from.")


def check_width(x: Tensor, parts: Mapping[str, int]) -> None:
    """Refuse activations that are not as wide as their parts together, which have their fields' names in the message.

    Raises:
        ValueError: with the shape.
    """
    width = sum(parts.values())
    if x.shape[-1:] != (width,):
        how = "" if len(parts) == 1 else ": outputs stand behind the inputs, as TranscoderRunner yields them"
        raise ValueError(f"activations of shape {tuple(x.shape)} do not end in {' + '.join(parts)}={width}{how}.")


def check_finite(step_input: TrainStepInput, ranks: Ranks = ALONE) -> int:
    """Refuse rows that are not finite; the number of dead latents, read from the device together with theirs.

    Raises:
        ValueError: with the number of rows and the step; on all ranks, if the rows of any are at fault, or if they have
            different numbers of them.
    """
    bad_rows = ~step_input.sae_in.isfinite().all(dim=-1)
    mask, n_rows = step_input.dead_neuron_mask, bad_rows.numel()
    dead = torch.zeros((), dtype=torch.int64, device=bad_rows.device) if mask is None else mask.sum()
    # The only wait for a GPU in a step.
    n_bad, n_dead, *sizes = torch.stack([ranks.sum(bad_rows.sum()), dead, *_sizes(n_rows, dead.device, ranks)]).tolist()
    if sizes and sizes[0] != -sizes[1]:
        raise ValueError(
            f"the ranks have between {-sizes[1]} and {sizes[0]} tokens at training step {step_input.n_training_steps}, "
            "but each must have as many as the others."
        )
    if n_bad:
        raise ValueError(
            f"{n_bad} of {n_rows * ranks.count} rows of sae_in are not finite at training step "
            f"{step_input.n_training_steps}; training stopped before any weight was changed. Look for overflow in "
            "the language model (float16?) or exclude the tokens at fault."
        )
    return n_dead


def check_groups(n_tokens: int, group_size: int | None, n_ranks: int) -> None:
    """Refuse groups of tokens that two processes would have to share.

    Raises:
        ValueError: with both numbers.
    """
    if n_ranks > 1 and group_size is not None and n_tokens % group_size:
        raise ValueError(
            f"a rank has {n_tokens} tokens of a batch, which is no multiple of pool_group_size={group_size}: a group "
            "would lie on two ranks."
        )


def _sizes(n_rows: int, device: torch.device, ranks: Ranks) -> list[Tensor]:
    """The largest number of rows that a rank has, and the negative of the smallest; nothing for one process."""
    return list(ranks.max(torch.tensor([n_rows, -n_rows], device=device))) if ranks.count > 1 else []


def check_loss(loss: Tensor, step_input: TrainStepInput) -> None:
    """Refuse to go on with a loss that is not finite, at steps that log and at every `LOSS_CHECK_STEPS`-th.

    Raises:
        ValueError: with the step.
    """
    n_steps = step_input.n_training_steps + 1
    if (step_input.is_logging_step or n_steps % LOSS_CHECK_STEPS == 0) and not loss.isfinite():
        raise ValueError(
            f"the loss is {loss.item()} at training step {step_input.n_training_steps}: training has diverged, and the "
            "weights are of no use from here on. Lower the learning rate, and go on from an earlier checkpoint."
        )


def check_weights(sae: TrainingSAE[Any] | SAE[Any], name: str = "this SAE") -> None:
    """Refuse weights that are not finite, and thresholds of an exported SAE that are NaN: at +inf a latent is silent.

    Raises:
        ValueError: with their number by parameter.
    """
    counts = []
    for parameter, values in sae.named_parameters():
        good = values.isfinite() | (values == torch.inf) if parameter == "threshold" else values.isfinite()
        if not good.all():
            counts.append(f"{int((~good).sum()):,} of {good.numel():,} entries of {parameter}")
    if counts:
        raise ValueError(
            f"{', '.join(counts)} are not finite, so {name} is of no use: its training has diverged. Take an earlier "
            "checkpoint, or train with a lower learning rate."
        )


@torch.no_grad()
def check_hook(model: HookedRootModule, cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Refuse a hook that the model does not have or that is not `d_in` wide, by running the model on one token.

    Raises:
        ValueError: with the hook, and its width.
    """
    acts = one_token(model, cfg, {"hook_name": cfg.hook_name})[cfg.hook_name][0, 0]
    if cfg.hook_head_index is not None:
        if acts.ndim < 2 or cfg.hook_head_index >= len(acts):
            raise ValueError(
                f"hook_head_index={cfg.hook_head_index}: {cfg.hook_name} has activations of shape {tuple(acts.shape)} "
                "for each token, without so many heads."
            )
        acts = acts[cfg.hook_head_index]
    if acts.numel() != cfg.sae.d_in:
        raise ValueError(f"d_in={cfg.sae.d_in}, but {cfg.hook_name} of {cfg.model_name} is {acts.numel()} wide.")


@torch.no_grad()
def one_token(
    model: HookedRootModule, cfg: LanguageModelSAERunnerConfig[Any], hooks: Mapping[str, str]
) -> dict[str, Tensor]:
    """Activations of one token at hooks, which fields of the config have named, in the order in which the hooks run.

    Raises:
        ValueError: if the model has no such hook, or does not run it.
    """
    for field, hook_name in hooks.items():
        if hook_name not in model.hook_dict:
            raise ValueError(f"{field}={hook_name!r} is not a hook of {cfg.model_name}.")
    token = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
    activations = one_pass(model, token, hooks.values(), **cfg.model_kwargs)
    for field, hook_name in hooks.items():
        if hook_name not in activations:
            raise ValueError(
                f"{field}={hook_name!r} is a hook of {cfg.model_name} that does not run, or has no tensor."
            )
    return activations
