"""The training SAE: the thin shell between the pure functions of this package and SAELens."""

import dataclasses
import math
from functools import partial
from typing import Any, TypeAlias, get_args

import torch
from sae_lens import logger
from sae_lens.saes.batchtopk_sae import BatchTopK
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from torch.distributed import ProcessGroup
from typing_extensions import override

from sae_lens_sampled.sae.checks import (
    StepState,
    check_groups,
    check_loss,
    check_shape,
    read_step,
    tell_of_one_pool,
    warn_if_alone,
)
from sae_lens_sampled.sae.config import SampledTopKTrainingSAEConfig
from sae_lens_sampled.sae.forward import ForwardPass, SampledTrainStepOutput, add_inner_losses, kept_forward_pass
from sae_lens_sampled.sae.gradient_sum import GradientSum, join_group
from sae_lens_sampled.sae.path_choice import MEASURED_DEVICES, fastest_path, fixed_step
from sae_lens_sampled.sae.reconstruction import add_skip, decode_inner_widths
from sae_lens_sampled.sae.recorded import RecordedSAE
from sae_lens_sampled.step.kept_entries import StepPath, choose_path, possible_paths
from sae_lens_sampled.step.pool_record import POOL_STATISTICS
from sae_lens_sampled.step.ranks import ALONE, Ranks
from sae_lens_sampled.step.reduced_scan import Scan, choose_scan
from sae_lens_sampled.step.selection import PoolFields, sampled_topk
from sae_lens_sampled.step.thresholds import SILENT_AFTER_STEPS, StepCounts, count_dense, reduce_counts

STEP_METHODS = (
    "encode",
    "encode_with_hidden_pre",
    "encode_with_pool",
    "decode",
    "calculate_aux_loss",
    "calculate_topk_aux_loss",
)
"""Methods that a step on the kept entries does not call; if a subclass overrides one, the dense path runs."""
Encoded: TypeAlias = tuple[Tensor, Tensor, Tensor | None]
"""Activations, pre-activations and the pool, as `encode_with_pool` returns them."""


