"""Validation of batches, losses, weights and checkpoints; what a run logs or warns of at its start."""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import logger
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
"""Fields of an SAE's config, besides its architecture, that determine the shapes and meaning of its weights."""

LOSS_CHECK_STEPS = 100
"""Number of steps between two checks of the loss, apart from logging steps, which wait for it anyway."""


def check_shape(sae: TrainingSAE, x: Tensor) -> None:
    """Reject an empty batch and, unless heads are merged, activations of the wrong width.

    Raises:
        ValueError: naming the shape.
    """
    if not sae.hook_z_reshaping_mode:
        check_width(x, {"d_in": sae.cfg.d_in})
    if x.numel() == 0:
        raise ValueError(f"got an empty batch, of shape {tuple(x.shape)}; there is nothing to select from.")


def check_width(x: Tensor, parts: Mapping[str, int]) -> None:
    """Reject activations whose width is not the sum of the widths in `parts`, which are keyed by config field.

    Raises:
        ValueError: naming the shape and the expected width.
    """
    width = sum(parts.values())
    if x.shape[-1:] != (width,):
        how = "" if len(parts) == 1 else ": inputs, then outputs, as TranscoderRunner yields them"
        raise ValueError(
            f"activations of shape {tuple(x.shape)} must have last dimension {' + '.join(parts)}={width}{how}."
        )


class StepState(NamedTuple):
    """Values that the CPU needs before a step can begin."""

    dead: Tensor | None
    """Mask of dead latents: those that have not fired on any rank for many steps."""
    n_dead: int
    n_steps: int
    """Training steps before this one."""
    fields: PoolFields
    """Fields that choose the pool of this step; after `pool_steps` they differ from the config's."""


