"""Stage `synthetic`: the same arms on data with known features."""

import json

import torch
from sae_lens import LoggingConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.synthetic import (
    SyntheticModel,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
    eval_sae_on_synthetic_data,
)

from sae_lens_sampled import SampledTopKTrainingSAE
from sae_lens_sampled.saebench import load_saes
from study.known_features import synthetic_data
from study.plan import Unit, synthetic_config
from study.storage import Storage
from study.true_absorption import true_absorption


def run_synthetic(storage: Storage, unit: Unit) -> None:
    """Train one SAE, and compare its export with the features that the data were made from."""
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
    torch.manual_seed(unit.seed)  # so that SAEs of one shape start from the same weights in every arm
    runner = SyntheticSAERunner(cfg, override_synthetic_model=data)
    torch.manual_seed(unit.seed)  # so that every arm sees the same data
    trained = runner.run().sae
    metrics = evaluate_on_synthetic_data(trained, data, synthetic.eval_samples, synthetic.batch_size, study.device)
    pools = trained.pool_statistics() if isinstance(trained, SampledTopKTrainingSAE) else {}
    result = {"arm": unit.arm.name, "seed": unit.seed, "metrics": metrics, "pools": pools, "device": storage.device}
    storage.synthetic.append(result)


def evaluate_on_synthetic_data(
    trained: TrainingSAE, data: SyntheticModel, n_samples: int, batch_size: int, device: str
) -> dict[str, float]:
    """Metrics of an SAE's export and of its selection in training; also absorption if features have children."""
    [exported] = load_saes([("export", trained)], device)
    evaluations = []
    for sae in (exported.sae, trained.eval()):
        torch.manual_seed(0)
        evaluation = eval_sae_on_synthetic_data(
            sae, data.feature_dict, data.activation_generator, num_samples=n_samples, batch_size=batch_size
        )
        evaluations.append(evaluation)
    export, in_training = evaluations
    absorption = {} if data.hierarchy is None else true_absorption(exported.sae, data, n_samples, batch_size)
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
        **absorption,
    }
