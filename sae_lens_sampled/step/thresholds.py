"""Rate matching: per-latent thresholds, adjusted during training until latents fire as often as they are selected.

At inference there is no batch and no pool, so a global threshold lets every latent outside the pool fire. Here each
latent gets the threshold at which it fires on as large a share of tokens as training selected it on.

If pools change from batch to batch, a latent's largest activations often fall into batches whose pool lacks it: it
would fire as often as it was selected, but on other tokens, and on activations that its decoder row was never trained
for. So a latent's share is weighted by its precision, the share of its firings that are selections, and all shares are
then scaled by one factor to sum to the L0 of training. Equal precisions change nothing.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae_lens_sampled.step.chunks import chunk_length
from sae_lens_sampled.step.ranks import Ranks

THRESHOLD_STEP = 0.05
"""Long-run size of a threshold step, in units of the latent's own largest activations.

Before, the size is 1 / sqrt(number of steps): activations grow fast at first, and 0.05 would lag behind them for
hundreds of steps, exporting several times the L0 of training. If pools change from batch to batch, smaller
steps lag behind the weights: 0.01 gave an L0 up to 40 % too high after 800 steps (entropy, pool_factor 1 to 5).
"""
EMA_RATE = 0.01
"""Weight of the newest batch in the running means of rates and peaks."""
PRECISION_EMA_RATE = 0.03
"""Weight, in a latent's running precision, of the newest batch in which it fired: pools change faster than rates."""
GAIN_STEP = 0.2
"""How fast `gain` follows the relative error of the total L0."""
MAX_ERROR = 20.0
"""Bound on the relative rate error: a rarely firing latent must not take huge steps when it does fire."""
MIN_SELECTION_RATE = 1e-8
"""A latent selected on a smaller share of tokens than this gets an infinite threshold at export."""
SILENT_AFTER_STEPS = 50
"""A latent that was in no pool for this many steps gets an infinite threshold at export.

At most AuxK still trains it, and it keeps its large activations. With 100 steps instead, FVU is up to
13 % higher (entropy and perplexity, one pool). If every latent is a candidate, this rule silences none.
"""


class StepCounts(NamedTuple):
    """Counts of each latent in a training step, over the tokens of its batch."""

    n_selected: Int[Tensor, " d_sae"]
    """Number of tokens on which the latent was kept, with a positive activation."""
    n_fired: Int[Tensor, " d_sae"]
    """Number of tokens with a pre-activation above the latent's threshold."""
    n_hits: Int[Tensor, " d_sae"]
    """Number of tokens on which the latent was both kept and above its threshold."""
    peak: Float[Tensor, " d_sae"]
    """The latent's largest activation, at least 0."""
    smallest: Float[Tensor, ""]
    """The smallest positive activation kept of any latent; infinite if none was."""


@torch.no_grad()
def reduce_counts(counts: StepCounts, ranks: Ranks, peak_is_of_all: bool = False) -> StepCounts:
    """Counts over the tokens of all ranks; `peak_is_of_all` if `counts.peak` already covers all ranks."""
    numbers = torch.stack([n.int() for n in (counts.n_selected, counts.n_fired, counts.n_hits)])
    n_selected, n_fired, n_hits = ranks.sum(numbers).long()
    peak = counts.peak if peak_is_of_all else ranks.max(counts.peak)
    return StepCounts(n_selected, n_fired, n_hits, peak, ranks.min(counts.smallest))


@torch.no_grad()
def count_dense(
    feature_acts: Float[Tensor, "tokens d_sae"],
    hidden_pre: Float[Tensor, "tokens d_sae"],
    threshold: Float[Tensor, " d_sae"],
) -> StepCounts:
    """Counts from dense matrices, in chunks of rows that stay in the cache."""
    sums, peaks, smallest = [], [], []
    n_rows = chunk_length(feature_acts.shape[1], feature_acts.device)
    for acts, pre in zip(feature_acts.split(n_rows), hidden_pre.split(n_rows), strict=True):
        kept, fired = acts > 0, pre > threshold
        sums.append(torch.stack([mask.sum(dim=0, dtype=torch.int32) for mask in (kept, fired, fired & kept)]))
        peaks.append(pre.amax(dim=0))
        smallest.append(torch.where(kept, acts, torch.inf).amin())
    n_selected, n_fired, n_hits = torch.stack(sums).sum(dim=0)
    peak, smallest = torch.stack(peaks).amax(dim=0).relu(), torch.stack(smallest).amin()
    return StepCounts(n_selected, n_fired, n_hits, peak, smallest)


@torch.no_grad()
def count_kept(
    values: Float[Tensor, " entries"],
    latents: Int[Tensor, " entries"],
    n_fired: Int[Tensor, " d_sae"],
    peak: Float[Tensor, " d_sae"],
    threshold: Float[Tensor, " d_sae"],
) -> StepCounts:
    """Counts from the kept entries, with the given `n_fired` and `peak`, which cover all pre-activations."""
    positive, fired = values > 0, values > threshold[latents]
    n_selected, n_hits = (
        torch.zeros(len(threshold), dtype=torch.int64, device=latents.device).scatter_add_(0, latents, mask.long())
        for mask in (positive, fired)  # no threshold is negative, so entries above it are positive
    )
    smallest = torch.cat([torch.where(positive, values, torch.inf), values.new_full((1,), torch.inf)]).amin()
    return StepCounts(n_selected, n_fired, n_hits, peak, smallest)


