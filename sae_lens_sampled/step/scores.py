"""Scores: how much a latent deserves a place in the candidate pool, judged over one batch.

A score is called as `(acts, n_candidates) -> scores`. `acts` has shape `(..., tokens, latents)`, is non-negative and
at least float32; `scores` has shape `(..., latents)`, the higher the better. Leading dimensions are pool groups.
`n_candidates` is the number of latents that will be selected; most scores ignore it.

Most scores judge each latent by its own activations, from sums over tokens and the largest activation. Such a
`ColumnScore` is written once and works on chunks of latents, in groups, and across processes that split the tokens.

`l2_norm` and `squared_l2` choose the same latents, since squaring keeps the order; they differ only under
`pool_sampling="proportional"`. The L2 norm ranks a latent with activation 100 on 5 % of the tokens (22.4 sqrt(B))
above one with 10 on 50 % of them (7.1 sqrt(B)): to prefer the latter, use `perplexity`, `frequency` or `winsorised`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_lens_sampled.step.ranks import Ranks

Score: TypeAlias = Callable[[Tensor, int], Tensor]

LEVERAGE_ROWS = 256
"""Most rows of the sketch that `ridge_leverage` uses; its cost grows with the square of this number."""


class ColumnSums(NamedTuple):
    """Sums and peaks of each latent over the tokens of each group."""

    n_tokens: int
    """Number of tokens in a group."""
    peak: Float[Tensor, "*group latents"]
    """Largest activation."""
    sums: tuple[Float[Tensor, "*group latents"], ...]
    """Sums over tokens: that of the squares, then those that the score needs."""


def _no_sums(acts: Tensor, peak: Tensor, last_cutoff: Tensor | None) -> list[Tensor]:  # noqa: ARG001
    return []


@dataclass(frozen=True)
class ColumnScore:
    """A score computed from each latent's sums over tokens and its largest activation."""

    of: Callable[[ColumnSums], Tensor]
    """Computes the score from the sums over all tokens of a group."""
    sums: Callable[[Tensor, Tensor, Tensor | None], list[Tensor]] = _no_sums
    """Computes the sums needed besides that of the squares, from the activations, each latent's largest one, and the
    smallest positive activation kept in the previous batch (None or 0 if unknown)."""
    rescaled: Callable[..., list[Tensor]] | None = None
    """Converts sums relative to one largest activation to another, from the ratio of the old to the new one and the
    sums; None if they do not depend on it."""

    def __call__(
        self, acts: Float[Tensor, "*group tokens latents"], n_candidates: int
    ) -> Float[Tensor, "*group latents"]:
        """The score of every latent in every group."""
        del n_candidates
        return self.of(self.column_sums(acts))

    def column_sums(
        self, acts: Float[Tensor, "*group tokens latents"], last_cutoff: Tensor | None = None
    ) -> ColumnSums:
        """The sums over the given tokens that the score needs."""
        one = acts.shape[-2] == 1  # TopK as groups of one token: sums over a dimension of size 1 are slow
        peak = acts.squeeze(-2).clone() if one else acts.amax(dim=-2)  # a copy: scans overwrite their chunks
        squares = peak.square() if one else acts.square().sum(dim=-2)
        return ColumnSums(acts.shape[-2], peak, (squares, *self.sums(acts, peak, last_cutoff)))

    def merged(self, own: ColumnSums, ranks: Ranks) -> ColumnSums:
        """The sums over the tokens of all processes, from those of this process."""
        peak, (squares, *sums) = ranks.max(own.peak), own.sums
        if self.rescaled is not None:
            sums = self.rescaled(own.peak / peak.clamp(min=torch.finfo(peak.dtype).tiny), *sums)
        return ColumnSums(ranks.n_of_all(own.n_tokens), peak, tuple(ranks.sum(torch.stack([squares, *sums]))))


def _share_sums(acts: Tensor, peak: Tensor, last_cutoff: Tensor | None) -> list[Tensor]:  # noqa: ARG001
    """Sums of x = a / peak and of x log x: unscaled, very small or large activations would leave the float range."""
    share = acts / peak.unsqueeze(-2).clamp(min=torch.finfo(acts.dtype).tiny)
    return [share.sum(dim=-2), torch.special.xlogy(share, share).sum(dim=-2)]


def _shares_of_peak(factor: Tensor, shares: Tensor, logs: Tensor) -> list[Tensor]:
    return [factor * shares, factor * logs + torch.special.xlogy(factor, factor) * shares]


