"""Free functions on activations, counts and decoders."""

import torch
from jaxtyping import Float, Num
from torch import Tensor


def gini(counts: Num[Tensor, " n"]) -> Tensor:
    """Gini coefficient of non-negative `counts`, in [0, 1 - 1/n], float64, shape ().

    0 if all are equal, 1 - 1/n if one has everything; 0 if there is nothing to share. Over selection counts it measures
    the "activation lottery": how few latents take most of the selections.
    """
    ordered = counts.double().sort().values
    n = len(ordered)
    rank = torch.arange(1, n + 1, dtype=torch.double, device=ordered.device)
    total = ordered.sum()
    value = ((2 * rank - n - 1) * ordered).sum() / (n * total)
    return torch.where(total > 0, value, torch.zeros_like(value))


def fraction_of_variance_unexplained(x: Float[Tensor, "tokens d_in"], x_hat: Float[Tensor, "tokens d_in"]) -> Tensor:
    r"""FVU, $\sum \|x - \hat x\|^2 / \sum \|x - \bar x\|^2$ over all tokens, float64, shape (); lower is better.

    0 for a perfect reconstruction, 1 for always predicting the mean, above 1 for worse. One ratio of sums: not the mean
    of per-token ratios, which short vectors dominate.
    """
    x, x_hat = x.double(), x_hat.double()
    return (x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()


def differs(a: float, b: float) -> bool:
    """Whether two quantities that are not negative differ by more than a tenth of the larger one."""
    return abs(a - b) > 0.1 * max(a, b)
