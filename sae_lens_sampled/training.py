"""The training SAE: the thin shell between the pure functions of this package and SAELens."""

import warnings
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

from sae_lens_sampled.auxiliary import dead_reconstruction, random_rows
from sae_lens_sampled.config import SampledTopKTrainingSAEConfig
from sae_lens_sampled.exact_buffers import pack_buffers, restore_buffers, unpack_buffers
from sae_lens_sampled.export import to_jumprelu
from sae_lens_sampled.pool_record import POOL_STATISTICS, PoolRecord
from sae_lens_sampled.rates import FORGET, RateMatcher
from sae_lens_sampled.restricted import as_coo, reconstruct
from sae_lens_sampled.scores import BY_COLUMNS
from sae_lens_sampled.selection import gumbel_noise, pool_size, sampled_topk
from sae_lens_sampled.step_counts import StepCounts, count_dense, count_restricted

MAX_SHARE_PER_TOKEN = 0.0075
"""Share of the latents in a group's pool, over the tokens of a group, from which on the dense step is as fast: 0.12 in
groups of 16. Each group gathers columns of its own; at d_in 768 a share of 0.10 gained a sixth, 0.195 lost a third. One
pool gains always."""
MIN_GROUP = 16
"""With fewer tokens in a group its columns are gathered for too little work."""


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
        self.n_candidates = pool_size(cfg.k, cfg.pool_factor, cfg.d_sae)
        self.pool_record = PoolRecord(cfg.d_sae, self.W_dec.device)
        self.rate_matcher = RateMatcher(cfg.d_sae, self.W_dec.device)
        self._pool: Tensor | None = None
        self._smallest = self.topk_threshold

    @property
    def latent_threshold(self) -> Tensor:
        """The threshold that each latent would be exported with, float32, shape (d_sae,), in units of `hidden_pre`."""
        return self.rate_matcher.threshold

    @override
    def encode(self, x: Tensor) -> Tensor:
        """Feature activations, shape (..., d_sae). A sampled pool is always the first draw, so this is deterministic.

        Raises:
            ValueError: if `x` is empty or its last dimension is not `d_in`.
        """
        return self.select(x, draw=0)

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
        n_dead = self._check_finite(step_input)
        if self._restricts():
            output = self._restricted_forward_pass(step_input, n_dead)
        else:
            output = super().training_forward_pass(step_input)
            both = (output.feature_acts, output.hidden_pre)
            acts, hidden_pre = (one.detach().reshape(-1, self.cfg.d_sae) for one in both)
            self._record(count_dense(acts, hidden_pre, self.latent_threshold), len(acts))
        output.metrics.update(
            {name: partial(statistic, self.pool_record) for name, statistic in POOL_STATISTICS.items()}
        )
        return output

    def _restricts(self) -> bool:
        """Whether a step can do with the pooled columns, and gains by it."""
        group_size = self.cfg.pool_group_size
        max_share = min(MAX_SHARE_PER_TOKEN * (group_size or 0), 0.5)
        return (
            self.n_candidates < self.cfg.d_sae  # which is BatchTopK, bit for bit
            and (group_size is None or (group_size >= MIN_GROUP and self.n_candidates <= max_share * self.cfg.d_sae))
            and (self.cfg.score in BY_COLUMNS or (self.cfg.score == "ridge_leverage" and group_size is None))
            and not any(hook.fwd_hooks or hook.bwd_hooks for hook in self.hook_dict.values())
        )

    def _restricted_forward_pass(self, step_input: TrainStepInput, n_dead: int) -> TrainStepOutput:
        """The host's forward pass with `restricted.reconstruct` in place of its dense encoder and decoder."""
        sae_in = step_input.sae_in
        self._check_shape(sae_in)
        processed = self.process_sae_in(sae_in)
        x = processed.reshape(-1, self.cfg.d_in)
        weights = (self.W_enc, self.b_enc, self.W_dec)
        found = reconstruct(x, *weights, self.latent_threshold, self.cfg, self.pool_record.n_steps)
        self._pool, sae_out = found.pool, found.reconstruction + self.b_dec
        sae_out = self.run_time_activation_norm_fn_out(sae_out.view(*processed.shape[:-1], -1))
        sae_out = self.reshape_fn_out(sae_out, self.d_head)
        mse_loss = self.mse_loss_fn(sae_out, sae_in).sum(dim=-1).mean()
        auxiliary_loss = self._auxiliary_loss(x, step_input, sae_out, n_dead)
        self.update_topk_threshold(found.kept.values)
        self._record(count_restricted(found, self.latent_threshold), len(x))
        return TrainStepOutput(
            sae_in=sae_in,
            sae_out=sae_out,
            feature_acts=as_coo(found.kept, torch.Size([*processed.shape[:-1], self.cfg.d_sae])),
            hidden_pre=x.new_empty(0),  # nothing of the host reads it
            loss=mse_loss + auxiliary_loss,
            losses={"mse_loss": mse_loss, "auxiliary_reconstruction_loss": auxiliary_loss},
            metrics={"topk_threshold": self.topk_threshold},
        )

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        # SAELens' rule, which asks the device twice whether anything is positive, and does not take COO tensors.
        if acts_topk.numel() == 0:  # k times the tokens is below 1
            self._smallest = torch.full_like(self._smallest, torch.inf)
            return
        parts = acts_topk.flatten().split(2**20)  # of a matrix, what stays in the cache
        self._smallest = torch.stack([torch.where(part > 0, part, torch.inf).amin() for part in parts]).amin()
        smallest, lr = self._smallest.to(self.topk_threshold.dtype), self.cfg.topk_threshold_lr
        moved = (1 - lr) * self.topk_threshold + lr * smallest
        self.topk_threshold = torch.where(smallest.isfinite(), moved, self.topk_threshold)

    @override
    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        if self.cfg.aux_token_fraction == 1 or step_input.dead_neuron_mask is None:
            return super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        x = self.process_sae_in(step_input.sae_in).reshape(-1, self.cfg.d_in)
        n_dead = int(step_input.dead_neuron_mask.sum())
        return {"auxiliary_reconstruction_loss": self._auxiliary_loss(x, step_input, sae_out, n_dead)}

    def _auxiliary_loss(self, x: Tensor, step_input: TrainStepInput, sae_out: Tensor, n_dead: int) -> Tensor:
        """SAELens' auxiliary loss from the dead columns alone; over all tokens, or over a random part of them."""
        if n_dead == 0 or step_input.dead_neuron_mask is None:
            return sae_out.new_zeros(())
        dead = torch.nonzero_static(step_input.dead_neuron_mask, size=n_dead)[:, 0]
        residual = (step_input.sae_in - sae_out).detach().reshape(x.shape)
        if self.cfg.aux_token_fraction < 1:
            draw = self.pool_record.n_steps
            noise = gumbel_noise(self.cfg.pool_seed + 1, draw, 1, len(x))[0]  # a stream of its own
            rows = random_rows(noise, self.cfg.aux_token_fraction)
            x, residual = x[rows], residual[rows]
        norms = self.W_dec[dead].norm(dim=-1).detach() if self.cfg.rescale_acts_by_decoder_norm else None
        width = step_input.sae_in.shape[-1]  # that of a head, where the heads are merged for the encoder
        k_aux = min(width // 2, n_dead)
        weights = (self.W_enc.index_select(1, dead), self.b_enc[dead], self.W_dec.index_select(0, dead))
        squared_error = (dead_reconstruction(x, *weights, norms, k_aux) - residual).square()
        scale = self.cfg.aux_loss_coefficient * min(n_dead / (width // 2), 1.0) * (width / x.shape[1])
        return scale * squared_error.sum(dim=-1).mean()

    def select(self, x: Tensor, draw: int) -> Tensor:
        """Feature activations as training selects them from `x`, shape (..., d_sae); nothing is recorded.

        Args:
            x: activations, all of them one batch.
            draw: number of the random draw of a sampled pool; `encode` always takes draw 0.
        """
        return self._encode(x, torch.full_like(self.pool_record.n_steps, draw))[0]

    def pool_statistics(self) -> dict[str, float]:
        """The pools so far, in numbers; the same that are logged in training. See the README's table."""
        return {name: statistic(self.pool_record).item() for name, statistic in POOL_STATISTICS.items()}

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        pack_buffers(self, state_dict)

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        unpack_buffers(self, state_dict)

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        # Past BatchTopK's own version, which expects its buffer unpacked.
        super(BatchTopKTrainingSAE, self).process_state_dict_for_saving_inference(state_dict)
        for name, _ in self.named_buffers():
            del state_dict[name]
        state_dict["threshold"] = self._inference_threshold().to(self.b_enc.dtype)

    @override
    def save_inference_model(self, path: Path | str) -> tuple[Path, Path]:
        """Save as a JumpReLU SAE, which plain SAELens loads; the decoder rows come out unit-norm."""
        starved = POOL_STATISTICS["starved_share"](self.pool_record).item()
        if starved > 0.5 and self.pool_record.n_steps > 0 and self.cfg.pool_group_size is None:
            warnings.warn(
                f"{starved:.0%} of the latents were never in a pool: with one pool per batch and a small pool_factor "
                f"(here {self.cfg.pool_factor:g}) the pool freezes. pool_group_size=16 lets more latents in.",
                stacklevel=2,
            )
        return to_jumprelu(self).save_model(path)

    @override
    @torch.no_grad()
    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> None:
        super().fold_activation_norm_scaling_factor(scaling_factor)
        if self.cfg.rescale_acts_by_decoder_norm:
            # These too are in units of hidden_pre * W_dec.norm(), as SAELens' own threshold is (its issue #763).
            self.rate_matcher.scale(1 / scaling_factor)
            self.pool_record.cutoff /= scaling_factor

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
        restore_buffers(self, originals)
        return self

    def _encode(self, x: Tensor, draw: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Feature activations, pre-activations and pool; `draw` numbers the random draw of a sampled pool."""
        self._check_shape(x)
        if self.n_candidates == self.cfg.d_sae:
            return *super().encode_with_hidden_pre(x), None
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        kept, pool = sampled_topk(hidden_pre.relu().reshape(-1, self.cfg.d_sae), self.cfg, draw)
        return self.hook_sae_acts_post(kept.view_as(hidden_pre)), hidden_pre, pool

    def _record(self, counts: StepCounts, n_tokens: int) -> None:
        """Update all that a step leaves behind besides gradients."""
        self.pool_record.update(counts.n_selected, self._smallest, self._pool)
        self.rate_matcher.update(
            firing_rate=counts.n_fired / n_tokens,
            selection_rate=counts.n_selected / n_tokens,
            hit_rate=counts.n_hits / n_tokens,
            peak=counts.peak,
            recently_pooled=self.pool_record.pooled_within(FORGET),
            cutoff=self.pool_record.cutoff,
            n_tokens=n_tokens,
            n_steps=self.pool_record.n_steps - 1,
        )
        self._pool = None

    def _inference_threshold(self) -> Tensor:
        """Per latent, shape (d_sae,), in units of `hidden_pre`."""
        n_steps = self.pool_record.n_steps
        if self.cfg.inference_threshold == "per_latent":
            return self.rate_matcher.export(n_steps, self.pool_record.pooled_within(FORGET))
        # SAELens' running mean starts at 0; without this, the threshold of a short run is far too low.
        correction = 1 - (1 - self.cfg.topk_threshold_lr) ** n_steps.clamp(min=1)
        return (self.topk_threshold / correction).expand(self.cfg.d_sae)

    def _check_shape(self, x: Tensor) -> None:
        if x.shape[-1:] != (self.cfg.d_in,) and not self.hook_z_reshaping_mode:
            raise ValueError(f"activations of shape {tuple(x.shape)} do not end in d_in={self.cfg.d_in}.")
        if x.numel() == 0:
            raise ValueError(f"got an empty batch, of shape {tuple(x.shape)}; there is nothing to select from.")

    def _check_finite(self, step_input: TrainStepInput) -> int:
        """Refuse rows that are not finite; the number of dead latents, read from the device together with theirs."""
        bad_rows = ~step_input.sae_in.isfinite().all(dim=-1)
        mask = step_input.dead_neuron_mask
        dead = torch.zeros_like(self.pool_record.n_steps) if mask is None else mask.sum()
        n_bad, n_dead = torch.stack([bad_rows.sum(), dead]).tolist()  # the only wait for the device in a step
        if n_bad:
            raise ValueError(
                f"{n_bad} of {bad_rows.numel()} rows of sae_in are not finite at training step "
                f"{step_input.n_training_steps}; training stopped before any weight was changed. Look for overflow in "
                "the language model (float16?) or exclude the tokens at fault."
            )
        return n_dead
