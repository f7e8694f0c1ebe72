"""Validation of external input before any computation: batches, losses, weights and checkpoints."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput
from torch import Tensor

from sae_lens_sampled.folders import UNFOLDED, read_config, read_runner_config
from sae_lens_sampled.sae.config import refuse_quota
from sae_lens_sampled.step.ranks import ALONE, Ranks
from sae_lens_sampled.step.selection import PoolFields

WEIGHT_FIELDS = (
    "d_in",
    "d_sae",
    "d_out",
    "skip",
    "apply_b_dec_to_input",
    "rescale_acts_by_decoder_norm",
    "normalize_activations",
    "hook_name_out",
)
"""Fields of an SAE's config, beside its architecture, that say which weights there are and what they mean."""

LOSS_CHECK_STEPS = 100
"""Steps between two looks at the loss, where nothing else makes the host wait for it."""


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


class StepState(NamedTuple):
    """What the host has to know before a step can begin."""

    dead: Tensor | None
    """Which latents are dead: those that have fired on no rank for long enough."""
    n_dead: int
    n_steps: int
    """Training steps before this one."""
    fields: PoolFields
    """Those in force, which choose its pool: not the config's where its `pool_steps` are over."""


def read_step(step_input: TrainStepInput, cfg: PoolFields, n_steps: Tensor, ranks: Ranks = ALONE) -> StepState:
    """The first wait for a GPU in a step; refuses rows that are not finite.

    `n_steps` is the record's number of steps, alike on all ranks: SAELens' own is one too low after a checkpoint.

    Raises:
        ValueError: with the number of rows and the step; on all ranks, if the rows of any are at fault, or if they have
            different numbers of them.
    """
    bad_rows, mask = ~step_input.sae_in.isfinite().all(dim=-1), step_input.dead_neuron_mask
    dead = None if mask is None else ranks.min(mask).bool()
    n_dead = bad_rows.new_zeros((), dtype=torch.int64) if dead is None else dead.sum()
    sizes = bad_rows.new_full((2,), bad_rows.numel(), dtype=torch.int64)
    sizes[1].neg_()
    most, fewest = ranks.max(sizes)
    numbers = torch.stack([ranks.sum(bad_rows.sum()), n_dead, most, fewest.neg(), n_steps])
    n_bad, n_dead, most, fewest, n_before = numbers.tolist()
    if most != fewest:
        raise ValueError(
            f"the ranks have between {fewest} and {most} tokens at training step {step_input.n_training_steps}, "
            "but each must have as many as the others."
        )
    if n_bad:
        raise ValueError(
            f"{n_bad} of {ranks.n_of_all(most)} rows of sae_in are not finite at training step "
            f"{step_input.n_training_steps}; training stopped before any weight was changed. Look for overflow in "
            "the language model (float16?) or exclude the tokens at fault."
        )
    return StepState(dead, n_dead, n_before, cfg.fields_after(n_before))


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


def check_same_weights(folder: Path, sae: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights do not fit an SAE of this config, or would mean something else in it.

    Fields that the checkpoint's config lacks are not compared; a config that cannot be read is left to the loader.

    Raises:
        ValueError: with the field, both values and the way out.
    """
    try:
        theirs = read_config(folder)
    except ValueError:
        return
    refuse_quota(theirs)
    if theirs.get("architecture") != sae["architecture"]:
        raise ValueError(
            f"{str(folder)!r} holds a {theirs.get('architecture')!r} SAE, which cannot be resumed as "
            f"{sae['architecture']!r}; an SAE exported for inference cannot be trained further, and from a TopK, "
            "BatchTopK or Matryoshka training checkpoint sae_lens_sampled.from_batchtopk(folder, cfg) starts a new run."
        )
    normalized = (read_runner_config(folder).get("sae") or {}).get("normalize_activations")
    if normalized in UNFOLDED and normalized == sae["normalize_activations"]:
        theirs = theirs | {"normalize_activations": normalized}  # "none" at the end of a run, which folds it
    check_equal_fields(folder, WEIGHT_FIELDS, _with_meaning(theirs), _with_meaning(sae))


def check_equal_fields(folder: Path, names: Sequence[str], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a checkpoint with another value of a field than this run has; fields that one lacks are not compared.

    Raises:
        ValueError: with the field, both values and the way out.
    """
    for name in names:
        if name in theirs and name in ours and theirs[name] != ours[name]:
            raise ValueError(
                f"{name}={ours[name]!r}, but {str(folder)!r} was trained with {name}={theirs[name]!r}: its weights "
                f"do not fit, or would mean something else. Resume with {name}={theirs[name]!r}, or leave "
                "resume_from_checkpoint out to start anew."
            )


def warn_if_alone(ranks: Ranks) -> None:
    """Warn of an SAE that trains by itself in one process of several: each would train one of its own, in silence."""
    count = os.environ.get("WORLD_SIZE", "").strip()
    if ranks is ALONE and count.isdecimal() and int(count) > 1:
        warnings.warn(
            f"WORLD_SIZE={count}, but this SAE trains on the tokens of its own process alone, and each process trains "
            "one. For one SAE on all of them use `torchrun -m sae_lens_sampled train` or DataParallelRunner, or call "
            "sae.data_parallel() before building the trainer.",
            stacklevel=2,
        )


def _with_meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON has it, where equal values mean the same."""
    known = json.loads(json.dumps(dict(config), default=str))
    if known.get("d_out") is None and "d_out" in known:
        known["d_out"] = known["d_in"]
    if known.get("hook_name_out") is None:
        known.pop("hook_name_out", None)  # trained on batches that somebody put together
    return known
