"""State of a training SAE besides its weights: how it is kept, saved, folded, loaded, and exported."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import Self, override

from sae_lens_sampled.metrics import fraction_of_variance_unexplained
from sae_lens_sampled.sae.checks import check_same_weights, check_shape
from sae_lens_sampled.sae.config import SampledTopKTrainingSAEConfig
from sae_lens_sampled.sae.exact_buffers import pack_buffers, restore_buffers, unpack_buffers
from sae_lens_sampled.sae.export import to_jumprelu
from sae_lens_sampled.sae.path_choice import PathChoice
from sae_lens_sampled.sae.reconstruction import add_skip
from sae_lens_sampled.step.pool_record import POOL_STATISTICS, PoolRecord
from sae_lens_sampled.step.selection import PoolFields
from sae_lens_sampled.step.sparse_codes import Weights
from sae_lens_sampled.step.thresholds import SILENT_AFTER_STEPS, RateMatcher

METRIC_TOKENS = 256
"""Number of tokens of a batch on which the export is evaluated during training."""


class RecordedSAE(BatchTopKTrainingSAE):
    """A BatchTopK training SAE with a record of its pools and rate-matched thresholds; see `training.py`."""

    cfg: SampledTopKTrainingSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: SampledTopKTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.pool_record = PoolRecord(cfg.d_sae, self.W_dec.device)
        self.rate_matcher = RateMatcher(cfg.d_sae, self.W_dec.device)
        self.path_choice = PathChoice(self.W_dec.device)
        # Cost of finding kept entries so far; it concerns speed only, so it is not saved.
        self.scan_record = {"second_scans": 0, "dense_steps": 0, "extracted_per_kept": 0.0, "recomputed_per_kept": 0.0}

    @property
    def latent_threshold(self) -> Tensor:
        """Running rate-matched threshold of each latent, float32, shape (d_sae,), in units of `hidden_pre`."""
        return self.rate_matcher.threshold

    def pool_fields(self) -> PoolFields:
        """The fields that choose the pool after the steps so far; waits for the device if `pool_steps` is set."""
        return self.cfg if self.cfg.pool_steps is None else self.cfg.fields_after(int(self.pool_record.n_steps))

    def weights(self) -> Weights:
        """Encoder and decoder weights, with gradient."""
        norms = self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None
        return Weights(self.W_enc, self.b_enc, self.W_dec, norms)

    def inputs_and_targets(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a training batch, shape (..., d_in): the batch itself as both.

        Raises:
            ValueError: if it is empty or has the wrong width.
        """
        check_shape(self, batch)
        return batch, batch

    def pool_statistics(self) -> dict[str, float]:
        """Statistics of the pools so far, as logged in training; docs/training.md explains them."""
        of_pools = {name: statistic(self.pool_record).item() for name, statistic in POOL_STATISTICS.items()}
        return of_pools | self.scan_record

    def learnt_thresholds(self) -> Float[Tensor, " d_sae"]:
        """Thresholds learnt in training, by the rule of `inference_threshold`, in units of `hidden_pre`.

        With "per_latent", +inf for latents that have left the pools or were practically never selected. Before the
        first step, warns and returns the initial thresholds: 0, or those that `from_batchtopk` took over.
        """
        n_steps = self.pool_record.n_steps
        if n_steps == 0:
            warnings.warn(
                "this SAE has taken no training step (no call of training_forward_pass), so no thresholds are learnt: "
                f"all are at most {self.latent_threshold.max().item():g}. Train it, or use calibrate_thresholds.",
                stacklevel=4,
            )
            return self.latent_threshold.clone()
        if self.cfg.inference_threshold == "per_latent":
            return self.rate_matcher.export(n_steps, self.pool_record.pooled_within(SILENT_AFTER_STEPS))
        # SAELens' running mean starts at 0; without the correction, the threshold of a short run is far too low.
        correction = 1 - (1 - self.cfg.topk_threshold_lr) ** n_steps
        return (self.topk_threshold / correction).repeat(self.cfg.d_sae)

    def export_metrics(self, sae_in: Tensor) -> dict[str, Callable[[], Tensor]]:
        """L0 and FVU of the exported SAE on part of a batch, as functions, so that they cost nothing unless logged.

        Args:
            sae_in: the training batch, shape (..., d_batch); the first `METRIC_TOKENS` tokens are used.
        """

        def rows() -> tuple[Tensor, Tensor]:
            shape = sae_in.shape[sae_in.ndim - (2 if self.hook_z_reshaping_mode else 1) :]
            return self.inputs_and_targets(sae_in.reshape(-1, *shape)[:METRIC_TOKENS])

        @torch.no_grad()
        def acts_of(x: Tensor) -> Tensor:
            hidden_pre = self.weights().hidden_pre(self.process_sae_in(x))
            return torch.where(hidden_pre > self.learnt_thresholds(), hidden_pre, 0)

        @torch.no_grad()
        def fvu() -> Tensor:
            x, target = rows()
            reconstruction = add_skip(self, x, self.decode(acts_of(x)))
            return fraction_of_variance_unexplained(target.flatten(1), reconstruction.flatten(1))

        return {"export_l0": lambda: (acts_of(rows()[0]) > 0).sum(dim=-1).float().mean(), "export_fvu": fvu}

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()  # a step may have laid it out by latent
        pack_buffers(self, state_dict)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        unpack_buffers(self, state_dict)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        # Skips BatchTopK's own version, which expects its buffer unpacked.
        super(BatchTopKTrainingSAE, self).process_state_dict_for_saving_inference(state_dict)
        for name, _ in self.named_buffers():
            del state_dict[name]
        state_dict["threshold"] = self.learnt_thresholds().to(self.b_enc.dtype)

    @override
    def save_inference_model(self, path: Path | str) -> tuple[Path, Path]:
        """Save as a JumpReLU SAE or transcoder that plain SAELens loads, with unit-norm decoder rows."""
        starved = POOL_STATISTICS["starved_share"](self.pool_record).item()
        if starved > 0.5 and self.pool_record.n_steps > 0 and self.cfg.pool_group_size is None:
            warnings.warn(
                f"{starved:.0%} of the latents were never in a pool: with one pool per batch, a small pool_factor "
                f"(here {self.cfg.pool_factor}) keeps them out. pool_group_size=16 lets more latents in.",
                stacklevel=2,
            )
        return to_jumprelu(self).save_model(path)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        self.pool_record.input_norm /= scaling_factor
        if self.cfg.rescale_acts_by_decoder_norm:
            # These too are in units of hidden_pre * W_dec.norm(), as SAELens' own threshold is (its issue #763).
            self.rate_matcher.scale(1 / scaling_factor)
            self.pool_record.cutoff /= scaling_factor

    @override
    @torch.no_grad()
    def fold_activation_whitening(self, *args: Any, **kwargs: Any) -> None:
        super().fold_activation_whitening(*args, **kwargs)
        self.pool_record.input_norm.zero_()  # the norm of whitened inputs says nothing about raw ones

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Load weights and buffers of a checkpoint; ValueError if it is missing, truncated, or does not fit."""
        check_same_weights(Path(checkpoint_path), self.cfg.to_dict())
        try:
            super().load_weights_from_checkpoint(checkpoint_path)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"no readable checkpoint in {str(checkpoint_path)!r}: {error}") from error

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        originals = dict(self.named_buffers())
        super()._apply(fn, recurse)
        restore_buffers(self, originals)
        return self
