"""A step on the kept entries in SAELens' terms: from the trainer's batch to the output that the trainer expects."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sae_lens.saes.sae import TrainStepOutput
from torch import Tensor, nn

from sae_lens_sampled.sae.checks import StepState
from sae_lens_sampled.sae.reconstruction import add_skip
from sae_lens_sampled.sae.recorded import RecordedSAE
from sae_lens_sampled.step.auxiliary import auxiliary_loss, dead_latents
from sae_lens_sampled.step.column_scan import Batch
from sae_lens_sampled.step.kept_entries import StepPath, kept_step
from sae_lens_sampled.step.ranks import Ranks
from sae_lens_sampled.step.reduced_scan import choose_scan
from sae_lens_sampled.step.sparse_codes import as_coo
from sae_lens_sampled.step.thresholds import StepCounts, reduce_counts


@dataclass
class SampledTrainStepOutput(TrainStepOutput):
    """SAELens' output of a step, with its pool and path.

    Unless `path` is "dense", `hidden_pre` is empty, of shape (0,), and `feature_acts` is a COO tensor if
    `use_sparse_activations` is set.
    """

    pool: Tensor | None = None
    """Candidates for this process's tokens, indices of shape (groups, n_candidates); None if every latent is one."""
    path: StepPath = "dense"
    """How the step was computed."""


class ForwardPass(NamedTuple):
    """Result of a step, on any path."""

    output: SampledTrainStepOutput
    counts: StepCounts
    """Counts over the tokens of all ranks."""
    inner: Sequence[Tensor]
    """Reconstructions from the inner widths, shape (tokens, d_out) each."""


@torch.compiler.disable()  # shapes depend on the data, and each would break a traced graph
def kept_forward_pass(
    sae: RecordedSAE, sae_in: Tensor, target: Tensor, state: StepState, path: StepPath, ranks: Ranks
) -> ForwardPass | None:
    """SAELens' forward pass, computed by `kept_step`; None if this step needs the dense path.

    Args:
        sae: the training SAE.
        sae_in: activations to encode, shape (..., d_in).
        target: activations to reconstruct, shape (..., d_out).
        state: state of this step.
        path: "columns" or "kept".
        ranks: the processes that share the batch; `sae_in` is this process's part.
    """
    cfg, record = sae.cfg, sae.pool_record
    if path == "kept":
        lay_out_by_latent(sae.W_enc)
    x = (processed := sae.process_sae_in(sae_in)).reshape(-1, cfg.d_in)
    # The gradient of the inputs is a matrix product that only the bias subtracted from them needs: that bias gets its
    # gradient from a vector instead, or no gradient if SAELens has multiplied it by 0.
    wanted = sae_in.requires_grad
    input_bias = sae.b_dec if cfg.apply_b_dec_to_input and not wanted else None
    if not (cfg.apply_b_dec_to_input or wanted):
        x = x.detach()
    weights = sae.weights()._replace(input_bias=input_bias)
    scan = choose_scan(cfg.scan, state.fields, len(x), weights.W_enc)
    batch = Batch(x, weights, sae.latent_threshold, state.fields, record.n_steps, record.cutoff, ranks, scan)
    width = target.shape[-1]  # of one head, where heads are merged for the encoder
    step = kept_step(batch, path, dead_latents(state.dead, state.n_dead), min(width // 2, state.n_dead))
    if step is None:
        sae.scan_record["dense_steps"] += 1
        return None
    sae.scan_record["second_scans"] += step.cost.n_scans - 1
    sae.scan_record["extracted_per_kept"] = step.cost.n_extracted / max(len(step.kept.values), 1)
    sae.scan_record["recomputed_per_kept"] = step.cost.n_recomputed / max(len(step.kept.values), 1)
    # Add the decoder's bias and the skip connection once for all levels, then restore the input's shape.
    *inner, reconstruction = add_skip(sae, x, step.reconstructions + sae.b_dec)
    sae_out = sae.run_time_activation_norm_fn_out(reconstruction.view(*processed.shape[:-1], -1))
    sae_out = sae.reshape_fn_out(sae_out, sae.d_head)
    losses = {"mse_loss": sae.mse_loss_fn(sae_out, target).sum(dim=-1).mean()}
    # AuxK reconstructs the residual, which gets no gradient from it.
    residual = (target - sae_out).detach().reshape(reconstruction.shape)
    auxiliary = auxiliary_loss(step.dead_reconstruction, residual, state.n_dead, width, cfg.aux_loss_coefficient)
    losses["auxiliary_reconstruction_loss"] = auxiliary
    feature_acts = as_coo(step.kept, torch.Size([*processed.shape[:-1], cfg.d_sae]))
    output = SampledTrainStepOutput(
        sae_in=target,
        sae_out=sae_out,
        feature_acts=feature_acts if cfg.use_sparse_activations else feature_acts.to_dense(),
        hidden_pre=x.new_empty(0),  # SAELens never reads it
        loss=losses["mse_loss"] + auxiliary,
        losses=losses,
        pool=step.pool,
        path=path,
    )
    one_pool = cfg.pool_group_size is None and step.pool is not None
    return ForwardPass(output, reduce_counts(step.counts, ranks, peak_is_of_all=one_pool), inner)


@torch.no_grad()
def lay_out_by_latent(W_enc: nn.Parameter) -> None:
    """Store each latent's encoder weights contiguously, as its decoder weights are; shape and values are unchanged.

    Sparse products read the matrix and return its gradient in that order; otherwise a step would transpose it two or
    three times. Only on a CPU: GPU kernels read its rows.
    """
    if W_enc.device.type == "cpu" and not W_enc.T.is_contiguous():
        W_enc.data = W_enc.T.contiguous().T


def add_inner_losses(sae: RecordedSAE, output: TrainStepOutput, reconstructions: Sequence[Tensor]) -> None:
    """Add SAELens' Matryoshka losses, weighted, for reconstructions from the inner widths, shape (tokens, d_out) each.

    After `inner_loss_steps` they are still logged but added with weight 0, so that the record's step count, which
    includes this step, can stay on the device; SAELens' own is one too low after resuming.
    """
    last, weight = sae.cfg.inner_loss_steps, sae.cfg.inner_loss_coefficient
    if last is not None:
        weight = weight * (sae.pool_record.n_steps <= last)
    for width, reconstruction in zip(sae.cfg.inner_widths, reconstructions, strict=True):
        inner = reconstruction.view(*output.feature_acts.shape[:-1], -1)
        inner = sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(inner), sae.d_head)
        loss = sae.mse_loss_fn(inner, output.sae_in).sum(dim=-1).mean()
        output.losses[f"inner_mse_loss_{width}"] = loss
        output.loss = output.loss + weight * loss
