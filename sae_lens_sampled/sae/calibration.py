"""Thresholds set from data after training, as exact quantiles over the given tokens."""

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_sampled.metrics import ActivationStatistics, differs
from sae_lens_sampled.sae.checks import check_weights, check_width
from sae_lens_sampled.sae.export import ExportedSAE, to_jumprelu
from sae_lens_sampled.sae.reconstruction import encode_and_reconstruct
from sae_lens_sampled.sae.training import SampledTopKTrainingSAE
from sae_lens_sampled.signals import interruptible

MIN_TOKENS = 256
"""Fewest tokens accepted; with fewer, quantiles of rare latents would be noise."""
MIN_SELECTIONS = 10
"""The threshold of a latent with fewer target firings is imprecise."""
CHUNK_ENTRIES = 2**25
"""Entries of a chunk of pre-activations (128 MiB in float32); the selection over a batch holds all of that batch."""


@dataclass(frozen=True)
class CalibrationReport:
    """Effect of a calibration. L0 and FVU are measured on the calibration tokens."""

    n_tokens: int
    target_l0: float
    """Number of active latents per token that the thresholds aim at."""
    l0_before: float
    """L0 of the export with the thresholds learnt in training."""
    l0_after: float
    fvu_before: float
    fvu_after: float
    mean_rate_error: float
    """Mean over latents of |firing rate - target rate| after calibration, divided by `target_l0 / d_sae`. In mode
    "global", which has no target rates, the selection's rates take their place."""
    n_rare: int
    """Number of latents with 1 to 9 target firings (in mode "global": selections)."""
    mean_norm: float
    """Mean norm of the calibration tokens' inputs."""
    mean_norm_in_training: float | None
    """Running mean norm of the inputs over the last training steps; None if unknown."""


@torch.no_grad()
@interruptible()
def calibrate_thresholds(
    sae: SampledTopKTrainingSAE,
    activations: Tensor | Iterable[Tensor],
    mode: str = "per_latent",
    target_l0: float | None = None,
    max_tokens: int = 1_000_000,
    show_progress: bool = True,
) -> tuple[ExportedSAE, CalibrationReport]:
    """Export an SAE with thresholds set by quantiles over the given activations.

    Each batch is one selection batch, so use the batch size of training. A latent's target rate is the share of tokens
    on which it is selected, weighted by its precision as in training (`step/thresholds.py`). Here the precision of a
    latent that is selected n times is the share of its n largest activations that are selected. Equal precisions change
    nothing; with a pool of all latents they are nearly equal. Memory: up to three times the collected batches, plus a
    few chunks of columns or what the selection over one batch needs.

    Args:
        sae: the trained SAE, with its activation normalisation folded in.
        activations: batches as in training, shape (..., d_in), or (..., d_in + d_out) for a transcoder, inputs first;
            a single tensor is one selection batch.
        mode: "per_latent": every latent fires at its target rate. "global": one threshold for all, at the same L0.
        target_l0: mean L0 to reach; None for the L0 of the selection. Per-latent target rates are scaled by one factor,
            but at most to the share of tokens on which the latent is positive.
        max_tokens: once this many tokens are collected, no further batch is read.
        show_progress: whether to show progress bars.

    Raises:
        ValueError: if `sae` is not a SampledTopKTrainingSAE or has non-finite weights; if there are fewer than 256
            tokens, or they have the wrong width or are not finite; if `mode`, `max_tokens` or `target_l0` is invalid;
            if `target_l0` cannot be reached, or is so small that nothing would fire.
    """
    check_calibration(sae, mode, target_l0, max_tokens)
    batches = _collect([activations] if isinstance(activations, Tensor) else activations, sae, max_tokens)
    inputs = [sae.inputs_and_targets(batch)[0] for batch in batches]
    counts = _count_selected(sae, inputs, above=torch.zeros(()))
    x, target = sae.inputs_and_targets(torch.cat(batches))
    n_target = int(counts.sum()) if target_l0 is None else round(target_l0 * len(x))
    if n_target < 1:
        raise ValueError(f"over {len(x)} tokens, this L0 keeps no activation at all; use more tokens or a larger L0.")
    if mode == "global":
        thresholds = _global_threshold(_columns(sae, x, show_progress), n_target).expand(sae.cfg.d_sae)
    else:
        thresholds, n_positive = _quantile_thresholds(_columns(sae, x, show_progress), counts)
        hits = _count_selected(sae, inputs, above=thresholds)
        if target_l0 is not None or not torch.equal(hits, counts):
            # At least 1, so that every selected latent stays active and there are always enough positive entries.
            counts = scale_counts(hits.clamp(min=1).masked_fill(counts == 0, 0), n_positive, n_target)
            thresholds, _ = _quantile_thresholds(_columns(sae, x, show_progress), counts)
        _warn_of_rare_latents(counts, len(x))
    exported = to_jumprelu(sae, thresholds)
    report = _report(to_jumprelu(sae), exported, x, target, counts, n_target, sae.pool_record.input_norm.item())
    _warn_of_other_tokens(report)
    return exported, report


