"""Sampled-SAE (arXiv 2508.21324) for SAELens: registers `sampled_topk` and `sampled_topk_transcoder` on import."""

from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)

from sae_lens_sampled.hub.upload import HubError, upload_to_hub
from sae_lens_sampled.runners.data_parallel import DataParallelRunner
from sae_lens_sampled.runners.transcoder import TranscoderRunner, as_sae_on_outputs
from sae_lens_sampled.sae.calibration import CalibrationReport, calibrate_thresholds
from sae_lens_sampled.sae.config import SampledTopKSAEConfig, SampledTopKTrainingSAEConfig
from sae_lens_sampled.sae.export import to_jumprelu
from sae_lens_sampled.sae.inference import SampledTopKSAE, load_checkpoint
from sae_lens_sampled.sae.training import SampledTopKTrainingSAE
from sae_lens_sampled.sae.transcoder import SampledTopKTranscoder, SampledTopKTranscoderConfig
from sae_lens_sampled.sae.warm_start import from_batchtopk
from sae_lens_sampled.step.scores import SCORES, register_score

__version__ = "0.1.0"

__all__ = [
    "SCORES",
    "CalibrationReport",
    "DataParallelRunner",
    "HubError",
    "SampledTopKSAE",
    "SampledTopKSAEConfig",
    "SampledTopKTrainingSAE",
    "SampledTopKTrainingSAEConfig",
    "SampledTopKTranscoder",
    "SampledTopKTranscoderConfig",
    "TranscoderRunner",
    "as_sae_on_outputs",
    "calibrate_thresholds",
    "from_batchtopk",
    "load_checkpoint",
    "register_score",
    "to_jumprelu",
    "upload_to_hub",
]

# SAELens rejects duplicate names; reloading this module must be harmless.
if "sampled_topk" not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class("sampled_topk", SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig)
if "sampled_topk_transcoder" not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class("sampled_topk_transcoder", SampledTopKTranscoder, SampledTopKTranscoderConfig)
if "sampled_topk" not in SAE_CLASS_REGISTRY:
    register_sae_class("sampled_topk", SampledTopKSAE, SampledTopKSAEConfig)
