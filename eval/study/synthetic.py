"""Stage `synthetic`: the same arms on data whose features are known."""

import json
from functools import cache

import torch
from sae_lens import LoggingConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.synthetic import (
    FeatureDictionary,
    SyntheticModel,
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
    eval_sae_on_synthetic_data,
)
from torch import Tensor

from sae_lens_sampled import SampledTopKTrainingSAE
from sae_lens_sampled.saebench import load_saes
from study.plan import Unit, synthetic_config
from study.storage import Storage


def run_synthetic(storage: Storage, unit: Unit) -> None:
    """Train one SAE, and compare its export with the features that the data were made of."""
    study, synthetic = storage.study, storage.study.synthetic
    data = synthetic_data(json.dumps(synthetic.data.to_dict()), study.device)
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=synthetic.data,
        sae=synthetic_config(study, unit.arm, unit.seed),
        training_samples=synthetic.steps * synthetic.batch_size,
        batch_size=synthetic.batch_size,
        lr=synthetic.lr,
        lr_warm_up_steps=synthetic.steps // 20,
        lr_decay_steps=synthetic.steps // 5,
        dead_feature_window=synthetic.dead_window,
        run_final_eval=False,
        output_path=None,
        checkpoint_path=None,
        device=study.device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    torch.manual_seed(unit.seed)  # the SAE starts from the same weights in every arm
    runner = SyntheticSAERunner(cfg, override_synthetic_model=data)
    torch.manual_seed(unit.seed)  # and the data are the same
    trained = runner.run().sae
    metrics = evaluate_on_synthetic_data(trained, data, synthetic.eval_samples, synthetic.batch_size, study.device)
    pools = trained.pool_statistics() if isinstance(trained, SampledTopKTrainingSAE) else {}
    result = {"arm": unit.arm.name, "seed": unit.seed, "metrics": metrics, "pools": pools, "device": storage.device}
    storage.synthetic.append(result)


def evaluate_on_synthetic_data(
    trained: TrainingSAE, data: SyntheticModel, n_samples: int, batch_size: int, device: str
) -> dict[str, float]:
    """Metrics of an SAE's export, and of the SAE as it selects in training."""
    [exported] = load_saes([("export", trained)], device)
    evaluations = []
    for sae in (exported.sae, trained.eval()):
        torch.manual_seed(0)
        evaluation = eval_sae_on_synthetic_data(
            sae, data.feature_dict, data.activation_generator, num_samples=n_samples, batch_size=batch_size
        )
        evaluations.append(evaluation)
    export, in_training = evaluations
    return {
        "fvu": 1 - export.explained_variance,
        "fvu_in_training": 1 - in_training.explained_variance,
        "l0": export.sae_l0,
        "l0_in_training": in_training.sae_l0,
        "mcc": export.mcc,
        "f1": export.classification.f1_score,
        "precision": export.classification.precision,
        "recall": export.classification.recall,
        "uniqueness": export.uniqueness,
        "dead": export.dead_latents / exported.sae.cfg.d_sae,
    }


@cache
def synthetic_data(config: str, device: str) -> SyntheticModel:
    """The features of a config, which is JSON."""
    return SyntheticModel(SyntheticModelConfig.from_dict(json.loads(config)), device=device)


def large_synthetic_model(config: SyntheticModelConfig, device: str) -> SyntheticModel:
    """The host's model of a config, where its own way to 16,384 features takes most of an hour on two CPU cores."""
    assert config.orthogonalization is not None
    features = FeatureDictionary(
        config.num_features, config.hidden_dim, config.bias, initializer=None, device=device, seed=config.seed
    )
    num_steps, lr = config.orthogonalization.num_steps, config.orthogonalization.lr
    features.feature_vectors.data = orthogonalized(features.feature_vectors.data, num_steps, lr)
    return SyntheticModel(config, feature_dict=features, device=device)


def orthogonalized(vectors: Tensor, num_steps: int, lr: float) -> Tensor:
    """SAELens' `orthogonalize_embeddings`, with the gradient of its loss in closed form.

    The loss is sum_{i != j} <e_i, e_j>^2 + n sum_i (|e_i|^2 - 1)^2. Its gradient needs E^T E alone, which is (width,
    width), not (features, features). Equal to rounding.
    """
    vectors = (vectors / vectors.norm(dim=1, keepdim=True)).requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=lr)
    for _ in range(num_steps):
        with torch.no_grad():
            squares = vectors.square().sum(1, keepdim=True)
            off_diagonal = vectors @ (vectors.T @ vectors) - squares * vectors
            vectors.grad = 4 * off_diagonal + 4 * len(vectors) * (squares - 1) * vectors
        optimizer.step()
    vectors = vectors.detach()
    return vectors / vectors.norm(dim=1, keepdim=True)
