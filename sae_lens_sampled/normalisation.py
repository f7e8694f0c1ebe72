"""Activation normalisations that must be folded into an SAE's weights before it takes activations as they are."""

UNFOLDED = ("expected_average_only_in", "covariance_whitening")
"""Values of SAELens' `normalize_activations`."""


def check_folded(normalize_activations: str | None, name: str) -> None:
    """Refuse the SAE called `name` in the message if its normalisation is not folded yet.

    Raises:
        ValueError: with the way to fold it.
    """
    if normalize_activations in UNFOLDED:
        raise ValueError(
            f"{name} has normalize_activations={normalize_activations!r}, which is not folded into its weights yet, so "
            "its reconstructions would be wrong; sae_lens_sampled.load_checkpoint(folder) folds it."
        )
