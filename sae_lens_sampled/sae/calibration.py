"""Thresholds from data, after training: exact quantiles over the tokens that are passed."""

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
"""Fewer tokens than this are refused: quantiles of rare latents would be noise."""
MIN_SELECTIONS = 10
"""A latent selected less often than this has a poorly known threshold."""
CHUNK_ENTRIES = 2**25
"""Pre-activations held at a time (128 MiB in float32)."""


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration found and changed. L0 and FVU are over the calibration tokens."""

    n_tokens: int
    target_l0: float
    """Active latents per token that the thresholds were set for."""
    l0_before: float
    """L0 of the export with the thresholds that the SAE had learnt in training."""
    l0_after: float
    fvu_before: float
    fvu_after: float
    mean_rate_error: float
    """Mean over latents of |firing rate - target rate|, over the mean target rate; after calibration."""
    n_rare: int
    """Latents with fewer than 10 target firings among the tokens, but not none."""
    mean_norm: float
    """Mean norm of the calibration tokens' inputs."""
    mean_norm_in_training: float | None
    """Mean norm of the inputs over the last training steps; None where it is not known."""


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
    """Set the thresholds of the exported SAE by quantiles over given activations.

    Each batch passed is one selection batch: pass batches of the size used in training. A latent's target rate is the
    share of tokens on which it is selected, weighted by its precision as in training (`thresholds.py`): of its largest
    activations, as many as it is selected, the share that is selected. Equal precisions change nothing, as with a pool
    of all latents. Memory: the kept batches, twice, and one chunk of columns.

    Args:
        sae: the trained SAE, with its activation normalisation folded.
        activations: batches as in training, of shape (..., d_in), for a transcoder (..., d_in + d_out) with the outputs
            behind the inputs; or one such tensor, which then is one selection batch.
        mode: "per_latent": every latent fires at its target rate. "global": one threshold for all, at the same L0.
        target_l0: the wanted mean L0; None for that of the selection. Per-latent target rates are scaled alike, as far
            as a latent has positive activations.
        max_tokens: no batch is taken once so many tokens are kept; the rest of `activations` is not read.
        show_progress: whether to show progress bars.

    Raises:
        ValueError: if `sae` is of another kind or has weights that are not finite; if there are fewer than 256 tokens,
            of another width or not finite; if `max_tokens` is below that, or `target_l0` not positive or not reached.
    """
    check_calibration(sae, mode, target_l0, max_tokens)
    batches = _collect([activations] if isinstance(activations, Tensor) else activations, sae, max_tokens)
    inputs = [sae.inputs_and_targets(batch)[0] for batch in batches]
    counts = _count_selected(sae, inputs, above=torch.zeros(()))
    x, target = sae.inputs_and_targets(torch.cat(batches))
    n_target = int(counts.sum()) if target_l0 is None else round(target_l0 * len(x))
    if mode == "global":
        thresholds = _global_threshold(_columns(sae, x, show_progress), n_target).expand(sae.cfg.d_sae)
    else:
        thresholds, n_positive = _quantile_thresholds(_columns(sae, x, show_progress), counts)
        hits = _count_selected(sae, inputs, above=thresholds)
        if target_l0 is not None or not torch.equal(hits, counts):
            # At least one, so that every selected latent stays and there are always enough positive entries.
            counts = scale_counts(hits.clamp(min=1).masked_fill(counts == 0, 0), n_positive, n_target)
            thresholds, _ = _quantile_thresholds(_columns(sae, x, show_progress), counts)
        _warn_of_rare_latents(counts, len(x))
    exported = to_jumprelu(sae, thresholds)
    report = _report(to_jumprelu(sae), exported, x, target, counts, n_target, sae.pool_record.input_norm.item())
    _warn_of_other_tokens(report)
    return exported, report


def check_calibration(sae: SampledTopKTrainingSAE, mode: str, target_l0: float | None, max_tokens: int) -> None:
    """Refuse an SAE and arguments with which `calibrate_thresholds` could not begin.

    Raises:
        ValueError: with the argument, its value, and what it must be.
    """
    if not isinstance(sae, SampledTopKTrainingSAE):
        raise ValueError(  # noqa: TRY004  like every other refusal
            f"a {type(sae).__name__} cannot be calibrated, because its batches select in another way; "
            "sae_lens_sampled.from_batchtopk makes a sampled_topk SAE of a BatchTopK, TopK or Matryoshka training SAE."
        )
    check_weights(sae)
    if mode not in ("per_latent", "global"):
        raise ValueError(f"mode={mode!r} must be 'per_latent' or 'global'.")
    if target_l0 is not None and not 0 < target_l0 <= sae.cfg.d_sae:
        raise ValueError(f"target_l0={target_l0} must be above 0 and at most d_sae={sae.cfg.d_sae}.")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be positive; 100,000 or more are better than few.")


def quantile_threshold(
    column: Float[Tensor, "tokens latents"], counts: Int[Tensor, " latents"]
) -> Float[Tensor, " latents"]:
    """Per column a threshold that `counts` entries exceed: halfway between the last above and the first below, or 0.

    Infinite where `counts` is 0. Where entries are equal at that place, fewer may exceed it. No threshold is negative,
    so counts beyond the positive entries are not reached.
    """
    ordered = _descending(column.relu())
    below = torch.cat([ordered, torch.zeros_like(ordered[:1])])  # nothing is below the last but 0
    last = ordered.gather(0, (counts - 1).clamp(min=0)[None])[0]
    first = below.gather(0, counts[None])[0]
    # Halfway may round up to the last entry, which then would not exceed it.
    middle = torch.minimum((last + first) / 2, torch.nextafter(last, torch.zeros_like(last)))
    return middle.masked_fill(counts == 0, torch.inf)


