"""Configs of the architecture `sampled_topk`: those of TopK and BatchTopK, plus the fields of the candidate pool."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import NoneType
from typing import Any, Literal, get_args

from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKSAEConfig
from typing_extensions import override

from sae_lens_sampled.step.kept_entries import Step
from sae_lens_sampled.step.reduced_scan import Scan
from sae_lens_sampled.step.scores import SCORES
from sae_lens_sampled.step.selection import PoolFields, PoolSampling

InferenceThreshold = Literal["per_latent", "global"]


FIELD_TYPES: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("k", (int, float), "a number"),
    ("pool_factor", (int, float, NoneType), "a number, or None for every latent"),
    ("score", (str,), "the name of a score"),
    ("pool_group_size", (int, NoneType), "a whole number of tokens, or None for one pool per batch"),
    ("pool_seed", (int,), "a whole number"),
)
"""Types of fields, also in words. Dataclasses do not check them, and most errors would surface only during a run."""


@dataclass
class SampledTopKTrainingSAEConfig(BatchTopKTrainingSAEConfig, PoolFields):
    """
    Configuration class for training a SampledTopKTrainingSAE (Sampled-SAE, arXiv 2508.21324).

    BatchTopK restricted to a candidate pool: in each batch, every latent is scored, the best
    `k * pool_factor` become candidates, and BatchTopK selects among these. Fields inherited from BatchTopK are
    documented there, pool fields in PoolFields; `aux_loss_coefficient` defaults to the paper's 1/32.

    Args:
        step (Literal["auto", "kept", "dense"]): How a training step is computed. "dense": SAELens' own code, with all
            of its (tokens, d_sae) matrices. "kept": on the kept entries only, where that is possible, with the same
            selection, and sums that are equal up to rounding. "auto": the faster one, on CPUs according to measurements
            at various sizes, on CUDA by timing both at the first step and a few times later. The environment variable
            SAE_LENS_SAMPLED_STEP overrides "auto".
        scan (Literal["auto", "full", "reduced"]): How a step on the kept entries finds them on a CPU. "full": by a
            float32 product. "reduced": by a bfloat16 product with a margin for its rounding; entries that may be kept
            are recomputed in float32, so with a pool of all latents the kept entries and their values are those of a
            float32 step. Smaller pools are scored on rounded activations, as under autocast. "auto": "reduced" for a
            pool of all latents if the processor has bfloat16 instructions, and sizes and margin make it faster, else
            "full". Always "full" under autocast and for weights that are not float32.
        inner_loss_coefficient (float): Weight of each inner reconstruction loss, used with `matryoshka_widths`. 1 is
            SAELens' Matryoshka; a smaller weight impairs the reconstruction from all latents less.
        inner_loss_steps (int | None): Number of training steps after which the inner losses are switched off. Run for
            half of the training, they order the latents, and the rest recovers the reconstruction. None: never.
        use_sparse_activations (bool): Whether a step on the kept entries returns `feature_acts` as a COO tensor, which
            SAELens' trainer accepts. False: a dense tensor, for custom training loops. Both carry the gradient.
        inference_threshold (Literal["per_latent", "global"]): Thresholds of the exported JumpReLU SAE. "per_latent":
            each latent fires about as often as training selected it. "global": BatchTopK's rule, one threshold for
            all latents, so latents outside the pool fire too.
    """

    aux_loss_coefficient: float = 1 / 32
    use_sparse_activations: bool = True
    step: Step = "auto"
    scan: Scan = "auto"
    inner_loss_coefficient: float = 1.0
    inner_loss_steps: int | None = None
    inference_threshold: InferenceThreshold = "per_latent"

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sampled_topk"

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> "SampledTopKTrainingSAEConfig":
        refuse_quota(config_dict)
        return super().from_dict(config_dict)

    @property
    def batch_parts(self) -> dict[str, int]:
        """Widths of the parts that a training batch holds side by side, by config field."""
        return {"d_in": self.d_in}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pool_fields(self)
        check(self.step in get_args(Step), f"step={self.step!r} must be one of {', '.join(get_args(Step))}.")
        check(self.scan in get_args(Scan), f"scan={self.scan!r} must be one of {', '.join(get_args(Scan))}.")
        check(
            self.inference_threshold in get_args(InferenceThreshold),
            f"inference_threshold={self.inference_threshold!r} must be 'per_latent' or 'global'.",
        )
        check(
            isinstance(self.inner_loss_coefficient, (int, float)) and 0 <= self.inner_loss_coefficient < math.inf,
            f"inner_loss_coefficient={self.inner_loss_coefficient!r} must be a finite number of at least 0.",
        )
        _check_steps("inner_loss_steps", steps := self.inner_loss_steps)
        check(
            steps is None or len(self.inner_widths) > 0,
            f"inner_loss_steps={steps!r} has no effect without inner losses; set two or more matryoshka_widths.",
        )
        check(
            self.d_in >= 2,
            f"d_in={self.d_in} is less than 2: SAELens' auxiliary loss keeps d_in // 2 dead latents per token and "
            "divides by that number.",
        )
        check(
            self.normalize_activations not in ("layer_norm", "constant_norm_rescale"),
            f"normalize_activations={self.normalize_activations!r} does not work with SAELens' auxiliary loss, which "
            "would stop the run at the first dead latent; use 'none', 'expected_average_only_in' or "
            "'covariance_whitening'.",
        )


@dataclass
class SampledTopKSAEConfig(TopKSAEConfig, PoolFields):
    """
    Configuration class for a SampledTopKSAE, which selects over its batch at inference, as in training.

    Fields mean the same as in SampledTopKTrainingSAEConfig; k is an average per token.
    """

    k: float = 100  # type: ignore[assignment]
    rescale_acts_by_decoder_norm: bool = True
    pool_quota: list[float] | None = None  # only to reject it: SAELens silently drops unknown fields

    @override
    @classmethod
    def architecture(cls) -> str:
        return "sampled_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_quota({"pool_quota": self.pool_quota})
        check_pool_fields(self)
        check(
            self.normalize_activations == "none",
            f"normalize_activations={self.normalize_activations!r}, which is not folded into the weights, must be "
            "'none'; sae_lens_sampled.load_checkpoint(folder) loads and folds a checkpoint from the middle of a run.",
        )


def refuse_quota(config: Mapping[str, Any]) -> None:
    """Reject a checkpoint whose pools had a quota for each level, an option that was removed.

    Raises:
        ValueError: naming the quota, if there is one.
    """
    quota = config.get("pool_quota")
    check(
        quota is None,
        f"pool_quota={quota} was an option of earlier versions that changed the pools. It was removed, so an SAE "
        "trained with it can neither be trained further nor select as in training. Its JumpReLU export still works.",
    )


def check_pool_fields(cfg: PoolFields) -> None:
    """Reject invalid values of the fields of the selection and the nested levels; 16.0 becomes 16, and inf None.

    Raises:
        ValueError: naming the field, its value, the reason and the way out.
    """
    for name in ("pool_group_size", "pool_seed"):
        value = getattr(cfg, name)
        if isinstance(value, float) and value.is_integer():
            setattr(cfg, name, int(value))  # 16.0, as JSON and spreadsheets write it, is 16
    if cfg.pool_factor == math.inf:  # command lines have no None
        cfg.pool_factor = None
    for name, types, what in FIELD_TYPES:
        value = getattr(cfg, name)
        check(
            isinstance(value, types) and not isinstance(value, bool),
            f"{name}={value!r} is a {type(value).__name__}; it must be {what}.",
        )
    check(0 < cfg.k <= cfg.d_sae, f"k={cfg.k} must be above 0 and at most d_sae={cfg.d_sae}.")
    check(
        cfg.pool_factor is None or cfg.pool_factor >= 1,
        f"pool_factor={cfg.pool_factor} must be at least 1: the k={cfg.k} entries kept per token are from "
        "k * pool_factor candidates. With None (inf on the command line) every latent is a candidate.",
    )
    check(
        cfg.score in SCORES,
        f"score={cfg.score!r} must be one of {', '.join(SCORES)}. Add your own with register_score.",
    )
    check(
        cfg.pool_sampling in get_args(PoolSampling),
        f"pool_sampling={cfg.pool_sampling!r} must be one of {', '.join(get_args(PoolSampling))}.",
    )
    check(
        not (cfg.score == "uniform" and cfg.pool_sampling == "top"),
        "score='uniform' is equal for all latents that fire, so pool_sampling='top' cannot rank them; "
        "use pool_sampling='proportional'.",
    )
    check(
        cfg.pool_group_size is None or cfg.pool_group_size >= 1,
        f"pool_group_size={cfg.pool_group_size} must be at least 1 token, or None for one pool per batch.",
    )
    _check_steps("pool_steps", cfg.pool_steps)
    check(
        cfg.pool_steps is None or cfg.n_candidates < cfg.d_sae,
        f"pool_steps={cfg.pool_steps} has no effect with pool_factor={cfg.pool_factor}: each of the "
        f"d_sae={cfg.d_sae} latents is a candidate from the first step. Leave out pool_steps or change pool_factor.",
    )
    _check_levels(cfg)


def _check_steps(name: str, steps: Any) -> None:
    check(
        steps is None or (_is_list_of([steps], int) and steps >= 1),
        f"{name}={steps!r} must be a whole number of training steps, at least 1, or None for all.",
    )


def _check_levels(cfg: PoolFields) -> None:
    widths = cfg.matryoshka_widths
    check(
        widths is None or (_is_list_of(widths, int) and widths[-1] == cfg.d_sae),
        f"matryoshka_widths={widths} must be a list of whole numbers that ends in d_sae={cfg.d_sae}, or None.",
    )
    ends: list[int] = [0, *(widths or [])]
    check(
        all(inner < outer for inner, outer in pairwise(ends)),
        f"matryoshka_widths={widths} must be positive and strictly increasing.",
    )


def _is_list_of(value: Any, types: type | tuple[type, ...]) -> bool:
    """Whether `value` is a non-empty list whose elements are all of these types; a bool is not an int."""
    is_list = isinstance(value, list) and len(value) > 0
    return is_list and all(isinstance(element, types) and not isinstance(element, bool) for element in value)


def check(condition: bool, message: str) -> None:
    """Raise a ValueError with `message` unless the condition holds."""
    if not condition:
        raise ValueError(message)
