"""The training SAE: the thin shell between the pure functions of this package and SAELens."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import override

from sae_lens_sampled.sae.checks import (
    check_finite,
    check_groups,
    check_loss,
    check_same_weights,
    check_shape,
    warn_if_alone,
)
from sae_lens_sampled.sae.config import SampledTopKTrainingSAEConfig
from sae_lens_sampled.sae.exact_buffers import pack_buffers, restore_buffers, unpack_buffers
from sae_lens_sampled.sae.export import export_metrics, learnt_thresholds, to_jumprelu
from sae_lens_sampled.sae.gradient_sum import GradientSum, join_group
from sae_lens_sampled.sae.reconstruction import add_skip
from sae_lens_sampled.step.auxiliary import auxiliary_loss, dead_latents
from sae_lens_sampled.step.kept_entries import StepPath, choose_path, kept_step
from sae_lens_sampled.step.pool_record import POOL_STATISTICS, PoolRecord
from sae_lens_sampled.step.ranks import ALONE, largest_of_ranks
from sae_lens_sampled.step.selection import sampled_topk
from sae_lens_sampled.step.sparse_codes import Weights, as_coo
from sae_lens_sampled.step.thresholds import SILENT_AFTER_STEPS, RateMatcher, StepCounts, count_dense, counts_of_all

STEP_METHODS = ("encode", "encode_with_hidden_pre", "decode", "calculate_aux_loss")
"""Methods that a step on the kept entries does not call; where a subclass has its own the dense path runs."""


class SampledTopKTrainingSAE(BatchTopKTrainingSAE):
    r"""BatchTopK inside a candidate pool that every batch chooses anew (Sampled-SAE, arXiv 2508.21324).

    For activations $z = \mathrm{relu}(x W_{enc} + b_{enc})$ of B tokens (times the decoder norms, if these rescale):
    score every latent over the batch, keep the best `k * pool_factor` as candidates, keep the `int(k * B)` largest
    entries among these, and reconstruct from them. With all latents as candidates this is SAELens' BatchTopK; with
    `step="dense"` bit for bit, since the same code runs. With `matryoshka_widths` the inner widths have losses of
    their own, from the same kept entries: with all latents as candidates this is SAELens' Matryoshka BatchTopK.

    Like BatchTopK, `encode` selects over all rows that it is given, so a token's code depends on its batch.
    """

    cfg: SampledTopKTrainingSAEConfig  # type: ignore[assignment]

    def __init__(self, cfg: SampledTopKTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.pool_record = PoolRecord(cfg.d_sae, self.W_dec.device)
        self.rate_matcher = RateMatcher(cfg.d_sae, self.W_dec.device)
        # What extraction has cost so far; it matters for speed alone, so it is not saved.
        self.scan_record = {"second_scans": 0, "dense_steps": 0, "extracted_per_kept": 0.0}
        self._pool, self._path = None, ""  # of the latest step; the host's forward pass has no place for the pool
        # The processes that train it, those that a forward pass is one of all of, and what sums their gradients.
        self._all_ranks, self._ranks, self._gradient_sum = ALONE, ALONE, None
        self._is_first_step = True

    @property
    def latent_threshold(self) -> Tensor:
        """The threshold that each latent would be exported with, float32, shape (d_sae,), in units of `hidden_pre`."""
        return self.rate_matcher.threshold

    @override
    def encode(self, x: Tensor) -> Tensor:
        """Feature activations, shape (..., d_sae); deterministic, since a sampled pool is always the first draw."""
        return self.select(x, draw=0)

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Feature activations and pre-activations as in this training step, both of shape (..., d_sae)."""
        feature_acts, hidden_pre, self._pool = self._encode(x, self.pool_record.n_steps)
        return feature_acts, hidden_pre

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One forward pass, which also updates the threshold and the pool record.

        Raises:
            ValueError: if `sae_in` is empty, has another width or non-finite rows, before anything is changed; if the
                loss is not finite at a step that logs.
        """
        self._ranks = self._all_ranks
        try:
            return self._training_forward_pass(step_input)
        finally:
            self._ranks = ALONE  # `encode` is of the process that calls it

    def _training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        ranks = self._ranks
        if ranks.count > 1 and step_input.dead_neuron_mask is not None:
            # A latent is dead if it has fired on no rank for long enough.
            mask = ranks.min(step_input.dead_neuron_mask).bool()
            step_input = dataclasses.replace(step_input, dead_neuron_mask=mask)
        if self._gradient_sum is not None:
            self._gradient_sum.dead = step_input.dead_neuron_mask
        n_dead = check_finite(step_input, ranks)
        x, target = self.inputs_and_targets(step_input.sae_in)
        check_groups(math.prod(x.shape) // self.cfg.d_in, self.cfg.pool_group_size, ranks.count)
        output = self._kept_forward_pass(x, target, step_input.dead_neuron_mask, n_dead)
        if output is None:
            output = self._dense_forward_pass(step_input)
            matrices = (output.feature_acts, output.hidden_pre)
            acts, hidden_pre = (matrix.detach().reshape(-1, self.cfg.d_sae) for matrix in matrices)
            counts = counts_of_all(count_dense(acts, hidden_pre, self.latent_threshold), ranks)
            self._record(counts, self._pool, len(acts))
            self._pool = None
            if self.cfg.inner_widths:
                # Matryoshka's own code, which takes rows only.
                levels = MatryoshkaBatchTopKTrainingSAE._iterable_decode(self, output.feature_acts.flatten(0, -2))  # type: ignore[arg-type]
                rows = x.reshape(-1, x.shape[-1])
                self._add_inner_losses(output, [add_skip(self, rows, decoded) for _, decoded in levels])
        check_loss(output.loss, step_input)
        norms = x.detach().reshape(-1, self.cfg.d_in).norm(dim=-1).float()
        self.pool_record.update_input_norm(ranks.sum(norms.mean()) / ranks.count)
        output.metrics.update({"topk_threshold": self.topk_threshold, **self.scan_record})
        of_pools = {name: partial(of, self.pool_record) for name, of in POOL_STATISTICS.items()}
        output.metrics.update(of_pools | export_metrics(self, step_input.sae_in))
        return output

    def inputs_and_targets(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """What of a training batch, shape (..., d_in), is encoded and what is reconstructed: all of it.

        Raises:
            ValueError: if it is empty or of another width.
        """
        check_shape(self, batch)
        return batch, batch

    def _dense_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        # Past BatchTopK's own version, which would look for the smallest kept entry once more.
        return super(BatchTopKTrainingSAE, self).training_forward_pass(step_input)

    def _choose_path(self, sae_in: Tensor) -> StepPath:
        ours = SampledTopKTrainingSAE
        own_step = any(getattr(getattr(self, m), "__func__", None) is not getattr(ours, m) for m in STEP_METHODS)
        hooked = any(hook.fwd_hooks or hook.bwd_hooks for hook in self.hook_dict.values())
        n_tokens = math.prod(sae_in.shape) // self.cfg.d_in
        path = choose_path(self.cfg, "dense" if own_step or hooked else self.cfg.step, n_tokens, sae_in.device)
        if path != self._path:
            logger.info(f"sampled_topk: training steps of {n_tokens} tokens on {sae_in.device} take the path {path!r}")
            self._path = path
        return path

    @torch.compiler.disable()  # its shapes depend on the data: traced, the graph would break at each of them
    def _kept_forward_pass(
        self, sae_in: Tensor, target: Tensor, dead_neuron_mask: Tensor | None, n_dead: int
    ) -> TrainStepOutput | None:
        """The host's forward pass with `kept_step` in its place; None if this step is for the dense path."""
        cfg = self.cfg
        if self._is_first_step:
            self._is_first_step = False
            warn_if_alone(self._all_ranks)
        if (path := self._choose_path(sae_in)) == "dense":
            return None
        x = (processed := self.process_sae_in(sae_in)).reshape(-1, cfg.d_in)
        norms = self.W_dec.norm(dim=-1) if cfg.rescale_acts_by_decoder_norm else None
        input_bias = self.b_dec if cfg.apply_b_dec_to_input and not sae_in.requires_grad else None
        weights = Weights(self.W_enc, self.b_enc, self.W_dec, norms, input_bias)
        dead = dead_latents(dead_neuron_mask, n_dead)
        width = target.shape[-1]  # that of a head, where the heads are merged for the encoder
        thresholds, k_aux = self.latent_threshold, min(width // 2, n_dead)
        step = kept_step(x, weights, thresholds, cfg, path, self.pool_record, dead, k_aux, self._ranks)
        if step is None:
            self.scan_record["dense_steps"] += 1
            return None
        self.scan_record["second_scans"] += step.n_scans - 1
        self.scan_record["extracted_per_kept"] = step.n_extracted / max(len(step.kept.values), 1)
        *inner, reconstruction = add_skip(self, x, step.reconstructions + self.b_dec)
        sae_out = self.run_time_activation_norm_fn_out(reconstruction.view(*processed.shape[:-1], -1))
        sae_out = self.reshape_fn_out(sae_out, self.d_head)
        losses = {"mse_loss": self.mse_loss_fn(sae_out, target).sum(dim=-1).mean()}
        residual = (target - sae_out).detach().reshape(reconstruction.shape)
        auxiliary = auxiliary_loss(step.dead_reconstruction, residual, n_dead, width, cfg.aux_loss_coefficient)
        losses["auxiliary_reconstruction_loss"] = auxiliary
        counts = counts_of_all(
            step.counts, self._ranks, peak_is_of_all=cfg.pool_group_size is None and step.pool is not None
        )
        self._record(counts, step.pool, len(x))
        feature_acts = as_coo(step.kept, torch.Size([*processed.shape[:-1], cfg.d_sae]))
        output = TrainStepOutput(
            sae_in=target,
            sae_out=sae_out,
            feature_acts=feature_acts if cfg.use_sparse_activations else feature_acts.to_dense(),
            hidden_pre=x.new_empty(0),  # nothing of the host reads it
            loss=losses["mse_loss"] + auxiliary,
            losses=losses,
        )
        self._add_inner_losses(output, inner)
        return output

    def _add_inner_losses(self, output: TrainStepOutput, reconstructions: Sequence[Tensor]) -> None:
        """SAELens' Matryoshka losses, weighted, of reconstructions from the inner widths, of shape (tokens, d_out).

        Where they count no more they are still there to be logged, times 0: the record's number of steps, this one
        counted already, stays on the device, and SAELens' own is one too low after a checkpoint.
        """
        last, weight = self.cfg.inner_loss_steps, self.cfg.inner_loss_coefficient
        if last is not None:
            weight = weight * (self.pool_record.n_steps <= last)
        for width, reconstruction in zip(self.cfg.inner_widths, reconstructions, strict=True):
            inner = reconstruction.view(*output.feature_acts.shape[:-1], -1)
            inner = self.reshape_fn_out(self.run_time_activation_norm_fn_out(inner), self.d_head)
            loss = self.mse_loss_fn(inner, output.sae_in).sum(dim=-1).mean()
            output.losses[f"inner_mse_loss_{width}"] = loss
            output.loss = output.loss + weight * loss

    def select(self, x: Tensor, draw: int) -> Tensor:
        """Feature activations, shape (..., d_sae), as training selects them from `x`, all of it one batch.

        Nothing is recorded. `draw` is the number of the random draw of a sampled pool; `encode` always takes draw 0.
        """
        return self._encode(x, torch.full_like(self.pool_record.n_steps, draw))[0]

    def data_parallel(self, group: "ProcessGroup | None" = None) -> None:
        """Train on the tokens of several processes, with the numbers of one on the whole batch.

        Call it on every process of `group` (None: all) after building the SAE, before the trainer. Each process then
        gives its own tokens of every batch to its trainer, all the same number of them: rank 0 the first ones, and so
        on. Pools, cutoff, thresholds, records and gradients are those of the whole batch on all ranks, up to the order
        of sums; losses and L0 in the trainer's metrics are of the rank's own tokens. With groups (`pool_group_size`)
        and with a pool of all latents the gradients of all latents are exchanged, with one pool those of the pool.
        Weights and buffers are those of rank 0 from here on.

        Raises:
            ValueError: for a registered score with one pool, and for float64: its cutoff is found in float32.
        """
        self._all_ranks = join_group(self, group)
        self._gradient_sum = GradientSum(self, self._all_ranks)

    def pool_statistics(self) -> dict[str, float]:
        """The pools so far, in numbers; the same that are logged in training. See the README's table."""
        of_pools = {name: statistic(self.pool_record).item() for name, statistic in POOL_STATISTICS.items()}
        return of_pools | self.scan_record

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
        state_dict["threshold"] = learnt_thresholds(self).to(self.b_enc.dtype)

    @override
    def save_inference_model(self, path: Path | str) -> tuple[Path, Path]:
        """Save as a JumpReLU SAE, which plain SAELens loads; the decoder rows come out unit-norm."""
        starved = POOL_STATISTICS["starved_share"](self.pool_record).item()
        if starved > 0.5 and self.pool_record.n_steps > 0 and self.cfg.pool_group_size is None:
            warnings.warn(
                f"{starved:.0%} of the latents were never in a pool: with one pool per batch and a small pool_factor "
                f"(here {self.cfg.pool_factor}) the pool freezes. pool_group_size=16 lets more latents in.",
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
        self.pool_record.input_norm.zero_()  # that of whitened inputs says nothing of others

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Weights and buffers of a checkpoint; ValueError if it is missing, truncated, or of another kind or size."""
        check_same_weights(Path(checkpoint_path), self.cfg.to_dict())
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
        check_shape(self, x)
        if self.cfg.n_candidates == self.cfg.d_sae and self._ranks.count == 1:
            return *super().encode_with_hidden_pre(x), None
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        acts = hidden_pre.relu().reshape(-1, self.cfg.d_sae)
        if self.cfg.n_candidates == self.cfg.d_sae:
            n_keep = int(self.cfg.k * len(acts) * self._ranks.count)
            kept, pool = torch.where(largest_of_ranks(acts.detach(), n_keep, self._ranks), acts, 0), None
        else:
            kept, pool = sampled_topk(acts, self.cfg, draw, self._ranks)
        return self.hook_sae_acts_post(kept.view_as(hidden_pre)), hidden_pre, pool

    @torch.no_grad()
    def _record(self, counts: StepCounts, pool: Tensor | None, n_tokens: int) -> None:
        """Update all that a step leaves behind besides gradients; alike on all ranks."""
        ranks = self._ranks
        if pool is not None and ranks.count > 1 and self.cfg.pool_group_size is not None:
            pool = ranks.max(torch.zeros_like(counts.n_selected).index_fill_(0, pool.flatten(), 1)).nonzero().T
        if self._gradient_sum is not None:
            self._gradient_sum.pool = pool
        smallest, lr = counts.smallest.to(self.topk_threshold.dtype), self.cfg.topk_threshold_lr
        moved = (1 - lr) * self.topk_threshold + lr * smallest  # SAELens' rule, without waiting for the device
        self.topk_threshold = torch.where(smallest.isfinite(), moved, self.topk_threshold)
        record = self.pool_record
        record.update(counts.n_selected, counts.smallest, pool)
        self.rate_matcher.update(
            counts, record.pooled_within(SILENT_AFTER_STEPS), record.cutoff, n_tokens * ranks.count, record.n_steps - 1
        )