def check_calibration(sae: SampledTopKTrainingSAE, mode: str, target_l0: float | None, max_tokens: int) -> None:
    """Reject an SAE or arguments that `calibrate_thresholds` cannot work with.

    Raises:
        ValueError: naming the argument, its value, and what it must be.
    """
    if not isinstance(sae, SampledTopKTrainingSAE):
        raise ValueError(  # noqa: TRY004  as for every invalid argument
            f"a {type(sae).__name__} cannot be calibrated: only a sampled_topk training SAE or transcoder can. "
            "sae_lens_sampled.load_checkpoint loads one; from_batchtopk converts a BatchTopK, TopK or Matryoshka one."
        )
    check_weights(sae)
    if mode not in ("per_latent", "global"):
        raise ValueError(f"mode={mode!r} must be 'per_latent' or 'global'.")
    if target_l0 is not None and not 0 < target_l0 <= sae.cfg.d_sae:
        raise ValueError(f"target_l0={target_l0} must be above 0 and at most d_sae={sae.cfg.d_sae}.")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be positive; 100,000 or more are recommended.")


def quantile_threshold(
    column: Float[Tensor, "tokens latents"], counts: Int[Tensor, " latents"]
) -> Float[Tensor, " latents"]:
    """Per-column threshold that `counts` entries exceed: halfway between the smallest above and the largest below.

    Infinite where `counts` is 0. Ties with the smallest entry above exceed it too. Thresholds are never negative, so
    only positive entries exceed them.
    """
    ordered = _descending(column.relu())
    below = torch.cat([ordered, torch.zeros_like(ordered[:1])])  # below the last entry there is only 0
    last = ordered.gather(0, (counts - 1).clamp(min=0)[None])[0]
    first = below.gather(0, counts[None])[0]
    # The midpoint may round up to the last entry, which then would not exceed it.
    middle = torch.minimum((last + first) / 2, torch.nextafter(last, torch.zeros_like(last)))
    return middle.masked_fill(counts == 0, torch.inf)


def _descending(columns: Tensor) -> Tensor:
    """Each column in descending order."""
    if columns.device.type == "cpu" and columns.dtype == torch.float32:
        # Four times as fast as torch's sort, which also moves the indices.
        return torch.from_numpy(np.sort(columns.T.contiguous().numpy(), axis=1)).flip(1).T
    return columns.sort(dim=0, descending=True).values


def scale_counts(
    counts: Int[Tensor, " latents"], n_positive: Int[Tensor, " latents"], n_total: int
) -> Int[Tensor, " latents"]:
    """`counts` scaled by one factor to sum to `n_total`, each at most its `n_positive`.

    Raises:
        ValueError: if the latents with a count have fewer than `n_total` positive entries.
    """
    room = n_positive.masked_fill(counts == 0, 0)
    if room.sum() < n_total:
        raise ValueError(
            f"target_l0 asks for {n_total:,} active entries over the calibration tokens, but the latents "
            f"that are ever selected have only {int(room.sum()):,} positive entries; choose a smaller target_l0."
        )
    low, high = 0.0, float(n_total) + 1
    for _ in range(100):
        factor = (low + high) / 2
        reached = torch.minimum(counts.double() * factor, room.double()).sum()
        low, high = (factor, high) if reached < n_total else (low, factor)
    wanted = torch.minimum(counts.double() * high, room.double())
    # Round by largest remainder, so that the sum is exact.
    scaled = wanted.floor().long()
    missing = n_total - int(scaled.sum())
    remainder = (wanted - scaled).masked_fill(scaled >= room, -1)
    scaled[remainder.topk(missing).indices] += 1
    return scaled


def _collect(activations: Iterable[Tensor], sae: SampledTopKTrainingSAE, max_tokens: int) -> list[Tensor]:
    batches, n_tokens = [], 0
    for batch in activations:
        check_width(batch, sae.cfg.batch_parts)
        batch = batch.reshape(-1, batch.shape[-1]).to(sae.device)
        n_bad = int((~batch.isfinite()).any(dim=1).sum())
        if n_bad:
            raise ValueError(
                f"{n_bad} of {len(batch)} rows of calibration batch {len(batches) + 1} are not finite; look for "
                "overflow in the language model (float16?)."
            )
        if len(batch):
            batches.append(batch)
            n_tokens += len(batch)
        if n_tokens >= max_tokens:
            break
    if n_tokens < MIN_TOKENS:
        raise ValueError(f"calibration got {n_tokens} tokens; it needs at least {MIN_TOKENS}, ideally 100,000 or more.")
    return batches


def _count_selected(sae: SampledTopKTrainingSAE, batches: list[Tensor], above: Tensor) -> Tensor:
    """Number of entries of each latent that training's selection keeps and that exceed `above`; one draw per batch."""
    above = above.to(sae.device)
    return torch.stack([(sae.select(batch, draw=i) > above).sum(dim=0) for i, batch in enumerate(batches)]).sum(dim=0)


