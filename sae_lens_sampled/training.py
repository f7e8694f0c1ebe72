"""The training SAE: the thin shell between the pure functions of this package and SAELens."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import override

from sae_lens_sampled import exact_buffers, selection
from sae_lens_sampled.config import SampledTopKTrainingSAEConfig
from sae_lens_sampled.pool_record import POOL_STATISTICS, PoolRecord


class SampledTopKTrainingSAE(BatchTopKTrainingSAE):
    r"""BatchTopK inside a candidate pool that every batch chooses anew (Sampled-SAE, arXiv 2508.21324).

    For activations $z = \mathrm{relu}(x W_{enc} + b_{enc})$ of B tokens (times the decoder norms, if these rescale):
    score every latent over the batch, keep the best `k * pool_factor` as candidates, keep the `int(k * B)` largest
    entries among these, and reconstruct from them. With all latents as candidates this is SAELens' BatchTopK, bit for
    bit: the same code runs.

    Like BatchTopK, `encode` selects over all rows that it is given, so a token's code depends on its batch.
    """

    cfg: SampledTopKTrainingSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: SampledTopKTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.n_candidates = selection.pool_size(cfg.k, cfg.pool_factor, cfg.d_sae)
        self.pool_record = PoolRecord(cfg.d_sae, self.W_dec.device)
        self._pool: Tensor | None = None

    @override
    def encode(self, x: Tensor) -> Tensor:
        """Feature activations, shape (..., d_sae). A sampled pool is always the first draw, so this is deterministic.

        Raises:
            ValueError: if `x` is empty or its last dimension is not `d_in`.
        """
        return self._encode(x, torch.zeros_like(self.pool_record.n_steps))[0]

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Feature activations and pre-activations as in this training step, both of shape (..., d_sae).

        Raises:
            ValueError: if `x` is empty or its last dimension is not `d_in`.
        """
        feature_acts, hidden_pre, self._pool = self._encode(x, self.pool_record.n_steps)
        return feature_acts, hidden_pre

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One forward pass, which also updates the threshold and the pool record.

        Raises:
            ValueError: if `sae_in` is empty, has another width or non-finite rows; nothing has been changed then.
        """
        self._check_finite(step_input)
        output = super().training_forward_pass(step_input)
        self.pool_record.update(output.feature_acts.flatten(end_dim=-2), self._pool)
        self._pool = None
        output.metrics.update(
            {name: partial(statistic, self.pool_record) for name, statistic in POOL_STATISTICS.items()}
        )
        return output

    def pool_statistics(self) -> dict[str, float]:
        """The pools so far, in numbers; the same that are logged in training. See the README's table."""
        return {name: statistic(self.pool_record).item() for name, statistic in POOL_STATISTICS.items()}

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        exact_buffers.pack_buffers(self, state_dict)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        exact_buffers.unpack_buffers(self, state_dict)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        # Past BatchTopK's own version, which expects its buffer unpacked.
        super(BatchTopKTrainingSAE, self).process_state_dict_for_saving_inference(state_dict)
        for name, _ in self.named_buffers():
            del state_dict[name]
        state_dict["threshold"] = torch.full_like(self.b_enc, self.topk_threshold.item())

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Weights and all buffers of a training checkpoint, into this SAE.

        Raises:
            ValueError: if the file is missing, truncated, or of another architecture or size.
        """
        try:
            super().load_weights_from_checkpoint(checkpoint_path)
        except (SafetensorError, FileNotFoundError) as error:
            raise ValueError(f"no readable checkpoint in {str(checkpoint_path)!r}: {error}") from error

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SampledTopKTrainingSAE":
        originals = dict(self.named_buffers())
        super()._apply(fn, recurse)
        exact_buffers.restore_buffers(self, originals)
        return self

    def _encode(self, x: Tensor, draw: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Feature activations, pre-activations and pool; `draw` numbers the random draw of a sampled pool."""
        self._check_shape(x)
        if self.n_candidates == self.cfg.d_sae:
            return *super().encode_with_hidden_pre(x), None
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        acts = hidden_pre.relu().reshape(-1, self.cfg.d_sae)
        pool = self._choose_pool(acts, draw)
        kept = selection.keep_top_entries(acts, pool, int(self.cfg.k * len(acts)), self.cfg.pool_group_size)
        return self.hook_sae_acts_post(kept.view_as(hidden_pre)), hidden_pre, pool

    def _choose_pool(self, acts: Tensor, draw: Tensor) -> Tensor:
        cfg = self.cfg
        statistics = selection.column_statistics(acts.detach(), cfg.score, self.n_candidates, cfg.pool_group_size)
        if cfg.pool_sampling == "proportional":
            statistics = selection.perturb_scores(statistics, cfg.pool_seed, draw)
        return selection.candidate_pool(statistics, self.n_candidates)

    def _check_shape(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.cfg.d_in,):
            raise ValueError(f"activations of shape {tuple(x.shape)} do not end in d_in={self.cfg.d_in}.")
        if x.numel() == 0:
            raise ValueError(f"got an empty batch, of shape {tuple(x.shape)}; there is nothing to select from.")

    def _check_finite(self, step_input: TrainStepInput) -> None:
        n_bad = int((~step_input.sae_in.isfinite()).any(dim=-1).sum())
        if n_bad:
            raise ValueError(
                f"{n_bad} of {step_input.sae_in[..., 0].numel()} rows of sae_in are not finite at training step "
                f"{step_input.n_training_steps}; training stopped before any weight was changed. Look for overflow in "
                "the language model (float16?) or exclude the tokens at fault."
            )
