"""Sampled-SAE (arXiv 2508.21324) for SAELens: importing this registers the architecture `sampled_topk`."""

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class

from sae_lens_sampled.config import SampledTopKTrainingSAEConfig
from sae_lens_sampled.scores import SCORES, register_score
from sae_lens_sampled.training import SampledTopKTrainingSAE

__version__ = "0.1.0"

__all__ = [
    "SCORES",
    "SampledTopKTrainingSAE",
    "SampledTopKTrainingSAEConfig",
    "register_score",
]

# SAELens refuses a name twice; reloading this module must be harmless.
if SampledTopKTrainingSAEConfig.architecture() not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(
        SampledTopKTrainingSAEConfig.architecture(), SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig
    )
