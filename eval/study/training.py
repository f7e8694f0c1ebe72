"""Stage `train`: the SAEs of a study, several in one run of SAELens' MultiSAETrainingRunner."""

from collections.abc import Sequence
from functools import cache

import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.util import str_to_dtype
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_sampled.files import atomic_path
from sae_lens_sampled.runners.activation_cache import cache_activations, shuffled_batches, text_store
from sae_lens_sampled.runners.progress import live_bar
from smollm2 import smollm2_folder
from study.configs import Study
from study.plan import Unit, sae_config, trained_config
from study.storage import Storage


def train(storage: Storage, units: Sequence[Unit]) -> None:
    """Train and save `units`, SAEs of one seed, in one run.

    Whichever run they are trained in, SAEs of one seed and shape start from the same weights, and those of one seed and
    value of `shuffled` see the same activations in the same order (with `cached`, all of one seed do).
    """
    study, seed, shuffled = storage.study, units[0].seed, units[0].arm.shuffled
    by_name = {unit.name: unit for unit in units}
    runner = MultiSAETrainingRunner(
        runner_config(study, units, seed, shuffled),
        override_model=language_model(study),
        override_saes={unit.name: new_sae(study, unit) for unit in units},
    )
    if study.cached:
        activations = cached_activations(storage)
        batches = shuffled_batches(activations, study.batch_size, seed)
        provider = ({study.hook: batch.to(study.device)} for batch in batches)
        runner.activations_store.get_multi_hook_data_loader = lambda: provider
    else:
        runner.activations_store.shuffle_input_dataset(seed=seed, buffer_size=1000)
        torch.manual_seed(seed)  # the store mixes activations with torch's generator
    with live_bar():
        trained = runner.run()
    for name, sae in trained.items():
        with atomic_path(storage.cache / "saes" / name) as folder:
            folder.mkdir(parents=True)
            saved_as(study, by_name[name], sae).save_model(folder)


def cached_activations(storage: Storage) -> Tensor:
    """Activations that all SAEs of the study are trained on, shape (tokens, d_in); the first call runs the model."""
    study = storage.study
    store = text_store(
        language_model(study), study.dataset, study.hook, study.d_in, study.context_size, device=study.device
    )
    settings = {"model": study.model, "hook": study.hook}  # the folder's name has a hash of the rest
    return cache_activations(store, study.steps * study.batch_size, storage.activations, settings)


def runner_config(study: Study, units: Sequence[Unit], seed: int, shuffled: bool) -> MultiSAETrainingRunnerConfig:
    steps = steps_of(study, units[0])
    return MultiSAETrainingRunnerConfig(
        saes={unit.name: trained_config(study, unit.arm, unit.seed) for unit in units},
        hook_names=study.hook,
        model_name=model_path(study.model),
        model_from_pretrained_kwargs={} if study.dtype == "float32" else {"dtype": study.dtype},
        dataset_path=study.dataset,
        context_size=study.context_size,
        training_tokens=steps * study.batch_size,
        train_batch_size_tokens=study.batch_size,
        store_batch_size_prompts=32,
        n_batches_in_buffer=study.mixed_prompts,
        activations_mixing_fraction=0.5 if shuffled else 0.0,
        exclude_special_tokens=True,
        lr=study.lr,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        dead_feature_window=round(units[0].arm.steps_share * study.dead_window),
        seed=seed,
        device=study.device,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )


def new_sae(study: Study, unit: Unit) -> TrainingSAE:
    """An untrained SAE; SAEs of one seed and shape start from the same weights."""
    torch.manual_seed(unit.seed)
    sae = _new(trained_config(study, unit.arm, unit.seed))
    if unit.arm.frozen_decoder:
        sae.W_dec.requires_grad_(False)
    return sae


def steps_of(study: Study, unit: Unit) -> int:
    """Training steps of an SAE."""
    return round(unit.arm.steps_share * study.steps)


def saved_as(study: Study, unit: Unit, sae: TrainingSAE) -> TrainingSAE:
    """A trained SAE in its arm's own class, converted if this package's class trained it instead.

    The threshold of an arm that trains for only a share of the steps is corrected: SAELens exports BatchTopK with a
    running mean of cutoffs that starts at 0 and is still far too low then, so more than k latents per token would fire.
    """
    config = sae_config(study, unit.arm, unit.seed)
    if type(config) is type(sae.cfg):
        of_arm = sae
    else:
        config.metadata = sae.cfg.metadata
        of_arm = _new(config)
        missing, _ = of_arm.load_state_dict(sae.state_dict(), strict=False)
        assert not missing, missing
    if unit.arm.steps_share < 1:
        assert isinstance(config, BatchTopKTrainingSAEConfig)
        reached = 1 - (1 - config.topk_threshold_lr) ** steps_of(study, unit)
        of_arm.get_buffer("topk_threshold").div_(reached)
    return of_arm


def _new(config: TrainingSAEConfig) -> TrainingSAE:
    return get_sae_training_class(config.architecture())[0](config)


def language_model(study: Study) -> TransformerBridge:
    """The study's model, loaded once."""
    return _language_model(study.model, study.device, study.dtype)


@cache
def _language_model(model: str, device: str, dtype: str) -> TransformerBridge:
    return TransformerBridge.boot_transformers(model_path(model), device=device, dtype=str_to_dtype(dtype))


def model_path(model: str) -> str:
    """The Hub name or folder to load the model from; the folder of smollm2 is made on first use."""
    return str(smollm2_folder()) if model == "smollm2" else model