def read_step(step_input: TrainStepInput, cfg: PoolFields, n_steps: Tensor, ranks: Ranks = ALONE) -> StepState:
    """Read a step's state from the device (the first wait for a GPU in a step) and reject non-finite rows.

    `n_steps` is the record's step count, equal on all ranks; SAELens' own is one too low after resuming.

    Raises:
        ValueError: on all ranks, naming the number of rows and the step, if any rank has non-finite rows or the ranks
            have different numbers of tokens.
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
            "but each must have the same number."
        )
    if n_bad:
        raise ValueError(
            f"{n_bad} of {ranks.n_of_all(most)} rows of sae_in are not finite at training step "
            f"{step_input.n_training_steps}; training stopped before this batch changed any weight. Look for overflow "
            "in the language model (float16?) or exclude the offending tokens."
        )
    return StepState(dead, n_dead, n_before, cfg.fields_after(n_before))


def check_groups(n_tokens: int, group_size: int | None, n_ranks: int) -> None:
    """Reject token groups that would span two processes.

    Raises:
        ValueError: naming both numbers.
    """
    if n_ranks > 1 and group_size is not None and n_tokens % group_size:
        raise ValueError(
            f"each rank has {n_tokens} tokens per batch, not a multiple of pool_group_size={group_size}, so a group "
            "would span two ranks. Change the batch size or pool_group_size."
        )


def check_loss(loss: Tensor, step_input: TrainStepInput) -> None:
    """Reject a non-finite loss, at logging steps and at every `LOSS_CHECK_STEPS`-th step.

    Raises:
        ValueError: naming the step.
    """
    n_steps = step_input.n_training_steps + 1
    if (step_input.is_logging_step or n_steps % LOSS_CHECK_STEPS == 0) and not loss.isfinite():
        raise ValueError(
            f"the loss is {loss.item()} at training step {step_input.n_training_steps}: training has diverged, or "
            "values of this batch overflow. Resume from an earlier checkpoint with a lower learning rate, or exclude "
            "such tokens."
        )


def check_weights(sae: TrainingSAE[Any] | SAE[Any], name: str = "this SAE") -> None:
    """Reject non-finite weights; in an exported SAE, thresholds of +inf are allowed, as they silence latents.

    Raises:
        ValueError: naming the number of such entries in each parameter.
    """
    counts = []
    for parameter, values in sae.named_parameters():
        good = values.isfinite() | (values == torch.inf) if parameter == "threshold" else values.isfinite()
        if not good.all():
            counts.append(f"{int((~good).sum()):,} of {good.numel():,} entries of {parameter}")
    if counts:
        raise ValueError(
            f"{', '.join(counts)} are not finite, so {name} is unusable: its training has probably diverged. Use an "
            "earlier checkpoint, or train with a lower learning rate."
        )


def check_same_weights(folder: Path, sae: Mapping[str, Any]) -> None:
    """Reject a checkpoint whose weights do not fit an SAE of this config, or would mean something else in it.

    Fields that the checkpoint's config lacks are not compared; an unreadable config is left to the loader.

    Raises:
        ValueError: naming the field, both values and the way out; as `refuse_quota` does.
    """
    try:
        theirs = read_config(folder)
    except ValueError:
        return
    refuse_quota(theirs)
    if theirs.get("architecture") != sae["architecture"]:
        raise ValueError(
            f"{str(folder)!r} holds a {theirs.get('architecture')!r} SAE, which cannot be resumed as "
            f"{sae['architecture']!r}; an SAE exported for inference cannot be trained further, but "
            "sae_lens_sampled.from_batchtopk(folder, cfg) starts a new run of sampled_topk from a TopK, BatchTopK or "
            "Matryoshka training checkpoint."
        )
    normalized = (read_runner_config(folder).get("sae") or {}).get("normalize_activations")
    if normalized in UNFOLDED and normalized == sae["normalize_activations"]:
        theirs = theirs | {"normalize_activations": normalized}  # cfg.json says "none" after a run, once folded
    check_equal_fields(folder, WEIGHT_FIELDS, _with_meaning(theirs), _with_meaning(sae))


def check_equal_fields(folder: Path, names: Sequence[str], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Reject a checkpoint with other field values than this run; fields missing on one side are not compared.

    Raises:
        ValueError: naming the field, both values and the way out.
    """
    for name in names:
        if name in theirs and name in ours and theirs[name] != ours[name]:
            raise ValueError(
                f"{name}={ours[name]!r}, but {str(folder)!r} was trained with {name}={theirs[name]!r}: its weights "
                f"do not fit, or would mean something else. Use {name}={theirs[name]!r}, or start over without "
                "this checkpoint (leave out resume_from_checkpoint)."
            )


def tell_of_one_pool(fields: PoolFields) -> None:
    """Log what one pool per batch, the paper's setting, does to the other latents, and the alternatives."""
    is_fixed_choice = fields.pool_sampling == "top"  # a pool that is drawn at random does not freeze
    if is_fixed_choice and fields.pool_group_size is None and fields.n_candidates < fields.d_sae:
        logger.info(
            f"sampled_topk: one pool of {fields.n_candidates:,} of {fields.d_sae:,} latents per batch, as in the paper."
            " Such a pool tends to stay the same, and latents outside it to die. pool_factor=None, which is BatchTopK, "
            "is recommended; pool_factor=10, pool_group_size=16 lets most latents in"
        )


def warn_if_alone(ranks: Ranks) -> None:
    """Warn if an SAE trains alone in one of several processes: each process would silently train its own."""
    count = os.environ.get("WORLD_SIZE", "").strip()
    if ranks is ALONE and count.isdecimal() and int(count) > 1:
        warnings.warn(
            f"WORLD_SIZE={count}, but each process trains its own SAE, on its own tokens only. To train one SAE "
            "on the tokens of all processes, use `torchrun -m sae_lens_sampled train` or DataParallelRunner, or call "
            "sae.data_parallel() before building the trainer.",
            stacklevel=2,
        )


def _with_meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON represents it, with defaults filled in so that equal meanings have equal values."""
    known = json.loads(json.dumps(dict(config), default=str))
    if known.get("d_out") is None and "d_out" in known:
        known["d_out"] = known["d_in"]
    if known.get("hook_name_out") is None:
        known.pop("hook_name_out", None)  # trained on batches put together by the caller
    return known