class SampledTopKTrainingSAE(RecordedSAE):
    r"""BatchTopK within a candidate pool chosen anew for each batch (Sampled-SAE, arXiv 2508.21324).

    For activations $z = \mathrm{relu}(x W_{enc} + b_{enc})$ of B tokens (times the decoder norms, if rescaled by them):
    score every latent over the batch, keep the best `k * pool_factor` as candidates, keep the `int(k * B)` largest
    entries among these, and reconstruct from them. With all latents as candidates this is SAELens' BatchTopK,
    bit-identical with `step="dense"`. With `matryoshka_widths` each inner width has its own loss on the same kept
    entries; with all latents as candidates this is SAELens' Matryoshka BatchTopK.

    As in BatchTopK, `encode` selects over all given rows, so a token's code depends on its batch.
    """

    def __init__(self, cfg: SampledTopKTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.ranks: Ranks = ALONE
        """The processes that train this SAE."""
        self._gradient_sum: GradientSum | None = None
        self._announced: tuple[StepPath, Scan] | None = None  # what was logged last

    @override
    def encode(self, x: Tensor) -> Tensor:
        """Feature activations, shape (..., d_sae); deterministic, since a sampled pool is always the first draw."""
        return self.select(x, draw=0)

    def select(self, x: Tensor, draw: int) -> Tensor:
        """Feature activations, shape (..., d_sae), selected as in training, with `x` as one batch.

        Nothing is recorded. `draw` is the index of the random draw of a sampled pool; `encode` always uses draw 0.
        """
        return self._encode(x, torch.full_like(self.pool_record.n_steps, draw), ALONE, self.pool_fields())[0]

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Feature activations and pre-activations as in the current training step, both of shape (..., d_sae)."""
        return self.encode_with_pool(x)[:2]

    def encode_with_pool(self, x: Tensor, ranks: Ranks = ALONE, fields: PoolFields | None = None) -> Encoded:
        """As `encode_with_hidden_pre`, and the pool, shape (groups, n_candidates), or None if every latent is in it.

        A dense step calls this; a subclass that selects in another way overrides it. `ranks` are the processes that
        share the batch; `x` is this process's part. `fields` choose the pool; None: those after the steps so far.
        """
        return self._encode(x, self.pool_record.n_steps, ranks, fields or self.pool_fields())

    def _encode(self, x: Tensor, draw: Tensor, ranks: Ranks, fields: PoolFields) -> Encoded:
        check_shape(self, x)
        all_latents = fields.n_candidates == self.cfg.d_sae
        if all_latents and ranks.count == 1:
            if isinstance(self.activation_fn, BatchTopK):
                self.activation_fn.k = self.cfg.k  # may follow a schedule
            return *super().encode_with_hidden_pre(x), None
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        if self.cfg.rescale_acts_by_decoder_norm:
            hidden_pre = hidden_pre * self.W_dec.norm(dim=-1)
        acts = hidden_pre.relu().reshape(-1, self.cfg.d_sae)
        if all_latents:
            chosen = ranks.topk_indices(acts.detach(), int(self.cfg.k * ranks.n_of_all(len(acts))))
            values = acts.flatten().gather(0, chosen)
            kept, pool = torch.zeros_like(acts).flatten().scatter(0, chosen, values), None
        else:
            kept, pool = sampled_topk(acts, fields, draw, self.pool_record.cutoff, ranks)
        return self.hook_sae_acts_post(kept.view_as(hidden_pre)), hidden_pre, pool

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> SampledTrainStepOutput:
        """Run one forward pass, and update the thresholds and the pool record.

        Raises:
            ValueError: before anything is changed, if `sae_in` is empty, has the wrong width or non-finite rows, if the
                ranks have different numbers of tokens or a group would span two of them, if SAE_LENS_SAMPLED_STEP is
                used and invalid, if a registered score's result is invalid, or if a subclass overrides
                `encode_with_hidden_pre` alone. After the update, if the loss is not finite: not every step checks it.
        """
        state = read_step(step_input, self.cfg, self.pool_record.n_steps, self.ranks)
        x, target = self.inputs_and_targets(step_input.sae_in)
        check_groups(math.prod(x.shape) // self.cfg.d_in, self.cfg.pool_group_size, self.ranks.count)
        done = self._kept_forward_pass(step_input, x, target, state)
        if done is None:
            done = self._dense_forward_pass(step_input, x, target, state, self.ranks)
        output = done.output
        pool = output.pool
        if pool is not None and self.cfg.pool_group_size is not None:
            pool = self.ranks.union(pool, self.cfg.d_sae)
        if self._gradient_sum is not None and output.loss.requires_grad:
            self._gradient_sum.expect(pool, state.dead)
        self._record(done.counts, pool, math.prod(output.feature_acts.shape[:-1]))
        add_inner_losses(self, output, done.inner)
        check_loss(output.loss, step_input)
        norms = x.detach().reshape(-1, self.cfg.d_in).norm(dim=-1).float()
        self.pool_record.update_input_norm(self.ranks.mean(norms.mean()))
        output.metrics.update({"topk_threshold": self.topk_threshold, **self.scan_record})
        of_pools = {name: partial(of, self.pool_record) for name, of in POOL_STATISTICS.items()}
        output.metrics.update(of_pools | self.export_metrics(step_input.sae_in))
        return output

    def choose_path(self, x: Tensor, fields: PoolFields) -> StepPath | None:
        """Path of a step on `x` with the pool that `fields` choose; None: timing decides. Called once per step."""
        n_tokens, device = math.prod(x.shape) // self.cfg.d_in, x.device
        own_step = any(map(self._has_own, STEP_METHODS))
        hooked = any(map(_has_hooks, self.hook_dict.values()))
        step = "dense" if own_step or hooked else fixed_step(self.cfg.step)
        if step == "auto" and device.type in MEASURED_DEVICES and len(possible_paths(fields, device)) > 1:
            return None
        return choose_path(fields, step, n_tokens, device)

    def _measured_path(self, step_input: TrainStepInput, x: Tensor, target: Tensor, state: StepState) -> StepPath:
        """The path timed as fastest on such a batch; if due, paths are timed now, on this process's tokens."""
        choice, when = self.path_choice, (len(x), step_input.n_training_steps, state.n_dead / self.cfg.d_sae)
        paths, costs = possible_paths(state.fields, x.device), dict(self.scan_record)
        is_due = choice.is_due(*when) or choice.path not in paths
        if is_due and not torch.is_grad_enabled():  # a backward pass cannot be timed
            return choose_path(state.fields, "auto", math.prod(x.shape) // self.cfg.d_in, x.device)
        if is_due:

            def loss_by(path: StepPath) -> Tensor:
                if path == "dense":
                    done = self._dense_forward_pass(step_input, x, target, state, ALONE)
                elif (done := kept_forward_pass(self, x, target, state, path, ALONE)) is None:
                    raise RuntimeError("this batch has too many positive entries for it")
                add_inner_losses(self, done.output, done.inner)
                return done.output.loss

            trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
            fastest = fastest_path(loss_by, paths, trained, self.ranks)
            choice.remember(fastest, *when)
            self.scan_record.update(costs)
        return choice.path

    def _path_of_all(self, x: Tensor, fields: PoolFields) -> StepPath | None:
        """The path that `choose_path` returns on every rank; "dense", which all can take, if ranks differ.

        Hooks, the environment variable, and kernels that a machine lacks can make a difference.
        """
        path = self.choose_path(x, fields)
        if self.ranks.count == 1:
            return path
        place = 0 if path is None else 1 + get_args(StepPath).index(path)
        most, fewest = self.ranks.max(torch.tensor([place, -place], device=x.device)).tolist()
        return path if most == -fewest else "dense"

    def _has_own(self, method: str) -> bool:
        return getattr(getattr(self, method), "__func__", None) is not getattr(SampledTopKTrainingSAE, method)

    @torch.compiler.disable()  # shapes depend on the data, and each would break a traced graph
    def _kept_forward_pass(
        self, step_input: TrainStepInput, x: Tensor, target: Tensor, state: StepState
    ) -> ForwardPass | None:
        if state.n_steps == self.cfg.pool_steps:
            self.path_choice.forget()
            logger.info(f"sampled_topk: after {state.n_steps} training steps with pools, every latent is a candidate")
        path = self._path_of_all(x, state.fields) or self._measured_path(step_input, x, target, state)
        if self._announced is None:
            warn_if_alone(self.ranks)
            tell_of_one_pool(state.fields)
        n_tokens = math.prod(x.shape) // self.cfg.d_in
        scan = choose_scan(self.cfg.scan, state.fields, n_tokens, self.W_enc) if path == "kept" else "full"
        if (path, scan) != self._announced:
            how = "" if scan == "full" else ", with a scan in bfloat16 where possible and kept values in float32"
            logger.info(f"sampled_topk: training steps of {n_tokens} tokens on {x.device} take the path {path!r}{how}")
            self._announced = path, scan
        return None if path == "dense" else kept_forward_pass(self, x, target, state, path, self.ranks)

    def _dense_forward_pass(
        self, step_input: TrainStepInput, x: Tensor, target: Tensor, state: StepState, ranks: Ranks
    ) -> ForwardPass:
        """SAELens' forward pass, written out since the original has no place for a pool or a transcoder's targets."""
        if self._has_own("encode_with_hidden_pre") and not self._has_own("encode_with_pool"):
            raise ValueError(
                f"{type(self).__name__} overrides encode_with_hidden_pre, but a training step calls encode_with_pool, "
                "which returns the pool too; override encode_with_pool as well."
            )
        feature_acts, hidden_pre, pool = self.encode_with_pool(x, ranks, state.fields)
        sae_out = add_skip(self, x, self.decode(feature_acts))
        loss = self.mse_loss_fn(sae_out, target).sum(dim=-1).mean()
        step_input = dataclasses.replace(step_input, sae_in=target, dead_neuron_mask=state.dead)
        auxiliary = self.calculate_aux_loss(
            step_input=step_input, feature_acts=feature_acts, hidden_pre=hidden_pre, sae_out=sae_out
        )
        output = SampledTrainStepOutput(
            sae_in=target,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=sum(auxiliary.values(), start=loss),
            losses={"mse_loss": loss, **auxiliary},
            pool=pool,
        )
        acts, pre = (matrix.detach().reshape(-1, self.cfg.d_sae) for matrix in (feature_acts, hidden_pre))
        counts = reduce_counts(count_dense(acts, pre, self.latent_threshold), ranks)
        return ForwardPass(output, counts, decode_inner_widths(self, x, feature_acts))

    @torch.no_grad()
    def _record(self, counts: StepCounts, pool: Tensor | None, n_tokens: int) -> None:
        """Update thresholds and the record of pools, identically on all ranks; `pool` is that of all ranks."""
        smallest, lr = counts.smallest.to(self.topk_threshold.dtype), self.cfg.topk_threshold_lr
        moved = (1 - lr) * self.topk_threshold + lr * smallest  # SAELens' rule, without waiting for the device
        self.topk_threshold = torch.where(smallest.isfinite(), moved, self.topk_threshold)
        record, n_tokens = self.pool_record, self.ranks.n_of_all(n_tokens)
        record.update(counts.n_selected, counts.smallest, pool)
        recently_pooled = record.pooled_within(SILENT_AFTER_STEPS)
        self.rate_matcher.update(counts, recently_pooled, record.cutoff, n_tokens, record.n_steps - 1)

    def data_parallel(self, group: "ProcessGroup | None" = None) -> None:
        """Train on the tokens of several processes, with the same results as one process on the whole batch.

        Call it on every process of `group` (None: all) after `torch.distributed.init_process_group` and after building
        the SAE, before building the trainer. Each then passes its own tokens of every batch to its trainer, the same
        number on each: rank 0 the first ones, and so on. Pools, cutoff, thresholds, records and gradients are those of
        the whole batch on all ranks, up to the order of sums; losses and L0 in the trainer's metrics cover the rank's
        own tokens. Gradients are exchanged for the latents that are in a pool of any rank or dead; with a pool of all
        latents, for all. Weights and buffers are copied from rank 0.

        Raises:
            ValueError: if there is no process group, the SAE has one pool and a registered score that is not a
                `ColumnScore`, or it is in float64 (the cutoff is found in float32).
            LostRankError: if another process ends or does not answer.
        """
        self.ranks = join_group(self, group)
        self._gradient_sum = GradientSum(self, self.ranks)


def _has_hooks(hook: Any) -> bool:
    """Whether a hook point has hooks, added by TransformerLens or with torch's own methods."""
    own = (hook.fwd_hooks, hook.bwd_hooks, hook._forward_hooks, hook._forward_pre_hooks, hook._backward_hooks)
    return any(own)
