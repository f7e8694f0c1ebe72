"""Pools on an SAE that one has: a sampled_topk training SAE with the weights of another one."""

from pathlib import Path

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainingSAE
from sae_lens.saes.topk_sae import TopKTrainingSAE

from sae_lens_sampled.sae.config import SampledTopKTrainingSAEConfig
from sae_lens_sampled.sae.inference import load_checkpoint
from sae_lens_sampled.sae.training import SampledTopKTrainingSAE
from sae_lens_sampled.sae.transcoder import SampledTopKTranscoder, SampledTopKTranscoderConfig

SHARED_FIELDS = ("d_in", "d_sae", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "normalize_activations")
"""Fields that say what the weights mean: they must be equal."""


@torch.no_grad()
def from_batchtopk(source: TrainingSAE | str | Path, cfg: SampledTopKTrainingSAEConfig) -> SampledTopKTrainingSAE:
    """A sampled_topk training SAE that starts from the weights of a TopK, BatchTopK or Matryoshka training SAE.

    Its running statistics are new; BatchTopK's threshold is where the thresholds start, and where extraction looks
    first. Pass the result to a runner as `override_sae`.

    Args:
        source: the training SAE, or the folder of its checkpoint, whose activation normalisation is folded in.
        cfg: of the new SAE.

    Raises:
        ValueError: if the SAE is of another kind, or `cfg` gives its weights another meaning.
    """
    given = source if isinstance(source, TrainingSAE) else load_checkpoint(source, device=cfg.device)
    if isinstance(given, SampledTopKTranscoder) or isinstance(cfg, SampledTopKTranscoderConfig):
        raise ValueError(  # noqa: TRY004  like every other refusal
            "weights of SAEs and transcoders do not mean the same: a transcoder starts from its own."
        )
    if not isinstance(given, TopKTrainingSAE):
        raise ValueError(  # noqa: TRY004  like every other refusal
            f"a {type(given).__name__} cannot become a sampled_topk SAE; training SAEs of TopK, BatchTopK and "
            "Matryoshka can."
        )
    for name in SHARED_FIELDS:
        theirs, ours = getattr(given.cfg, name), getattr(cfg, name)
        if theirs != ours:
            raise ValueError(f"{name}={ours!r} gives the weights another meaning: they were trained with {theirs!r}.")
    sae = SampledTopKTrainingSAE(cfg)
    for name, parameter in sae.named_parameters():
        parameter.copy_(given.get_parameter(name))
    if isinstance(given, BatchTopKTrainingSAE):
        sae.topk_threshold = given.topk_threshold.to(sae.topk_threshold)
        sae.rate_matcher.threshold.fill_(given.topk_threshold.item())
        sae.pool_record.cutoff.fill_(given.topk_threshold.item())
    return sae
