"""Configs of the architecture `sampled_topk`: TopK's and BatchTopK's, and the fields that choose the candidate pool."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig
from typing_extensions import override

from sae_lens_sampled.scores import SCORES
from sae_lens_sampled.selection import PoolFields, PoolSampling

InferenceThreshold = Literal["per_latent", "global"]


@dataclass
class SampledTopKTrainingSAEConfig(BatchTopKTrainingSAEConfig):
    """
    Configuration class for training a SampledTopKTrainingSAE (Sampled-SAE, arXiv 2508.21324).

    BatchTopK restricted to a candidate pool: each batch first scores every latent, keeps the best
    `k * pool_factor` as candidates, and runs BatchTopK among these. Fields that BatchTopK has too are
    documented there; `aux_loss_coefficient` defaults to the paper's 1/32.

    Args:
        pool_factor (float): Candidate pool size over k, at least 1 (the paper's l). From d_sae / k on every latent is
            a candidate, which is BatchTopK.
        score (str): How latents are scored over a batch: l2_norm, squared_l2, entropy, perplexity, frequency,
            ridge_leverage, uniform, or a name given to register_score.
        pool_sampling (Literal["top", "proportional"]): "top" takes the best-scored latents. "proportional" draws them
            without replacement, with probability proportional to the score.
        pool_group_size (int | None): Number of consecutive tokens that share a pool. None: one pool per batch, as in
            the paper. 1 with pool_factor=1, score="l2_norm" and an integer k is per-token TopK.
        pool_seed (int): Seed of proportional sampling. The draw is a function of this seed and of the number of
            training steps, so a resumed run repeats it.
        aux_token_fraction (float): Share of the tokens, chosen anew in each step, that the auxiliary loss is averaged
            over. Below 1 it is an unbiased estimate at that share of its cost.
        inference_threshold (Literal["per_latent", "global"]): Thresholds of the exported JumpReLU SAE. "per_latent":
            each latent fires as often as training selected it. "global": BatchTopK's rule, one threshold for all,
            with which latents outside the pool fire too.
    """

    aux_loss_coefficient: float = 1 / 32
    pool_factor: float = 5.0
    score: str = "l2_norm"
    pool_sampling: PoolSampling = "top"
    pool_group_size: int | None = None
    pool_seed: int = 0
    aux_token_fraction: float = 1.0
    inference_threshold: InferenceThreshold = "per_latent"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sampled_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool_fields(self)
        _check(
            0 < self.aux_token_fraction <= 1,
            f"aux_token_fraction={self.aux_token_fraction} must be above 0 and at most 1.",
        )
        _check(
            self.inference_threshold in get_args(InferenceThreshold),
            f"inference_threshold={self.inference_threshold!r} must be 'per_latent' or 'global'.",
        )
        _check(
            self.normalize_activations not in ("layer_norm", "constant_norm_rescale"),
            f"normalize_activations={self.normalize_activations!r} does not work with SAELens' auxiliary loss, which "
            "would stop the run at the first dead latent; use 'none', 'expected_average_only_in' or "
            "'covariance_whitening'.",
        )


@dataclass
class SampledTopKSAEConfig(TopKSAEConfig):
    """
    Configuration class for a SampledTopKSAE, which selects over its batch at inference as in training.

    The fields are those of SampledTopKTrainingSAEConfig; k is an average per token.
    """

    k: float = 100  # type: ignore[assignment]
    rescale_acts_by_decoder_norm: bool = True
    pool_factor: float = 5.0
    score: str = "l2_norm"
    pool_sampling: PoolSampling = "top"
    pool_group_size: int | None = None
    pool_seed: int = 0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sampled_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool_fields(self)
        _check(
            self.normalize_activations == "none",
            f"this is a checkpoint from the middle of a run with normalize_activations={self.normalize_activations!r}, "
            "which is not folded into the weights yet; sae_lens_sampled.load_checkpoint(folder) folds it.",
        )


def check_pool_fields(cfg: PoolFields) -> None:
    """Refuse impossible values of the fields that the selection depends on.

    Raises:
        ValueError: naming the field, its value, the reason and the way out.
    """
    _check(0 < cfg.k <= cfg.d_sae, f"k={cfg.k} must be above 0 and at most d_sae={cfg.d_sae}.")
    _check(
        math.isfinite(cfg.pool_factor) and cfg.pool_factor >= 1,
        f"pool_factor={cfg.pool_factor} must be finite and at least 1: each token keeps k={cfg.k} entries "
        f"of k * pool_factor candidates. pool_factor={cfg.d_sae / cfg.k:g} (d_sae / k) makes every latent one.",
    )
    _check(
        cfg.score in SCORES,
        f"score={cfg.score!r} is not known; known are {', '.join(SCORES)}. Add your own with register_score.",
    )
    _check(
        cfg.pool_sampling in get_args(PoolSampling),
        f"pool_sampling={cfg.pool_sampling!r} must be one of {', '.join(get_args(PoolSampling))}.",
    )
    _check(
        not (cfg.score == "uniform" and cfg.pool_sampling == "top"),
        "score='uniform' is equal for all latents, so pool_sampling='top' has nothing to choose by; "
        "use pool_sampling='proportional'.",
    )
    _check(
        cfg.pool_group_size is None or cfg.pool_group_size >= 1,
        f"pool_group_size={cfg.pool_group_size} must be at least 1 token, or None for one pool per batch.",
    )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
