"""Scores: how much a latent deserves a place in the candidate pool, judged over one batch.

A score is a function `(acts, n_candidates) -> scores`. `acts` has shape `(..., tokens, latents)`, is non-negative and
at least float32; `scores` has shape `(..., latents)`, the higher the better. Leading dimensions are pool groups.
`n_candidates` is the number of latents that will be taken; most scores ignore it.

The three scores of the paper (arXiv 2508.21324) are `l2_norm`, `squared_l2` and `entropy`. With a deterministic pool
`l2_norm` and `squared_l2` choose the same latents, since squaring keeps the order; they differ only under
`pool_sampling="proportional"`. And a plain L2 norm ranks a latent that is 100 on 5 % of the tokens (22.4 sqrt(B))
above one that is 10 on 50 % of them (7.1 sqrt(B)): to prefer the consistent one take `perplexity` or `frequency`.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

Score: TypeAlias = Callable[[Tensor, int], Tensor]

LEVERAGE_ROWS = 256
"""Rows of the sketch that `ridge_leverage` works on; its cost grows with the square of this number."""


def l2_norm(acts: Float[Tensor, "*group tokens latents"], n_candidates: int) -> Float[Tensor, "*group latents"]:
    r"""$\sqrt{\sum_i a_i^2}$: prefers latents that carry much of the batch."""
    del n_candidates
    return acts.square().sum(dim=-2).sqrt()  # over a middle dimension vector_norm takes ten times as long on a CPU


def squared_l2(acts: Float[Tensor, "*group tokens latents"], n_candidates: int) -> Float[Tensor, "*group latents"]:
    r"""$\sum_i a_i^2$: the order of `l2_norm`; in a sampled pool it concentrates on the largest."""
    del n_candidates
    return acts.square().sum(dim=-2)


def entropy(acts: Float[Tensor, "*group tokens latents"], n_candidates: int) -> Float[Tensor, "*group latents"]:
    r"""$1 - H(p) / \log B$ with $p = a / \sum a$: prefers specialised latents, whose mass lies on few tokens.

    In [0, 1]; 0 for a latent that never fires, and for every latent if there is only one token.
    """
    del n_candidates
    n_tokens = acts.shape[-2]
    if n_tokens == 1:
        return acts.new_zeros((*acts.shape[:-2], acts.shape[-1]))
    log_n_tokens = torch.tensor(float(n_tokens), dtype=acts.dtype).log().item()
    concentration = (1 - _shannon_entropy(acts) / log_n_tokens).clamp(min=0)
    return torch.where(acts.amax(dim=-2) > 0, concentration, 0)


def perplexity(acts: Float[Tensor, "*group tokens latents"], n_candidates: int) -> Float[Tensor, "*group latents"]:
    r"""$\exp H(p)$ with $p = a / \sum a$: prefers consistent latents; the effective number of tokens one fires on."""
    del n_candidates
    return torch.where(acts.amax(dim=-2) > 0, _shannon_entropy(acts).exp(), 0)


def frequency(acts: Float[Tensor, "*group tokens latents"], n_candidates: int) -> Float[Tensor, "*group latents"]:
    """Number of tokens on which the latent is positive: prefers consistent latents, blind to their size."""
    del n_candidates
    return (acts > 0).sum(dim=-2).to(acts.dtype)


def ridge_leverage(acts: Float[Tensor, "*group tokens latents"], n_candidates: int) -> Float[Tensor, "*group latents"]:
    r"""$a^T (A A^T + \lambda I)^{-1} a$: prefers latents that no others can replace.

    The paper's open question 1. A holds at most `LEVERAGE_ROWS` evenly strided rows of the batch, and
    $\lambda = \|A\|_F^2 / m$ for a pool of m latents, after Cohen, Musco and Musco (arXiv 1511.07263). In [0, 1).
    """
    sketch = acts[..., sketch_rows(acts.shape[-2], acts.device), :]
    gram = sketch @ sketch.mT
    ridge = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1) / n_candidates
    # A batch in which nothing fires has a zero ridge; the smallest normal number keeps the system solvable.
    ridge = ridge.clamp(min=torch.finfo(acts.dtype).tiny)[..., None, None]
    identity = torch.eye(gram.shape[-1], dtype=acts.dtype, device=acts.device)
    factor = torch.linalg.cholesky_ex(gram + ridge * identity).L  # without its check, which waits for the device
    return torch.linalg.solve_triangular(factor, sketch, upper=False).square().sum(dim=-2)


def sketch_rows(n_tokens: int, device: torch.device) -> Int[Tensor, " rows"]:
    """The rows that `ridge_leverage` looks at: all, or `LEVERAGE_ROWS` evenly strided ones."""
    return torch.linspace(0, n_tokens - 1, min(n_tokens, LEVERAGE_ROWS), device=device).round().long()


def uniform(acts: Float[Tensor, "*group tokens latents"], n_candidates: int) -> Float[Tensor, "*group latents"]:
    """1 for every latent that fires: the control, a pool chosen blindly. Only for proportional sampling."""
    del n_candidates
    return (acts.amax(dim=-2) > 0).to(acts.dtype)


SCORES: dict[str, Score] = {
    "l2_norm": l2_norm,
    "squared_l2": squared_l2,
    "entropy": entropy,
    "perplexity": perplexity,
    "frequency": frequency,
    "ridge_leverage": ridge_leverage,
    "uniform": uniform,
}


BY_COLUMNS = {"l2_norm", "squared_l2", "entropy", "perplexity", "frequency", "uniform"}
"""Scores that judge each latent by its own activations: the fast training step hands them some latents at a time."""


def register_score(name: str, score: Score, by_columns: bool = False) -> None:
    """Make `score` available as `SampledTopKTrainingSAEConfig(score=name)`.

    With `by_columns=True` you promise that a latent's score depends on its own activations alone, which makes training
    several times faster (`column_scan.py`). The function must have this module's signature,
    `(acts, n_candidates) -> scores`; its result is checked at every call.
    A checkpoint stores only the name: register the score before loading one. Under proportional sampling a score is a
    weight, and what is below 0 counts as 0.

    Raises:
        ValueError: if the name is taken. When called: if the result has another shape than `(..., latents)` or NaN.
    """
    if name in SCORES:
        raise ValueError(f"score {name!r} is already registered; choose another name.")

    def checked(acts: Tensor, n_candidates: int) -> Tensor:
        scores = score(acts, n_candidates)
        expected = (*acts.shape[:-2], acts.shape[-1])
        if scores.shape != expected:
            raise ValueError(
                f"score {name!r} returned shape {tuple(scores.shape)} for activations of shape {tuple(acts.shape)}; "
                f"it must reduce dimension -2 (the tokens) alone and return {expected}."
            )
        if scores.isnan().any():
            raise ValueError(f"score {name!r} returned NaN for {int(scores.isnan().sum())} latents.")
        return scores

    SCORES[name] = checked
    if by_columns:
        BY_COLUMNS.add(name)


def _shannon_entropy(acts: Tensor) -> Tensor:
    """H(a / sum a) over the tokens, in nats; 0 for a latent that never fires.

    Scaled by the largest activation first: sums of squares of very small or large activations would leave the range.
    """
    share = acts / acts.amax(dim=-2, keepdim=True).clamp(min=torch.finfo(acts.dtype).tiny)
    total = share.sum(dim=-2).clamp(min=torch.finfo(acts.dtype).tiny)
    return (total.log() - torch.special.xlogy(share, share).sum(dim=-2) / total).clamp(min=0)