def _descending(columns: Tensor) -> Tensor:
    """Each column sorted."""
    if columns.device.type == "cpu" and columns.dtype == torch.float32:
        # A quarter of the time of torch's, which moves the places of the values along with them.
        return torch.from_numpy(np.sort(columns.T.contiguous().numpy(), axis=1)).flip(1).T
    return columns.sort(dim=0, descending=True).values


def scale_counts(
    counts: Int[Tensor, " latents"], n_positive: Int[Tensor, " latents"], n_total: int
) -> Int[Tensor, " latents"]:
    """`counts` scaled alike until they sum to `n_total`, none above its `n_positive`.

    Raises:
        ValueError: if even all positive entries of the latents that have a count are too few.
    """
    room = n_positive.masked_fill(counts == 0, 0)
    if room.sum() < n_total:
        raise ValueError(
            f"target_l0 asks for {n_total:,} active entries over the calibration tokens, but the latents that were "
            f"selected at all have only {int(room.sum()):,} positive ones; choose a smaller target_l0."
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
            raise ValueError(f"{n_bad} of {len(batch)} rows of batch {len(batches)} are not finite.")
        if len(batch):
            batches.append(batch)
            n_tokens += len(batch)
        if n_tokens >= max_tokens:
            break
    if n_tokens < MIN_TOKENS:
        raise ValueError(f"calibration got {n_tokens} tokens; it needs at least {MIN_TOKENS}, better 100,000 or more.")
    return batches


def _count_selected(sae: SampledTopKTrainingSAE, batches: list[Tensor], above: Tensor) -> Tensor:
    """Entries of each latent that training's selection keeps and that exceed `above`; each batch has its own draw."""
    above = above.to(sae.device)
    return torch.stack([(sae.select(batch, draw=i) > above).sum(dim=0) for i, batch in enumerate(batches)]).sum(dim=0)


def _columns(sae: SampledTopKTrainingSAE, x: Tensor, show_progress: bool) -> Iterator[Tensor]:
    """`hidden_pre` of all tokens, a chunk of latents at a time."""
    width = max(1, CHUNK_ENTRIES // len(x))
    sae_in, weights = sae.process_sae_in(x), sae.weights()
    for start in tqdm(range(0, sae.cfg.d_sae, width), desc="Calibrating thresholds", disable=not show_progress):
        yield weights.of(slice(start, start + width)).hidden_pre(sae_in)


def _quantile_thresholds(chunks: Iterator[Tensor], counts: Tensor) -> tuple[Tensor, Tensor]:
    """Per latent the threshold that `counts` entries exceed, and the number of positive entries."""
    thresholds, n_positive, start = [], [], 0
    for chunk in chunks:
        thresholds.append(quantile_threshold(chunk, counts[start : start + chunk.shape[1]]))
        n_positive.append((chunk > 0).sum(dim=0))
        start += chunk.shape[1]
    return torch.cat(thresholds), torch.cat(n_positive)


def _global_threshold(chunks: Iterator[Tensor], n_target: int) -> Tensor:
    """The value that `n_target` entries of all columns exceed: a running top-k keeps memory at that many."""
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
        raise ValueError(f"only {n_positive:,} activations are positive, fewer than the {n_target:,} of target_l0.")
    return quantile_threshold(largest[:, None], torch.tensor([n_target], device=largest.device))


def _warn_of_rare_latents(counts: Tensor, n_tokens: int) -> None:
    live = counts[counts > 0]
    n_rare = int((live < MIN_SELECTIONS).sum())
    if n_rare > 0.1 * len(live):
        needed = math.ceil(n_tokens * MIN_SELECTIONS / int(live.min()))
        warnings.warn(
            f"{n_rare} of {len(live)} live latents are selected fewer than {MIN_SELECTIONS} times in {n_tokens:,} "
            f"tokens, so their thresholds are rough; the rarest needs about {needed:,} tokens.",
            stacklevel=3,
        )


def _warn_of_other_tokens(report: CalibrationReport) -> None:
    if report.mean_norm_in_training is not None and differs(report.mean_norm, report.mean_norm_in_training):
        warnings.warn(
            f"the calibration tokens have a mean norm of {report.mean_norm:.4g}, those of training had "
            f"{report.mean_norm_in_training:.4g}: these are other tokens, or the activations of another model. The "
            "thresholds are for inputs such as these.",
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
    """Share of tokens that each latent fires on, and FVU, with one chunk of activations in memory."""
    statistics = ActivationStatistics(target.shape[1], sae.cfg.d_sae, x.device)
    n_rows = max(1, CHUNK_ENTRIES // sae.cfg.d_sae)
    for inputs, wanted in zip(x.split(n_rows), target.split(n_rows), strict=True):
        acts, reconstruction = encode_and_reconstruct(sae, inputs)
        statistics.update(wanted, acts, reconstruction)
    return statistics.density, statistics.fvu
