"""What activations must be before anything is computed from them; errors say how many are at fault, and where."""

import torch
from sae_lens.saes.sae import TrainingSAE, TrainStepInput
from torch import Tensor


def check_shape(sae: TrainingSAE, x: Tensor) -> None:
    """Refuse activations of another width, and an empty batch.

    Raises:
        ValueError: with the shape.
    """
    if x.shape[-1:] != (sae.cfg.d_in,) and not sae.hook_z_reshaping_mode:
        raise ValueError(f"activations of shape {tuple(x.shape)} do not end in d_in={sae.cfg.d_in}.")
    if x.numel() == 0:
        raise ValueError(f"got an empty batch, of shape {tuple(x.shape)}; there is nothing to select from.")


def check_finite(step_input: TrainStepInput) -> int:
    """Refuse rows that are not finite; the number of dead latents, read from the device together with theirs.

    Raises:
        ValueError: with the number of rows and the step.
    """
    bad_rows = ~step_input.sae_in.isfinite().all(dim=-1)
    mask = step_input.dead_neuron_mask
    dead = torch.zeros((), dtype=torch.int64, device=bad_rows.device) if mask is None else mask.sum()
    n_bad, n_dead = torch.stack([bad_rows.sum(), dead]).tolist()  # the only wait for a GPU in a step
    if n_bad:
        raise ValueError(
            f"{n_bad} of {bad_rows.numel()} rows of sae_in are not finite at training step "
            f"{step_input.n_training_steps}; training stopped before any weight was changed. Look for overflow in "
            "the language model (float16?) or exclude the tokens at fault."
        )
    return n_dead