def _shannon_entropy(sums: ColumnSums) -> Tensor:
    """H(a / sum a) over the tokens, in nats; 0 for a latent that never fires."""
    _, shares, logs = sums.sums
    total = shares.clamp(min=torch.finfo(shares.dtype).tiny)
    return (total.log() - logs / total).clamp(min=0)


def _concentration(sums: ColumnSums) -> Tensor:
    if sums.n_tokens == 1:
        return torch.zeros_like(sums.peak)
    log_n_tokens = torch.tensor(float(sums.n_tokens), dtype=sums.peak.dtype).log().item()
    return torch.where(sums.peak > 0, (1 - _shannon_entropy(sums) / log_n_tokens).clamp(min=0), 0)


l2_norm = ColumnScore(lambda sums: sums.sums[0].sqrt())  # vector_norm over a middle dimension takes ten times as long
r"""$\sqrt{\sum_i a_i^2}$: prefers latents with much activation in the batch."""

squared_l2 = ColumnScore(lambda sums: sums.sums[0])
r"""$\sum_i a_i^2$: the same order as `l2_norm`; a sampled pool concentrates more on the largest."""

entropy = ColumnScore(_concentration, _share_sums, _shares_of_peak)
r"""$1 - H(p) / \log B$ with $p = a / \sum a$: prefers specialised latents, whose mass lies on few tokens.

In [0, 1]; 0 for a latent that never fires, and for every latent if there is only one token."""

perplexity = ColumnScore(
    lambda sums: torch.where(sums.peak > 0, _shannon_entropy(sums).exp(), 0), _share_sums, _shares_of_peak
)
r"""$\exp H(p)$ with $p = a / \sum a$: the effective number of tokens a latent fires on; prefers latents with many."""

frequency = ColumnScore(
    lambda sums: sums.sums[1], lambda acts, _peak, _last_cutoff: [(acts > 0).sum(dim=-2).to(acts.dtype)]
)
"""Number of tokens on which the latent is positive: prefers latents that fire on many, however weakly."""

uniform = ColumnScore(lambda sums: (sums.peak > 0).to(sums.peak.dtype))
"""1 for every latent that fires: a control that draws its pool blindly. Only for proportional sampling."""


def _clipped_squares(acts: Tensor, peak: Tensor, last_cutoff: Tensor | None) -> list[Tensor]:  # noqa: ARG001
    if last_cutoff is None:
        return [acts.square().sum(dim=-2)]
    cutoff = torch.where(last_cutoff > 0, last_cutoff, torch.inf).to(acts.dtype)
    return [torch.minimum(acts, cutoff).square().sum(dim=-2)]


winsorised = ColumnScore(lambda sums: sums.sums[1], _clipped_squares)
r"""$\sum_i \min(a_i, c)^2$, with c the smallest positive activation kept in the previous batch: prefers latents that
exceed c on many tokens to those that exceed it by far on a few.

If that is unknown, c is infinite. `eval/KNOWN_FEATURES.md` says where this score wins."""


def ridge_leverage(acts: Float[Tensor, "*group tokens latents"], n_candidates: int) -> Float[Tensor, "*group latents"]:
    r"""$a^T (A A^T + \lambda I)^{-1} a$: prefers latents that others cannot replace.

    See the paper's open question 1. a is a latent's column of A, which holds at most `LEVERAGE_ROWS` evenly strided
    rows of the batch or group, and $\lambda = \|A\|_F^2 / m$ for a pool of m latents, after Cohen, Musco and Musco
    (arXiv 1511.07263). In [0, 1).
    """
    sketch = acts[..., sketch_rows(acts.shape[-2], acts.device), :]
    gram = sketch @ sketch.mT
    ridge = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / n_candidates
    # A batch in which nothing fires has a zero ridge; the smallest normal number keeps the system solvable.
    ridge = ridge.clamp(min=torch.finfo(acts.dtype).tiny)[..., None, None]
    identity = torch.eye(gram.shape[-1], dtype=acts.dtype, device=acts.device)
    factor = torch.linalg.cholesky_ex(gram + ridge * identity).L  # skips its check, which waits for the device
    return torch.linalg.solve_triangular(factor, sketch, upper=False).square().sum(dim=-2)


def sketch_rows(n_tokens: int, device: torch.device) -> Int[Tensor, " rows"]:
    """The rows that `ridge_leverage` uses: all, or `LEVERAGE_ROWS` evenly strided ones."""
    return torch.linspace(0, n_tokens - 1, min(n_tokens, LEVERAGE_ROWS), device=device).round().long()


