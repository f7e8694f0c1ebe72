"""Is a latent more than its token? How well the token alone predicts where the latent fires.

Rates are learned on one half of the text and tested on the other. What the token alone predicts for the passages on
the page is scored like a reader's answers.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_curve
from torch import Tensor

from latents.places import windows


class TokenRates(NamedTuple):
    """How often a latent fires on each token of the vocabulary, and the thresholds for predicting that it fires."""

    rates: Float[Tensor, " vocabulary"]
    at_places: float
    """Lowest rate of a token on which firing is predicted."""
    in_passages: float
    """Lowest score of a passage (see `passage_scores`) on which firing is predicted."""


def learn(
    tokens: Int[Tensor, "prompts context"], fires: Bool[Tensor, "prompts context"], n_vocabulary: int
) -> TokenRates:
    """Rates on one text, and the thresholds with the best balanced accuracy there; first tokens do not count.

    Every token gets one extra occurrence, on which the latent fires at its overall rate; a token that does not occur
    thus has the overall rate. To set the thresholds, the rate at a place is computed without that place; otherwise a
    token that occurs once would seem to be known.
    """
    overall = fires[:, 1:].double().mean()
    n = torch.bincount(tokens[:, 1:].flatten(), minlength=n_vocabulary)
    n_fired = torch.bincount(tokens[:, 1:][fires[:, 1:]], minlength=n_vocabulary)
    others = (n_fired[tokens] - fires.double() + overall) / n[tokens].clamp(min=1)  # first tokens may not occur again
    return TokenRates(
        rates=(n_fired + overall) / (n + 1),
        at_places=best_threshold(others[:, 1:], fires[:, 1:]),
        in_passages=best_threshold(passage_scores(others), windows(fires).any(dim=2)),
    )


def token_scores(
    known: TokenRates, tokens: Int[Tensor, "prompts context"], fires: Bool[Tensor, "prompts context"]
) -> dict[str, float]:
    """Average precision and balanced accuracy of the token alone on another text."""
    rates, truth = known.rates[tokens[:, 1:]].flatten(), fires[:, 1:].flatten()
    return {
        "token_precision": float(average_precision_score(truth, rates)),
        "token_accuracy": float(balanced_accuracy_score(truth, rates >= known.at_places)),
    }


def passage_scores(rates: Float[Tensor, "prompts context"]) -> Float[Tensor, "prompts passages"]:
    """Probability that the latent fires on some token of a passage, if tokens fire independently at their rates."""
    return 1 - (1 - windows(rates)).prod(dim=2)


def best_threshold(scores: Float[Tensor, "..."], truth: Bool[Tensor, "..."]) -> float:
    """The threshold with the best balanced accuracy: where the true positive rate is furthest above the false one."""
    false_rate, true_rate, thresholds = roc_curve(truth.flatten(), scores.flatten())
    return float(thresholds[(true_rate - false_rate).argmax()])


def commonest(tokens: Int[Tensor, "prompts context"], fires: Bool[Tensor, "prompts context"]) -> tuple[int, float]:
    """The token on which a latent fires most often, and its share of the firings."""
    counts = torch.bincount(tokens[fires])
    return int(counts.argmax()), (counts.max() / counts.sum()).item()
