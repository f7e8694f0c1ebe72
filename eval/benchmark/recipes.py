"""Features by SynthSAEBench's recipe (arXiv 2602.14687), at its own size and at a size that two CPU cores can train."""

from dataclasses import replace

from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)

RECIPE_16K = SyntheticModelConfig(
    num_features=16_384,
    hidden_dim=768,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
    hierarchy=HierarchyConfig(
        total_root_nodes=128,
        branching_factor=4,
        max_depth=3,
        mutually_exclusive_portion=1.0,
        compensate_probabilities=True,
        scale_children_by_parent=True,
    ),
    orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
    correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
    bias=0.5,
    seed=42,
)
"""SynthSAEBench-16k, as in SAELens' documentation."""


def small_recipe(seed: int, **hierarchy: bool) -> SyntheticModelConfig:
    """The recipe with 512 features in 96 dimensions."""
    return replace(
        RECIPE_16K,
        num_features=512,
        hidden_dim=96,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.3, min_prob=2e-3),
        hierarchy=replace(RECIPE_16K.hierarchy, total_root_nodes=16, max_depth=2, **hierarchy),
        orthogonalization=OrthogonalizationConfig(num_steps=100),
        correlation=LowRankCorrelationConfig(rank=8, correlation_scale=0.1),
        seed=seed,
    )


PLAIN = {"compensate_probabilities": False, "scale_children_by_parent": False}