def sketch_scores(
    rows_of: Callable[[Tensor], Float[Tensor, "rows latents"]],
    n_own: int,
    n_candidates: int,
    device: torch.device,
    ranks: Ranks,
) -> Float[Tensor, " latents"]:
    """`ridge_leverage` over the whole batch; this rank holds the `n_own` tokens from `rank * n_own` on.

    `rows_of` returns the non-negative activations of this rank's tokens with the given indices.
    """
    rows = sketch_rows(ranks.n_of_all(n_own), device)
    places, own = ranks.own_rows(rows, n_own)
    acts = in_float32(rows_of(own))
    sketch = acts.new_zeros(len(rows), acts.shape[1])
    sketch[places] = acts
    with without_autocast(device):
        return ridge_leverage(ranks.sum(sketch), n_candidates)


SCORES: dict[str, Score] = {
    "l2_norm": l2_norm,
    "squared_l2": squared_l2,
    "entropy": entropy,
    "perplexity": perplexity,
    "frequency": frequency,
    "winsorised": winsorised,
    "ridge_leverage": ridge_leverage,
    "uniform": uniform,
}


@dataclass(frozen=True)
class RegisteredScore:
    """A user's function of whole groups of tokens; its result is checked at every call."""

    name: str
    function: Score
    by_columns: bool

    def __call__(self, acts: Tensor, n_candidates: int) -> Tensor:
        """The score of every latent in every group.

        Raises:
            ValueError: if the result is not of shape `(..., latents)` or contains NaN.
        """
        scores = self.function(acts, n_candidates)
        expected = (*acts.shape[:-2], acts.shape[-1])
        if scores.shape != expected:
            raise ValueError(
                f"score {self.name!r} returned shape {tuple(scores.shape)} for activations of shape "
                f"{tuple(acts.shape)}; it must reduce dimension -2 (the tokens) alone and return {expected}."
            )
        if scores.isnan().any():
            raise ValueError(
                f"score {self.name!r} returned NaN {int(scores.isnan().sum())} times; it must return a "
                "number for every latent, also for one that never fires."
            )
        return scores if scores.is_floating_point() else scores.float()  # counts and masks


def register_score(name: str, score: Score, by_columns: bool = False) -> None:
    """Make `score` available as `SampledTopKTrainingSAEConfig(score=name)`.

    With `by_columns=True` you promise that a latent's score depends on its own activations alone, which makes training
    several times faster (`column_scan.py`). The function must have this module's signature,
    `(acts, n_candidates) -> scores`; for one pool per batch, only a `ColumnScore` works across processes.
    A checkpoint stores only the name: register the score before loading one. Under proportional sampling, scores are
    weights, and negative scores count as 0.

    Raises:
        ValueError: if the name is already registered.
    """
    if name in SCORES:
        raise ValueError(f"score {name!r} is already registered; choose another name.")
    SCORES[name] = score if isinstance(score, ColumnScore) else RegisteredScore(name, score, by_columns)


def goes_by_columns(name: str) -> bool:
    """Whether the score judges each latent by its own activations alone, so that chunks of latents can be scored."""
    score = SCORES[name]
    return isinstance(score, ColumnScore) or (isinstance(score, RegisteredScore) and score.by_columns)


def is_mergeable(name: str) -> bool:
    """Whether scores over a batch can be computed by several processes that each hold part of its tokens."""
    return isinstance(SCORES[name], ColumnScore) or name == "ridge_leverage"


def column_score(name: str) -> ColumnScore:
    """The score, or `l2_norm` if it is not a `ColumnScore`, as norms and which latents fire are needed anyway."""
    score = SCORES[name]
    return score if isinstance(score, ColumnScore) else l2_norm


def column_sums(
    acts: Float[Tensor, "*group tokens latents"], name: str, last_cutoff: Tensor | None = None
) -> ColumnSums:
    """The sums over the given tokens that a score needs, at least in float32."""
    with without_autocast(acts.device):
        return column_score(name).column_sums(in_float32(acts), last_cutoff)


def score_of(
    acts: Float[Tensor, "*group tokens latents"], name: str, n_candidates: int
) -> Float[Tensor, "*group latents"]:
    """The score of every latent in every group, from activations at least in float32."""
    with without_autocast(acts.device):
        return SCORES[name](in_float32(acts), n_candidates)


def in_float32(acts: Tensor) -> Tensor:
    """The activations in float32; float64 stays."""
    return acts.to(torch.promote_types(acts.dtype, torch.float32))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context that disables autocast: scores always have full precision."""
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
