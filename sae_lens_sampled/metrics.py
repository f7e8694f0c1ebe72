"""Metrics of activations, counts and reconstructions: FVU, L0, density, Gini; at once or over a stream of batches."""

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
N_DECILES = 10


def gini(counts: Num[Tensor, " n"]) -> Tensor:
    """Gini coefficient of non-negative `counts`, in [0, 1 - 1/n], float64, shape ().

    0 if all are equal, 1 - 1/n if one has everything; 0 if all are 0. Over selection counts it measures the "activation
    lottery": how few latents take most of the selections.
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
    of per-token ratios, which tokens close to the mean dominate.
    """
    x, x_hat = x.double(), x_hat.double()
    return (x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum()


def differs(a: float, b: float) -> bool:
    """Whether two non-negative quantities differ by more than a tenth of the larger one."""
    return abs(a - b) > 0.1 * max(a, b)


class ActivationStatistics:
    """Float64 sums over batches, from which `summary` computes its numbers; reconstruction errors are float64 too.

    Memory: a few vectors of length d_sae and d_in, and one integer per token.
    """

    def __init__(self, d_in: int, d_sae: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.double, device=device)

        self.squared_error, self.squares, self.total = zeros(), zeros(), zeros(d_in)
        self.token_error, self.n_varying = zeros(), zeros()
        self.counts, self.mass = zeros(d_sae), zeros(d_sae)
        self.l0: list[Tensor] = []

    @property
    def n_tokens(self) -> int:
        """Tokens seen so far."""
        return sum(map(len, self.l0))

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Share of tokens that each latent is active on."""
        return self.counts / self.n_tokens

    @property
    def fvu(self) -> float:
        """See `fraction_of_variance_unexplained`; the mean is over all tokens so far."""
        variance = self.squares - self.total.square().sum() / self.n_tokens
        return (self.squared_error / variance).item()

    @torch.no_grad()
    def update(
        self, x: Float[Tensor, "tokens d_in"], acts: Float[Tensor, "tokens d_sae"], x_hat: Float[Tensor, "tokens d_in"]
    ) -> None:
        """Add one batch: inputs, latent activations and reconstructions."""
        x, error = x.double(), (x.double() - x_hat.double()).square().sum(dim=1)
        self.squared_error += error.sum()
        self.squares += x.square().sum()
        self.total += x.sum(dim=0)
        variance = (x - x.mean(dim=0)).square().sum(dim=1)
        self.token_error += (error / variance)[variance > 0].sum()  # 0 for the only token of a batch
        self.n_varying += (variance > 0).sum()
        active = acts != 0
        self.counts += active.sum(dim=0, dtype=torch.int32)  # int64, the default, is four times as slow
        # Per batch in float32, or the activations' own type if that is wider: float64 would cost a copy.
        self.mass += acts.abs().sum(dim=0, dtype=torch.promote_types(acts.dtype, torch.float32))
        self.l0.append(active.sum(dim=1).cpu())

    def summary(self) -> dict[str, float | list[float]]:
        r"""The metrics, by name.

        `fvu` is $\sum \|x - \hat x\|^2 / \sum \|x - \bar x\|^2$ with the mean over *all* tokens: 0 is perfect, 1 no
        better than the mean. `fvu_mean_of_tokens` is the mean of per-token ratios, each with its batch's mean and
        without tokens equal to it: the complement of SAEBench's `explained_variance_legacy`; tokens close to that mean
        dominate it. `dead_share`: share of latents that were active on no token. `gini`: Gini coefficient of the
        latents' activation counts.
        `mass_by_density_decile`: shares of the summed |activations| by tenths of the latents, the tenth that fires
        least often first.
        """
        l0 = torch.cat(self.l0).double()
        by_density = self.mass[self.counts.argsort(stable=True)]
        deciles = torch.stack([part.sum() for part in by_density.tensor_split(N_DECILES)])
        return {
            "n_tokens": self.n_tokens,
            "fvu": self.fvu,
            "fvu_mean_of_tokens": (self.token_error / self.n_varying).item(),
            "l0": l0.mean().item(),
            "l0_quantiles": np.quantile(l0.numpy(), QUANTILES).tolist(),  # torch's is limited to 16 million values
            "dead_share": (self.counts == 0).double().mean().item(),
            "gini": gini(self.counts).item(),
            "mass_by_density_decile": (deciles / deciles.sum().clamp(min=torch.finfo(torch.double).tiny)).tolist(),
        }