class RateMatcher(nn.Module):
    """Per-latent thresholds and the running rates that steer them.

    Every buffer is float32 and persistent; all but `gain` have shape (d_sae,). The running means of rates and peak are
    stored without bias correction: divided by `1 - (1 - EMA_RATE)^n` after n steps they are weighted averages.
    """

    threshold: Tensor
    """The threshold, in units of `hidden_pre`."""
    firing_rate: Tensor
    """Running share of tokens above the threshold."""
    selection_rate: Tensor
    """Running share of tokens on which the latent was selected."""
    precision: Tensor
    """Running mean, over batches in which the latent fires, of the share of its firings that are selections."""
    gain: Tensor
    """Common factor of all target rates that keeps the export at the L0 of training, shape (); 1 if none is needed."""
    peak: Tensor
    """Running mean of the latent's largest activation in a batch: the latent's own scale."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        super().__init__()
        for name in ("threshold", "firing_rate", "selection_rate", "peak"):
            self.register_buffer(name, torch.zeros(d_sae, dtype=torch.float32, device=device))
        self.register_buffer("precision", torch.ones(d_sae, dtype=torch.float32, device=device))
        self.register_buffer("gain", torch.ones((), dtype=torch.float32, device=device))

    @torch.no_grad()
    def update(
        self,
        counts: "StepCounts",
        recently_pooled: Bool[Tensor, " d_sae"],
        cutoff: Float[Tensor, ""],
        n_tokens: int,
        n_steps: Int[Tensor, ""],
    ) -> None:
        r"""One step of $\theta_j \mathrel{+}= \eta M_j \mathrm{clip}((f_j - w_j r_j)/(\bar f_j + w_j \bar r_j + 1/B))$.

        f are the firing rates and r the selection rates; bars mark running means. The weights are
        $w_j = g \bar p_j \sum_i \bar r_i / \sum_i \bar p_i \bar r_i$ with the precisions p and the gain g, which keeps
        the export's $\hat L_0$ at the selection's $L_0$: $g \mathrel{*}= 1 + \gamma (L_0 - \hat L_0) / \bar L_0$. It
        stays within [0.5, 100], and thresholds at 0 or above. The step is in units of a latent's own scale $M_j$: in
        units of the cutoff, it fails if that is near 0. The error is divided by *running* rates: dividing by the
        batch's own would balance medians instead of means.

        Args:
            counts: counts of this batch; in the first batch, those that depend on thresholds are ignored.
            recently_pooled: whether a latent was in a pool recently (`SILENT_AFTER_STEPS`); others are exported silent.
            cutoff: smallest positive activation kept in the latest batch that kept any; after the first batch it
                initialises all thresholds.
            n_tokens: number of tokens in the batch, B.
            n_steps: number of steps before this one.
        """
        # This batch's rates. The first batch has no thresholds yet, so its selections count as firings.
        selection_rate = counts.n_selected / n_tokens
        firing_rate = torch.where(n_steps > 0, counts.n_fired / n_tokens, selection_rate)
        hit_rate = torch.where(n_steps > 0, counts.n_hits / n_tokens, selection_rate)
        # Running means that start at 0: divided by `correction`, they are weighted averages.
        new = (firing_rate, selection_rate, counts.peak)
        for mean, value in zip((self.firing_rate, self.selection_rate, self.peak), new, strict=True):
            mean.lerp_(value.to(mean.dtype), EMA_RATE)
        precision = torch.where(firing_rate > 0, hit_rate / firing_rate, self.precision)
        self.precision.lerp_(precision.to(torch.float32), PRECISION_EMA_RATE)
        correction = 1 - (1 - EMA_RATE) ** (n_steps + 1)
        # The step itself, in units of the latent's own peak; the first batch sets all thresholds to its cutoff.
        weight = self._weight()
        rates = (self.firing_rate + weight * self.selection_rate) / correction + 1 / n_tokens
        error = ((firing_rate - weight * selection_rate) / rates).clamp(-MAX_ERROR, MAX_ERROR)
        step = (n_steps + 1).rsqrt().clamp(min=THRESHOLD_STEP)
        moved = (self.threshold + step * self.peak / correction * error).clamp(min=0)
        self.threshold.copy_(torch.where(n_steps > 0, moved, cutoff))
        # The gain makes up for the difference from the export's L0, to which silent latents do not contribute.
        missing = selection_rate.sum() - firing_rate.masked_fill(~recently_pooled, 0).sum()
        total = (self.selection_rate.sum() / correction).clamp(min=MIN_SELECTION_RATE)
        self.gain.mul_(1 + GAIN_STEP * missing / total).clamp_(0.5, 100)

    def _weight(self) -> Float[Tensor, " d_sae"]:
        """Target rate over selection rate: the precision, scaled so that target rates sum to the L0 times the gain."""
        weighted = (self.precision * self.selection_rate).sum().clamp(min=MIN_SELECTION_RATE)
        return self.precision * self.gain * self.selection_rate.sum() / weighted

    def scale(self, factor: float) -> None:
        """Adapt to activations that have become `factor` times as large."""
        self.threshold *= factor
        self.peak *= factor

    def export(self, n_steps: Int[Tensor, ""], recently_pooled: Bool[Tensor, " d_sae"]) -> Float[Tensor, " d_sae"]:
        """The thresholds for inference: infinite for a latent that left the pools or was practically never selected.

        Args:
            n_steps: number of steps so far.
            recently_pooled: whether a latent was in a pool within the last `SILENT_AFTER_STEPS` steps.
        """
        correction = 1 - (1 - EMA_RATE) ** n_steps.clamp(min=1)
        silent = (self.selection_rate / correction < MIN_SELECTION_RATE) | ~recently_pooled
        return self.threshold.masked_fill(silent, torch.inf)
