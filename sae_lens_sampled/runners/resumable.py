"""SAELens' runner and trainer on a language model, changed so that a run stopped by a signal loses no training step.

What this fixes in SAELens 6.54 (MultiSAETrainingRunner has only the last three problems): an interrupt saves only the
state of the activations store, into a folder that does not exist, and crashes; it may come in the middle of a step; a
checkpoint looks complete even if the process was killed while writing it; and with `prefetch_llm_batches` a resumed run
seeks its position in the text while another thread is already reading on.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from pathlib import Path
from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner, LLMSaeEvaluator
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.prefetch import PrefetchingIterator
from sae_lens.training.sae_trainer import SAETrainer
from sae_lens.training.types import DataProvider
from torch import Tensor
from typing_extensions import override

from sae_lens_sampled.files import atomic_path
from sae_lens_sampled.folders import UNFOLDED, find_checkpoint, read_config
from sae_lens_sampled.runners.hooks import heads_side_by_side, is_split, switch_on
from sae_lens_sampled.runners.patches import adopt_trainer
from sae_lens_sampled.runners.run_checks import check_hook, check_run, check_same_activations
from sae_lens_sampled.runners.stores import reporting_short_text
from sae_lens_sampled.runners.training_data import remember_settings
from sae_lens_sampled.sae.checks import check_same_weights
from sae_lens_sampled.signals import Interrupted, Signals


class ResumableTrainer(SAETrainer[Any, Any]):
    """SAELens' trainer, stopped only between two steps; its checkpoints are complete or absent."""

    signals: Signals

    def stop_if_asked(self) -> None:
        """Raise `Interrupted` for a pending signal: no step is half done now, nor while the next one waits for data."""
        self.signals.release()

    @override
    def maybe_reset_sparsity(self) -> dict[str, Any]:
        self.stop_if_asked()
        # A window that was emptied right before the run was stopped is not logged again: its means would be 0 / 0.
        return super().maybe_reset_sparsity() if self.n_frac_active_samples > 0 else {}

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        self.signals.hold()
        return super().step(batch)

    @override
    def save_checkpoint(
        self, checkpoint_name: str, base_path: Path | str | None = None, wandb_aliases: list[str] | None = None
    ) -> None:
        run_folder = base_path or self.cfg.checkpoint_path
        if run_folder is None:
            return super().save_checkpoint(checkpoint_name, base_path, wandb_aliases)
        with atomic_path(Path(run_folder) / checkpoint_name, replace=True) as unfinished:
            return super().save_checkpoint(unfinished.name, unfinished.parent, wandb_aliases)


class ChangedModelEvaluator(LLMSaeEvaluator[Any]):
    """SAELens' evaluation on a changed model, which no prefetching thread runs meanwhile.

    SAELens pauses that thread too, but only within its own `__call__`.
    """

    def changed(self, sae: TrainingSAE[Any]) -> AbstractContextManager[TrainingSAE[Any]]:
        """Context in which the model is changed; it yields the SAE to evaluate."""
        raise NotImplementedError

    @override
    def __call__(
        self, sae: TrainingSAE[Any], data_provider: DataProvider, activation_scaler: ActivationScaler
    ) -> dict[str, Any]:
        paused = data_provider.paused() if isinstance(data_provider, PrefetchingIterator) else nullcontext()
        with paused, self.changed(sae) as evaluated:
            # SAELens uses the data provider only to pause it, and the lock cannot be taken twice.
            return super().__call__(evaluated, iter(()), activation_scaler)


class WholeHookEvaluator(ChangedModelEvaluator):
    """SAELens' evaluation, with the heads of any hook side by side, as the SAE was trained on them."""

    @override
    @contextmanager
    def changed(self, sae: TrainingSAE[Any]) -> Iterator[TrainingSAE[Any]]:
        metadata = sae.cfg.metadata
        whole = metadata.hook_head_index is None and not is_split(str(metadata.hook_name))
        with heads_side_by_side(self.model, [str(metadata.hook_name)] if whole else []):
            yield sae


