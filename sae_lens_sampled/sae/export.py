"""Export of a training SAE as the JumpReLU SAE that is used, saved, evaluated and uploaded."""

import torch
from jaxtyping import Float
from sae_lens import logger
from sae_lens.registry import get_sae_class
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAEConfig, TrainingSAE
from sae_lens.saes.transcoder import JumpReLUTranscoder
from torch import Tensor

from sae_lens_sampled.sae.checks import check_weights

ExportedSAE = JumpReLUSAE | JumpReLUTranscoder
"""Class of an exported SAE, and of an exported transcoder."""


@torch.no_grad()
def to_jumprelu(
    sae: TrainingSAE, thresholds: Float[Tensor, " d_sae"] | None = None, prune: bool = False
) -> ExportedSAE:
    """Export a SampledTopK, BatchTopK or Matryoshka training SAE, with unit-norm decoder rows; `sae` is unchanged.

    A transcoder becomes a JumpReLU transcoder, with a skip connection if it has `skip`.

    Args:
        sae: the training SAE. An activation normalisation that is not folded yet stays in the config.
        thresholds: in units of the training SAE's `hidden_pre`; None for the learnt ones. +inf silences a latent.
        prune: drop the latents with an infinite threshold. `metadata.kept_latents` then holds the original indices of
            the others.

    Raises:
        ValueError: if weights are not finite; if thresholds, given or learnt, are NaN or negative, or have the wrong
            shape; if pruning would leave nothing.
    """
    check_weights(sae)
    # Cloned: the state dict shares memory with the live weights, and folding works in place.
    state_dict = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state_dict)
    learnt = state_dict["threshold"]
    if thresholds is None:
        _check_thresholds(learnt, sae.cfg.d_sae, " learnt in training", "take another checkpoint")
    else:
        _check_thresholds(thresholds, sae.cfg.d_sae, "", "use +inf to silence a latent")
        state_dict["threshold"] = thresholds.to(learnt)
    cfg = sae.cfg.get_inference_config_class().from_dict(sae.cfg.get_inference_sae_cfg_dict())
    exported = _build(cfg, state_dict)
    if not sae.cfg.rescale_acts_by_decoder_norm:
        exported.fold_W_dec_norm()
    return _prune(exported) if prune else exported


def _build(cfg: SAEConfig, state_dict: dict[str, Tensor]) -> ExportedSAE:
    """Build an SAE as SAELens loads one: on the meta device, without extra memory or random numbers."""
    device, cfg.device = cfg.device, "meta"
    exported = get_sae_class(cfg.architecture())[0](cfg)
    assert isinstance(exported, ExportedSAE)
    exported.load_state_dict(state_dict, assign=True)
    return exported.to(device=device)


def _check_thresholds(thresholds: Tensor, d_sae: int, origin: str, way_out: str) -> None:
    if thresholds.shape != (d_sae,):
        raise ValueError(f"thresholds have shape {tuple(thresholds.shape)}, expected ({d_sae},): one for each latent.")
    n_bad = int((~(thresholds >= 0)).sum())
    if n_bad:
        raise ValueError(f"{n_bad} of {d_sae} thresholds{origin} are negative or NaN; {way_out}.")


def _prune(sae: ExportedSAE) -> ExportedSAE:
    kept = sae.threshold.isfinite().nonzero().flatten()
    n_dropped = sae.cfg.d_sae - len(kept)
    if len(kept) == 0:
        raise ValueError(
            f"none of the {sae.cfg.d_sae} latents can fire, so pruning would leave nothing; export with prune=False."
        )
    logger.warning(f"pruning drops {n_dropped} of {sae.cfg.d_sae} latents, which cannot fire")
    state_dict = sae.state_dict() | {
        "W_enc": sae.W_enc[:, kept].contiguous(),
        "W_dec": sae.W_dec[kept],
        "b_enc": sae.b_enc[kept],
        "threshold": sae.threshold[kept],
    }
    cfg = type(sae.cfg).from_dict({**sae.cfg.to_dict(), "d_sae": len(kept)})
    cfg.metadata.kept_latents = kept.tolist()
    cfg.metadata.unpruned_d_sae = sae.cfg.d_sae
    return _build(cfg, state_dict)
