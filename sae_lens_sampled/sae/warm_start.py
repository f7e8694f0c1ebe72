"""Warm start: a sampled_topk training SAE from another SAE's weights."""

from pathlib import Path

import torch
from sae_lens.saes.abstopk_sae import AbsTopKTrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE

from sae_lens_sampled.sae.config import SampledTopKTrainingSAEConfig
from sae_lens_sampled.sae.inference import load_checkpoint
from sae_lens_sampled.sae.training import SampledTopKTrainingSAE
from sae_lens_sampled.sae.transcoder import SampledTopKTranscoder, SampledTopKTranscoderConfig

SHARED_FIELDS = ("d_in", "d_sae", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "normalize_activations")
"""Fields that determine what the weights mean; they must be equal in both SAEs."""


@torch.no_grad()
def from_batchtopk(source: TrainingSAE | str | Path, cfg: SampledTopKTrainingSAEConfig) -> SampledTopKTrainingSAE:
    """Build a sampled_topk training SAE from the weights of a TopK, BatchTopK, Matryoshka or sampled_topk one.

    Running statistics start afresh, but thresholds, which an export before the first step has, and the last cutoff are
    those of a sampled_topk source; BatchTopK's threshold stands for all of them. Pass the result to a runner as
    `override_sae`.

    Args:
        source: the training SAE, or the folder of its checkpoint, whose activation normalisation is folded in.
        cfg: config of the new SAE.

    Raises:
        ValueError: if the checkpoint cannot be loaded, the SAE is of another kind, or its weights do not fit `cfg`.
    """
    given = source if isinstance(source, TrainingSAE) else load_checkpoint(source, device=cfg.device)
    if isinstance(given, SampledTopKTranscoder) or isinstance(cfg, SampledTopKTranscoderConfig):
        raise ValueError(  # noqa: TRY004  as for every invalid argument
            "from_batchtopk takes no transcoder, neither as source nor for cfg; train from scratch instead."
        )
    # AbsTopK's is a subclass of TopK's, but its negative activations would be lost.
    if not isinstance(given, TopKTrainingSAE) or isinstance(given, AbsTopKTrainingSAE):
        raise ValueError(  # noqa: TRY004  as for every invalid argument
            f"a {type(given).__name__} cannot become a sampled_topk SAE; TopK, BatchTopK and Matryoshka "
            "training SAEs can."
        )
    for name in SHARED_FIELDS:
        theirs, ours = getattr(given.cfg, name), getattr(cfg, name)
        if theirs != ours:
            raise ValueError(
                f"{name}={ours!r} does not fit the source's weights, for which it is {theirs!r}; set that in cfg."
            )
    sae = SampledTopKTrainingSAE(cfg)
    for name, parameter in sae.named_parameters():
        parameter.copy_(given.get_parameter(name))
    if isinstance(given, SampledTopKTrainingSAE):
        sae.rate_matcher.threshold.copy_(given.latent_threshold)
        sae.pool_record.cutoff.copy_(given.pool_record.cutoff)
    elif isinstance(given, BatchTopKTrainingSAE):
        sae.rate_matcher.threshold.fill_(given.topk_threshold.item())
        sae.pool_record.cutoff.fill_(given.topk_threshold.item())
    return sae
