"""The inference architecture `sampled_topk`: selects batch by batch as in training, without a training SAE."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopKSAE
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import override

from sae_lens_sampled.devices import check_device
from sae_lens_sampled.folders import UNFOLDED, is_export
from sae_lens_sampled.sae.config import SampledTopKSAEConfig
from sae_lens_sampled.sae.exact_buffers import unpack
from sae_lens_sampled.step.selection import sampled_topk


class SampledTopKSAE(TopKSAE):
    """Sampled-SAE with the paper's literal behaviour at inference: pool and cutoff come from the given rows.

    A token's code therefore depends on its batch; the default export, a JumpReLU SAE, has no such dependence.
    `SAE.load_from_disk` and `SAE.from_pretrained` return this class for a *training* checkpoint, whose weights it uses
    unchanged. A sampled pool is always the first draw, so encoding is deterministic. The score "winsorised" is
    "squared_l2" here, for want of a previous batch.
    """

    cfg: SampledTopKSAEConfig  # type: ignore[assignment]

    @override
    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        if self.cfg.n_candidates == self.cfg.d_sae:
            return BatchTopK(self.cfg.k)
        return self._sampled_topk

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        n_steps = state_dict.get("pool_record.n_steps")
        if n_steps is not None:
            self.cfg = self.cfg.fields_after(int(unpack(n_steps, torch.int64)))  # type: ignore[assignment]
            self.activation_fn = self.get_activation_fn()
        for name in [name for name in state_dict if name not in self.state_dict()]:
            if name == "topk_threshold" or name.startswith(("pool_record.", "rate_matcher.", "path_choice.")):
                del state_dict[name]

    def _sampled_topk(self, hidden_pre: Tensor) -> Tensor:
        acts = hidden_pre.relu().reshape(-1, self.cfg.d_sae)
        kept, _ = sampled_topk(acts, self.cfg, torch.zeros((), dtype=torch.int64, device=acts.device))
        return kept.view_as(hidden_pre)


def load_checkpoint(folder: str | Path, device: str = "cpu") -> TrainingSAE:
    """Load the training SAE of a checkpoint folder, with the activation normalisation saved beside it folded in.

    The SAE may have any architecture. Without folding, a checkpoint from the middle of a run whose
    `normalize_activations` is folded in only at its end would be wrong on raw activations.

    Raises:
        ValueError: if the folder holds no readable training checkpoint, or lacks the normalisation it needs, or
            `device` is unavailable.
    """
    folder = Path(folder)
    check_device(device)
    try:
        exported = is_export(folder)
        sae = None if exported else TrainingSAE.load_from_disk(folder, device=device)
    except (OSError, ValueError, SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"no readable training checkpoint in {str(folder)!r}: {error}") from error
    if sae is None:
        raise ValueError(
            f"{str(folder)!r} holds an SAE exported for inference, not a training checkpoint; pass the folder "
            "of a checkpoint. To use the exported SAE, load it with sae_lens.SAE.load_from_disk(folder)."
        )
    if sae.cfg.normalize_activations in UNFOLDED:
        _fold_normalisation(sae, folder)
    return sae


def _fold_normalisation(sae: TrainingSAE, folder: Path) -> None:
    scaler = ActivationScaler()
    if (folder / ACTIVATION_SCALER_CFG_FILENAME).exists():
        scaler.load(folder / ACTIVATION_SCALER_CFG_FILENAME)
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    elif scaler.whitening is not None:
        whitening = scaler.whitening
        sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    else:
        raise ValueError(
            f"{str(folder)!r} was trained with normalize_activations={sae.cfg.normalize_activations!r}, but its "
            f"{ACTIVATION_SCALER_CFG_FILENAME} is missing or empty; without it the SAE cannot be used. Load another "
            "checkpoint."
        )