def _columns(sae: SampledTopKTrainingSAE, x: Tensor, show_progress: bool) -> Iterator[Tensor]:
    """`hidden_pre` of all tokens, a chunk of latents at a time."""
    width = max(1, CHUNK_ENTRIES // len(x))
    sae_in, weights = sae.process_sae_in(x), sae.weights()
    for start in tqdm(range(0, sae.cfg.d_sae, width), desc="Calibrating thresholds", disable=not show_progress):
        yield weights.of(slice(start, start + width)).hidden_pre(sae_in)


def _quantile_thresholds(chunks: Iterator[Tensor], counts: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds that `counts` entries of each latent exceed, and the numbers of positive entries, shape (d_sae,)."""
    thresholds, n_positive, start = [], [], 0
    for chunk in chunks:
        thresholds.append(quantile_threshold(chunk, counts[start : start + chunk.shape[1]]))
        n_positive.append((chunk > 0).sum(dim=0))
        start += chunk.shape[1]
    return torch.cat(thresholds), torch.cat(n_positive)


def _global_threshold(chunks: Iterator[Tensor], n_target: int) -> Tensor:
    """Threshold that `n_target` entries of all columns exceed; a running top-k limits memory to that many."""
    largest = None
    for chunk in chunks:
        values = chunk.flatten()
        if largest is not None and len(largest) > n_target:
            values = values[values > largest[-1]]
        largest = values if largest is None else torch.cat([largest, values])
        largest = largest.topk(min(n_target + 1, len(largest))).values
    assert largest is not None
    n_positive = int((largest > 0).sum())
    if n_positive < n_target:
        raise ValueError(
            f"only {n_positive:,} activations are positive, fewer than the {n_target:,} that target_l0 asks for; "
            "choose a smaller target_l0."
        )
    return quantile_threshold(largest[:, None], torch.tensor([n_target], device=largest.device))


def _warn_of_rare_latents(counts: Tensor, n_tokens: int) -> None:
    live = counts[counts > 0]
    n_rare = int((live < MIN_SELECTIONS).sum())
    if n_rare > 0.1 * len(live):
        needed = math.ceil(n_tokens * MIN_SELECTIONS / int(live.min()))
        warnings.warn(
            f"{n_rare} of {len(live)} live latents have fewer than {MIN_SELECTIONS} target firings in {n_tokens:,} "
            f"tokens, so their thresholds are imprecise; for the rarest, use about {needed:,} tokens.",
            stacklevel=3,
        )


def _warn_of_other_tokens(report: CalibrationReport) -> None:
    if report.mean_norm_in_training is not None and differs(report.mean_norm, report.mean_norm_in_training):
        warnings.warn(
            f"the activations to calibrate on have a mean norm of {report.mean_norm:.4g}, those of training had "
            f"{report.mean_norm_in_training:.4g}: the text or the model differs from training, or the "
            "normalisation is not folded, and the thresholds fit these activations. For thresholds that fit training, "
            "calibrate with the training run's text and model.",
            stacklevel=3,
        )


def _report(
    before: ExportedSAE,
    after: ExportedSAE,
    x: Tensor,
    target: Tensor,
    counts: Tensor,
    n_target: int,
    norm_in_training: float,
) -> CalibrationReport:
    rates_before, fvu_before = _firing_rates_and_fvu(before, x, target)
    rates_after, fvu_after = _firing_rates_and_fvu(after, x, target)
    error = (rates_after - counts / len(x)).abs().mean() / (n_target / len(x) / after.cfg.d_sae)
    return CalibrationReport(
        n_tokens=len(x),
        target_l0=n_target / len(x),
        l0_before=rates_before.sum().item(),
        l0_after=rates_after.sum().item(),
        fvu_before=fvu_before,
        fvu_after=fvu_after,
        mean_rate_error=error.item(),
        n_rare=int(((counts > 0) & (counts < MIN_SELECTIONS)).sum()),
        mean_norm=x.norm(dim=-1).double().mean().item(),
        mean_norm_in_training=norm_in_training or None,
    )


def _firing_rates_and_fvu(sae: ExportedSAE, x: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Share of tokens on which each latent fires, and FVU, with one chunk of activations in memory."""
    statistics = ActivationStatistics(target.shape[1], sae.cfg.d_sae, x.device)
    if sae.hook_z_reshaping_mode:
        sae.turn_off_forward_pass_hook_z_reshaping()  # the heads are side by side already
        try:
            return _firing_rates_and_fvu(sae, x, target)
        finally:
            sae.turn_on_forward_pass_hook_z_reshaping()
    n_rows = max(1, CHUNK_ENTRIES // sae.cfg.d_sae)
    for inputs, wanted in zip(x.split(n_rows), target.split(n_rows), strict=True):
        acts, reconstruction = encode_and_reconstruct(sae, inputs)
        statistics.update(wanted, acts, reconstruction)
    return statistics.density, statistics.fvu
