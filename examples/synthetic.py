"""Sampled-SAE and BatchTopK on data whose true features are known, through SAELens' SyntheticSAERunner.

    python examples/synthetic.py

The data follow SynthSAEBench (arXiv 2602.14687), scaled down: features that fire with Zipf-distributed
probabilities, a hierarchy, correlations, and fewer dimensions than features. About a minute on two CPU cores.
"""

import argparse

import torch
from sae_lens import BatchTopKTrainingSAEConfig, LoggingConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.synthetic import (
    HierarchyConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
    ZipfianFiringProbabilityConfig,
)

from sae_lens_sampled import SampledTopKTrainingSAEConfig

DATA = SyntheticModelConfig(
    num_features=512,
    hidden_dim=64,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.2, min_prob=2e-3),
    hierarchy=HierarchyConfig(total_root_nodes=32, branching_factor=4, max_depth=2, mutually_exclusive_portion=1.0),
    correlation=LowRankCorrelationConfig(rank=8),
    std_firing_magnitudes=0.5,
    mean_firing_magnitudes=4.0,
    seed=0,
)


def sae_configs(k: float) -> dict[str, TrainingSAEConfig]:
    shared = {"d_in": DATA.hidden_dim, "d_sae": 256, "k": k, "aux_loss_coefficient": 1 / 32}
    pools = {
        "pool_factor 3": {"pool_factor": 3},
        "pool_factor 5": {"pool_factor": 5},
        "pool_factor 5, groups of 16": {"pool_factor": 5, "pool_group_size": 16},
        "pool_factor 5, perplexity": {"pool_factor": 5, "score": "perplexity"},
    }
    return {
        "BatchTopK": BatchTopKTrainingSAEConfig(**shared),
        **{name: SampledTopKTrainingSAEConfig(**shared, **fields) for name, fields in pools.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="training steps of 256 samples")
    parser.add_argument("--k", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = SyntheticModel(DATA)
    print(f"{'':30}{'FVU':>8}{'MCC':>8}{'F1':>8}{'unique':>8}{'dead':>8}{'starved':>8}")
    for name, sae in sae_configs(args.k).items():
        torch.manual_seed(args.seed)
        cfg = SyntheticSAERunnerConfig(
            synthetic_model=DATA,
            sae=sae,
            training_samples=args.steps * 256,
            batch_size=256,
            lr=2e-3,
            lr_decay_steps=args.steps // 4,
            dead_feature_window=100,
            eval_samples=8192,
            output_path=None,
            checkpoint_path=None,
            logger=LoggingConfig(log_to_wandb=False),
        )
        result = SyntheticSAERunner(cfg, override_synthetic_model=data).run()
        scores = result.final_eval
        starved = result.sae.pool_statistics()["starved_share"] if hasattr(result.sae, "pool_statistics") else 0.0
        print(
            f"{name:30}{1 - scores.explained_variance:8.3f}{scores.mcc:8.3f}{scores.classification.f1_score:8.3f}"
            f"{scores.uniqueness:8.3f}{scores.dead_latents:8d}{starved:8.0%}"
        )


if __name__ == "__main__":
    main()
