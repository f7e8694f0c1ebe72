"""From a training SAE to the JumpReLU SAE that is used, saved, calibrated, evaluated and uploaded."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from sae_lens import logger
from sae_lens.registry import get_sae_class
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAEConfig, TrainingSAE
from sae_lens.saes.transcoder import JumpReLUTranscoder
from torch import Tensor

from sae_lens_sampled.metrics import fraction_of_variance_unexplained
from sae_lens_sampled.sae.checks import check_weights
from sae_lens_sampled.sae.reconstruction import add_skip
from sae_lens_sampled.step.thresholds import SILENT_AFTER_STEPS

if TYPE_CHECKING:
    from sae_lens_sampled.sae.training import SampledTopKTrainingSAE

ExportedSAE = JumpReLUSAE | JumpReLUTranscoder
"""What an SAE, and what a transcoder is exported as."""

METRIC_TOKENS = 256
"""Tokens of a batch on which the export is looked at while training."""


@torch.no_grad()
def to_jumprelu(
    sae: TrainingSAE, thresholds: Float[Tensor, " d_sae"] | None = None, prune: bool = False
) -> ExportedSAE:
    """The inference SAE of a SampledTopK or BatchTopK training SAE, with unit-norm decoder rows. `sae` stays as it is.

    A transcoder becomes a JumpReLU transcoder, with `skip` one with a skip connection.

    Args:
        sae: the training SAE. An activation normalisation that is not folded yet stays in the config.
        thresholds: in units of the training SAE's `hidden_pre`; None for those it has learnt. +inf silences a latent.
        prune: drop the latents that cannot fire. `metadata.kept_latents` then holds the original index of each latent.

    Raises:
        ValueError: if weights are not finite; if `thresholds` (or those learnt) are NaN or negative, or have another
            shape; if pruning would leave nothing.
    """
    check_weights(sae)
    # Cloned: the state dict shares memory with the live weights, and folding works in place.
    state_dict = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state_dict)
    learnt = state_dict["threshold"]
    state_dict["threshold"] = _checked(learnt if thresholds is None else thresholds, sae.cfg.d_sae).to(learnt)
    cfg = sae.cfg.get_inference_config_class().from_dict(sae.cfg.get_inference_sae_cfg_dict())
    exported = _build(cfg, state_dict)
    if not sae.cfg.rescale_acts_by_decoder_norm:
        exported.fold_W_dec_norm()
    return _prune(exported) if prune else exported


def learnt_thresholds(sae: "SampledTopKTrainingSAE") -> Float[Tensor, " d_sae"]:
    """What training has learnt, by the rule of `inference_threshold`, in units of `hidden_pre`.

    Before the first step BatchTopK's threshold, as it is: 0, or what was set.
    """
    n_steps = sae.pool_record.n_steps
    if n_steps == 0:
        warnings.warn(
            "this SAE has taken no training step (of training_forward_pass), so it has learnt no thresholds; all are "
            f"{sae.topk_threshold.item():g}. calibrate_thresholds(sae, activations) sets them from data.",
            stacklevel=4,
        )
        return sae.topk_threshold.repeat(sae.cfg.d_sae)
    if sae.cfg.inference_threshold == "per_latent":
        return sae.rate_matcher.export(n_steps, sae.pool_record.pooled_within(SILENT_AFTER_STEPS))
    # SAELens' running mean starts at 0; without this, the threshold of a short run is far too low.
    correction = 1 - (1 - sae.cfg.topk_threshold_lr) ** n_steps
    return (sae.topk_threshold / correction).repeat(sae.cfg.d_sae)


def export_metrics(sae: "SampledTopKTrainingSAE", sae_in: Tensor) -> dict[str, Callable[[], Tensor]]:
    """L0 and FVU that the exported SAE has on some of a batch; functions, so that they cost nothing unless logged.

    Args:
        sae: the SAE in training.
        sae_in: the training batch, shape (..., d_batch), of which the first `METRIC_TOKENS` are looked at.
    """

    def rows() -> tuple[Tensor, Tensor]:
        shape = sae_in.shape[sae_in.ndim - (2 if sae.hook_z_reshaping_mode else 1) :]
        return sae.inputs_and_targets(sae_in.reshape(-1, *shape)[:METRIC_TOKENS])

    @torch.no_grad()
    def acts_of(x: Tensor) -> Tensor:
        hidden_pre = sae.process_sae_in(x) @ sae.W_enc + sae.b_enc
        if sae.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * sae.W_dec.norm(dim=-1)
        return torch.where(hidden_pre > learnt_thresholds(sae), hidden_pre, 0)

    @torch.no_grad()
    def fvu() -> Tensor:
        x, target = rows()
        reconstruction = add_skip(sae, x, sae.decode(acts_of(x)))
        return fraction_of_variance_unexplained(target.flatten(1), reconstruction.flatten(1))

    return {"export_l0": lambda: (acts_of(rows()[0]) > 0).sum(dim=-1).float().mean(), "export_fvu": fvu}


def _build(cfg: SAEConfig, state_dict: dict[str, Tensor]) -> ExportedSAE:
    """As SAELens loads an SAE: built on the meta device, so that no memory and no random numbers are spent."""
    device, cfg.device = cfg.device, "meta"
    exported = get_sae_class(cfg.architecture())[0](cfg)
    assert isinstance(exported, ExportedSAE)
    exported.load_state_dict(state_dict, assign=True)
    return exported.to(device=device)


def _checked(thresholds: Tensor, d_sae: int) -> Tensor:
    if thresholds.shape != (d_sae,):
        raise ValueError(f"thresholds have shape {tuple(thresholds.shape)}, expected ({d_sae},): one for each latent.")
    n_bad = int((~(thresholds >= 0)).sum())
    if n_bad:
        raise ValueError(f"{n_bad} of {d_sae} thresholds are negative or NaN; use +inf to silence a latent.")
    return thresholds


def _prune(sae: ExportedSAE) -> ExportedSAE:
    kept = sae.threshold.isfinite().nonzero().flatten()
    n_dropped = sae.cfg.d_sae - len(kept)
    if len(kept) == 0:
        raise ValueError(f"none of the {sae.cfg.d_sae} latents can fire, so pruning would leave nothing.")
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
