"""How well and how sparsely an SAE reconstructs a stream of activations: FVU, L0, density, and who does the work."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_lens_sampled.metrics import gini

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
N_DECILES = 10


class ActivationStatistics:
    """Sums over batches, in float64, from which all numbers of `summary` come; errors are in float64 from the start.

    Memory: a few vectors of length d_sae and d_in, and one integer per token.
    """

    def __init__(self, d_in: int, d_sae: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.double, device=device)

        self.squared_error, self.squares, self.total = zeros(), zeros(), zeros(d_in)
        self.token_error = zeros()
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

    @torch.no_grad()
    def update(
        self, x: Float[Tensor, "tokens d_in"], acts: Float[Tensor, "tokens d_sae"], x_hat: Float[Tensor, "tokens d_in"]
    ) -> None:
        """Add one batch: inputs, latent activations and reconstructions."""
        x, error = x.double(), (x.double() - x_hat.double()).square().sum(dim=1)
        self.squared_error += error.sum()
        self.squares += x.square().sum()
        self.total += x.sum(dim=0)
        self.token_error += (error / (x - x.mean(dim=0)).square().sum(dim=1)).sum()
        active = acts != 0
        self.counts += active.sum(dim=0, dtype=torch.int32)  # in int64, the default, four times as slow
        self.mass += acts.abs().sum(dim=0)  # of one batch in the activations' own type: doubles would cost a copy
        self.l0.append(active.sum(dim=1).cpu())

    def summary(self) -> dict[str, float | list[float]]:
        r"""The numbers, by name.

        `fvu` is $\sum \|x - \hat x\|^2 / \sum \|x - \bar x\|^2$ with the mean over *all* tokens: 0 is perfect, 1 no
        better than the mean. `fvu_mean_of_tokens` is the mean of per-token ratios, each with its batch's mean: the
        complement of SAEBench's `explained_variance_legacy`; short vectors dominate it. `dead_share`: latents that were
        active on no token. `gini`: of the latents' activation counts. `mass_by_density_decile`: shares of the summed
        |activations|, of the tenth of latents that fire least often first.
        """
        variance = self.squares - self.total.square().sum() / self.n_tokens
        l0 = torch.cat(self.l0).double()
        by_density = self.mass[self.counts.argsort(stable=True)]
        deciles = torch.stack([part.sum() for part in by_density.tensor_split(N_DECILES)])
        return {
            "n_tokens": self.n_tokens,
            "fvu": (self.squared_error / variance).item(),
            "fvu_mean_of_tokens": (self.token_error / self.n_tokens).item(),
            "l0": l0.mean().item(),
            "l0_quantiles": np.quantile(l0.numpy(), QUANTILES).tolist(),  # torch's takes 16 million values at most
            "dead_share": (self.counts == 0).double().mean().item(),
            "gini": gini(self.counts).item(),
            "mass_by_density_decile": (deciles / deciles.sum().clamp(min=torch.finfo(torch.double).tiny)).tolist(),
        }
