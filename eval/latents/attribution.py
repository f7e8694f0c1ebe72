"""Which tokens drive a latent: integrated gradients (Sundararajan et al., arXiv 1703.01365) of its value."""

from dataclasses import dataclass

import torch
from captum.attr import IntegratedGradients
from jaxtyping import Float, Int
from sae_lens.saes.sae import SAE
from torch import Tensor
from transformer_lens import HookedTransformer

N_STEPS = 64
"""Points on the path from the baseline to the text."""


@dataclass(frozen=True)
class Attribution:
    """What each token of a context contributes to a latent's pre-activation at the last token."""

    scores: Float[Tensor, " tokens"]
    """Contribution of each token; the sum is `difference`, up to the integration error."""
    difference: float
    """The latent's pre-activation on the text minus that on the baseline."""

    @property
    def completeness_error(self) -> float:
        """|sum of the scores - difference| over |difference|."""
        return abs(self.scores.sum().item() - self.difference) / abs(self.difference)

    @property
    def own_share(self) -> float:
        """Share of the absolute scores that the last token has, where the latent is active."""
        return (self.scores[-1].abs() / self.scores.abs().sum()).item()

    @property
    def n_tokens(self) -> float:
        """Effective number of tokens: exp of the entropy of the shares in absolute scores; 1 if one token has all."""
        share = self.scores.abs() / self.scores.abs().sum()
        return torch.special.entr(share).sum().exp().item()


def attribute(
    model: HookedTransformer,
    sae: SAE,
    latent: int,
    tokens: Int[Tensor, " tokens"],
    baseline: Float[Tensor, " d_model"],
    n_steps: int = N_STEPS,
) -> Attribution:
    """Attribution of a latent's pre-activation at the last of `tokens`, not of its activation, whose threshold has no
    gradient.

    Args:
        model: the language model; only the blocks up to the SAE's are run.
        sae: an SAE on a block's output.
        latent: index of the latent.
        tokens: a context, with its beginning-of-text token if the model uses one.
        baseline: the embedding that stands for every token of an empty text.
        n_steps: points on the path.
    """
    layer = int(str(sae.cfg.metadata.hook_name).split(".")[1])
    direction, bias = sae.W_enc[:, latent].detach(), sae.b_enc[latent].detach()

    def pre_activation(embeddings: Tensor) -> Tensor:
        states = model(embeddings, start_at_layer=0, stop_at_layer=layer + 1)[:, -1]
        return sae.process_sae_in(states) @ direction + bias

    with torch.no_grad():
        embeddings = model.input_to_embed(tokens[None])[0]
    empty = baseline.expand_as(embeddings)
    gradients = IntegratedGradients(pre_activation)
    scores = gradients.attribute(embeddings, baselines=empty, n_steps=n_steps, internal_batch_size=16)
    with torch.no_grad():
        difference = (pre_activation(embeddings) - pre_activation(empty)).item()
    return Attribution(scores[0].sum(dim=-1).detach(), difference)


def coherence(states: Float[Tensor, "places d_model"], mean: Float[Tensor, " d_model"]) -> float:
    """Mean cosine of the model's states over pairs of places, after subtracting their mean over the text."""
    directions = torch.nn.functional.normalize(states - mean, dim=1)
    cosines = directions @ directions.T
    n = len(states)
    return ((cosines.sum() - n) / (n * (n - 1))).item()