class ResumableRunner(LanguageModelSAETrainingRunner):
    """SAELens' runner with a `ResumableTrainer`; reports its checkpoint folder, and saves a checkpoint when stopped.

    `resume_from_checkpoint` may also be the folder of a run, which is resumed from its newest complete checkpoint.

    Raises:
        ValueError: at the start, if a number in the config is invalid, there is no complete checkpoint to resume from
            or it is of another kind of SAE or from other activations, model, text or cached activations cannot be
            loaded, the text has no rows, or the hook is missing, cannot be switched on or is not `d_in` wide. In `run`,
            if a final checkpoint with folded normalisation is to be trained further.
    """

    signals: Signals | None = None
    """Set if the caller already handles signals; otherwise `run` does, while it runs."""
    on_start: Callable[[Path], None] | None = None
    """Called with the folder of the run's checkpoints, if it has one, right before training starts."""
    checkpoint: Path | None = None
    """The checkpoint written when the run was stopped; None without new steps or a folder for checkpoints."""

    def __init__(self, cfg: LanguageModelSAERunnerConfig[Any], **overrides: Any) -> None:
        check_run(cfg)
        if cfg.use_cached_activations and not Path(str(cfg.cached_activations_path)).is_dir():
            raise ValueError(
                f"cached_activations_path={cfg.cached_activations_path!r} is not a folder; cache the activations there "
                "with SAELens' CacheActivationsRunner, or set use_cached_activations to False."
            )
        cfg = with_newest_checkpoint(cfg)
        given = {name for name, value in overrides.items() if value is not None}
        if cfg.resume_from_checkpoint is not None:
            _check_same_run(cfg, "override_model" in given, overrides.get("override_sae"))
        text = "override_dataset" if "override_dataset" in given else f"dataset_path={cfg.dataset_path!r}"
        try:
            with reporting_short_text(text):
                super().__init__(cfg, **overrides)
        except OSError as error:
            if hasattr(self, "activations_store"):  # later loading errors name their own cause
                raise
            names = ["dataset_path"] if hasattr(self, "model") else ["model_name"]
            names += ["cached_activations_path"] * (hasattr(self, "model") and cfg.use_cached_activations)
            named = " or ".join(f"{name}={getattr(cfg, name)!r}" for name in names)
            raise ValueError(f"{named} cannot be loaded: {error}") from error
        switch_on(self.model, [cfg.hook_name])
        self.evaluator = WholeHookEvaluator(**vars(self.evaluator))
        if not cfg.use_cached_activations:
            check_hook(self.model, cfg)

    @override
    def run(self) -> TrainingSAE[Any]:
        if self.cfg.resume_from_checkpoint is not None:
            self.activations_store.load_from_checkpoint(self.cfg.resume_from_checkpoint)  # twice changes nothing
        if self.signals is not None:
            return super().run()
        with Signals() as self.signals:
            try:
                return super().run()
            finally:
                self.signals = None

    @override
    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        remember_settings(self.sae.cfg.metadata, self.cfg)

    def adopt(self, trainer: SAETrainer[Any, Any]) -> None:
        """Make the trainer, which SAELens' `run` has created, one of ours."""
        assert self.signals is not None  # set by `run`
        adopt_trainer(trainer, ResumableTrainer).signals = self.signals
        # SAELens would write all checkpoints already passed again, one per step.
        resumed_at = trainer.n_training_samples
        trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n >= resumed_at]

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> TrainingSAE[Any]:
        resumed_at, run_folder = trainer.n_training_samples, self.cfg.checkpoint_path
        self.adopt(trainer)
        if resumed_at > 0 and _is_folded(trainer):
            return self._end_again(trainer)
        if run_folder is not None and self.on_start is not None:
            self.on_start(Path(run_folder))
        try:
            return trainer.fit()
        except Interrupted:
            if run_folder is not None and trainer.n_training_samples > resumed_at:
                trainer.save_checkpoint(str(trainer.n_training_samples))
                self.checkpoint = Path(run_folder) / str(trainer.n_training_samples)
            raise

    def _end_again(self, trainer: SAETrainer[Any, Any]) -> TrainingSAE[Any]:
        """The SAE of a run's final checkpoint; SAELens would estimate and fold its normalisation a second time.

        Raises:
            ValueError: if the run is to train further.
        """
        if trainer.n_training_samples < trainer.cfg.total_training_samples:
            raise ValueError(
                f"resume_from_checkpoint={self.cfg.resume_from_checkpoint} is the final checkpoint of a run, with "
                "normalize_activations folded into its weights, so it cannot be trained further; resume from an "
                "earlier checkpoint."
            )
        trainer.sae.cfg.normalize_activations = "none"  # as in the checkpoint: it is folded into the weights
        trainer.set_final_sae_metadata()
        return trainer.sae


def with_newest_checkpoint(cfg: LanguageModelSAERunnerConfig[Any]) -> LanguageModelSAERunnerConfig[Any]:
    """`cfg`, or if it has a `resume_from_checkpoint`, a copy with the checkpoint that `find_checkpoint` finds there.

    Raises:
        ValueError: if there is none; the message names the newest complete one beside the folder, if any.
    """
    if cfg.resume_from_checkpoint is None:
        return cfg
    found = copy(cfg)
    found.resume_from_checkpoint = str(find_checkpoint(Path(cfg.resume_from_checkpoint)))
    return found


def _check_same_run(
    cfg: LanguageModelSAERunnerConfig[Any], own_model: bool, override_sae: TrainingSAE[Any] | None
) -> None:
    """Reject a checkpoint of another kind of SAE or from other activations, before anything is loaded."""
    checkpoint = Path(str(cfg.resume_from_checkpoint))
    if override_sae is not None:
        check_same_weights(checkpoint, override_sae.cfg.to_dict())
    elif cfg.from_pretrained_path is not None:
        check_same_weights(checkpoint, read_config(Path(cfg.from_pretrained_path)))
    else:
        check_same_weights(checkpoint, cfg.get_training_sae_cfg_dict())
    check_same_activations(checkpoint, cfg, own_model)


def _is_folded(trainer: SAETrainer[Any, Any]) -> bool:
    scaler = trainer.activation_scaler
    is_estimated = scaler.scaling_factor is not None or scaler.whitening is not None
    return trainer.sae.cfg.normalize_activations in UNFOLDED and not is_estimated
