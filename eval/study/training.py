"""Stage `train`: the SAEs of a study, several in one run of SAELens' MultiSAETrainingRunner."""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from sae_lens import ActivationsStore, LoggingConfig, MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
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

CUTOFF_BATCHES = 4
"""Number of batches that a control's threshold is computed from."""


def train(storage: Storage, units: Sequence[Unit]) -> None:
    """Train and save `units`, SAEs of one seed, in one run.

    Whichever run they are trained in, SAEs of one seed and shape start from the same weights, and those of one seed and
    value of `shuffled` see the same activations in the same order (with `cached`, all of one seed do).
    """
    study, seed, shuffled = storage.study, units[0].seed, units[0].arm.shuffled
    by_name = {unit.name: unit for unit in units}
    saes = {unit.name: new_sae(study, unit) for unit in units}
    if frozen := [unit.name for unit in units if unit.arm.frozen_decoder]:
        mean = mean_activation(study)  # which such a decoder would have to learn by its bias alone, too slowly
        for name in frozen:
            saes[name].b_dec.data.copy_(mean)
    runner = MultiSAETrainingRunner(
        runner_config(study, units, seed, shuffled),
        override_model=language_model(study),
        override_saes=saes,
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
    shown = []
    if units[0].arm.steps_share < 1:
        batches = runner.activations_store.get_multi_hook_data_loader()
        shown = [next(batches)[study.hook] for _ in range(CUTOFF_BATCHES)]
    for name, sae in trained.items():
        of_arm = saved_as(study, by_name[name], sae)
        if shown:
            set_threshold(of_arm, shown)
        with atomic_path(storage.cache / "saes" / name) as folder:
            folder.mkdir(parents=True)
            of_arm.save_model(folder)


def mean_activation(study: Study) -> Tensor:
    """Mean of the activations of the training text's first prompts, shape (d_in,)."""
    return training_store(study).get_filtered_llm_batch().float().mean(dim=0)


def training_store(study: Study) -> ActivationsStore:
    """An unused store of the training text, in its order."""
    return text_store(
        language_model(study), study.dataset, study.hook, study.d_in, study.context_size, device=study.device
    )


def cached_activations(storage: Storage) -> Tensor:
    """Activations that all SAEs of the study are trained on, shape (tokens, d_in); the first call runs the model."""
    study = storage.study
    settings = {"model": study.model, "hook": study.hook}  # the folder's name has a hash of the rest
    return cache_activations(training_store(study), study.steps * study.batch_size, storage.activations, settings)


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
    """An untrained SAE; SAEs of one seed and shape start from the same weights, up to a frozen decoder's norm."""
    torch.manual_seed(unit.seed)
    config = trained_config(study, unit.arm, unit.seed)
    if unit.arm.frozen_decoder:
        config = replace(config, decoder_init_norm=1.0)  # 0.1, the default, is too short for a norm that cannot grow
    sae = _new(config)
    if unit.arm.frozen_decoder:
        sae.W_dec.requires_grad_(False)
    return sae


def steps_of(study: Study, unit: Unit) -> int:
    """Training steps of an SAE."""
    return round(unit.arm.steps_share * study.steps)


def saved_as(study: Study, unit: Unit, sae: TrainingSAE) -> TrainingSAE:
    """A trained SAE in its arm's own class, converted if this package's class trained it instead."""
    config = sae_config(study, unit.arm, unit.seed)
    if type(config) is type(sae.cfg):
        return sae
    config.metadata = sae.cfg.metadata
    of_arm = _new(config)
    missing, _ = of_arm.load_state_dict(sae.state_dict(), strict=False)
    assert not missing, missing
    return of_arm


@torch.no_grad()
def set_threshold(sae: TrainingSAE, batches: Sequence[Tensor]) -> None:
    """Set BatchTopK's threshold to the mean of its cutoffs on `batches`, in place of SAELens' running mean.

    The running mean starts at 0 and has a rate of 0.01, so after few steps it is far below the cutoffs, which still
    rise then: more than k latents per token would fire.
    """
    acts = [sae.encode(batch.to(sae.device)) for batch in batches]
    sae.get_buffer("topk_threshold").fill_(statistics.fmean(of[of > 0].min().item() for of in acts))


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
