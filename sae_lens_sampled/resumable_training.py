"""`sae-lens-sampled train`: SAELens' training on a language model from flags, made to lose nothing when it is stopped.

What this mends of SAELens 6.54 (its runner for many SAEs has only the last two): an interrupt saves the state of the
activations store alone, into a folder that does not exist, and dies of that; it comes in the middle of a step; and a
checkpoint whose writing was killed looks like a whole one.
"""

import os
import shlex
import shutil
import traceback
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import LanguageModelSAETrainingRunner, _parse_cfg_args
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from typing_extensions import override

from sae_lens_sampled.checkpoint_folder import find_checkpoint
from sae_lens_sampled.devices import check_device
from sae_lens_sampled.files import whole_folder
from sae_lens_sampled.input_checks import check_hook
from sae_lens_sampled.normalisation import UNFOLDED
from sae_lens_sampled.progress import live_bar
from sae_lens_sampled.signals import Interrupted, Signals


class TrainError(RuntimeError):
    """Training could not begin or go on; the message is the reason."""


def train(arguments: Sequence[str]) -> int:
    """Train with SAELens' flags; the exit status. A run that is stopped says how to go on with it.

    Raises:
        TrainError: with the reason, of whatever kind it was; an error that no flag or file causes is raised as it is.
    """
    runner = None
    with _reasons(), Signals() as signals:
        try:
            with live_bar():
                runner = ResumableRunner(_configure(arguments), arguments, signals)
                runner.run()
        except Interrupted as interrupted:
            checkpoint = None if runner is None else runner.checkpoint
            done = "before its first step" if checkpoint is None else f"with all that it did in {checkpoint}"
            typer.echo(
                f"Stopped by {interrupted.signal_name} {done}. Go on with\n{format_command(arguments, checkpoint)}",
                err=True,
            )
            return interrupted.exit_status
    return 0


class ResumableTrainer(SAETrainer[Any, Any]):
    """SAELens' trainer, stopped only between two steps; its checkpoints are there whole or not at all."""

    signals: Signals

    @override
    def maybe_reset_sparsity(self) -> dict[str, Any]:
        self.signals.release()  # nothing is half done here, nor while the step that begins waits for data
        # A window that was emptied right before a run was stopped is not logged again: its log would be of 0 / 0.
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
        with whole_folder(Path(run_folder) / checkpoint_name) as unfinished:
            return super().save_checkpoint(unfinished.name, unfinished.parent, wandb_aliases)


class ResumableRunner(LanguageModelSAETrainingRunner):
    """SAELens' runner that trains with it, says where checkpoints are, and writes one more when it is stopped."""

    checkpoint: Path | None = None
    """The one written when the run was stopped."""

    def __init__(self, cfg: LanguageModelSAERunnerConfig[Any], arguments: Sequence[str], signals: Signals) -> None:
        try:
            super().__init__(cfg)
        except OSError as error:
            if hasattr(self, "model"):  # errors of what is loaded after it name what they are about
                raise
            raise ValueError(f"model_name={cfg.model_name!r} cannot be loaded: {error}") from error
        if not cfg.use_cached_activations:
            check_hook(self.model, cfg)
        self.arguments = arguments
        self.signals = signals

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> TrainingSAE[Any]:
        resumed_at, run_folder = trainer.n_training_samples, self.cfg.checkpoint_path
        trainer.__class__ = ResumableTrainer  # SAELens' `run` makes the trainer itself
        trainer.signals = self.signals  # type: ignore[attr-defined]
        # Those passed before would all be written again, one a step.
        trainer.checkpoint_thresholds = [n for n in trainer.checkpoint_thresholds if n >= resumed_at]
        if resumed_at > 0 and _is_folded(trainer):
            return self._end_again(trainer)
        if run_folder is not None:
            self._announce(Path(run_folder))
        try:
            return trainer.fit()
        except Interrupted:
            if run_folder is not None and trainer.n_training_samples > resumed_at:
                trainer.save_checkpoint(str(trainer.n_training_samples))
                self.checkpoint = Path(run_folder) / str(trainer.n_training_samples)
            raise

    def _end_again(self, trainer: SAETrainer[Any, Any]) -> TrainingSAE[Any]:
        """The SAE of a run's final checkpoint; SAELens would estimate and fold its normalisation a second time."""
        if trainer.n_training_samples < trainer.cfg.total_training_samples:
            raise ValueError(
                f"{self.cfg.resume_from_checkpoint} is the end of a run, with normalize_activations folded into its "
                "weights, which cannot be trained further; resume from a checkpoint before it."
            )
        trainer.set_final_sae_metadata()
        return trainer.sae

    def _announce(self, run_folder: Path) -> None:
        """Say how to resume from the newest checkpoint: whoever kills the run leaves no time to say it later."""
        if self.cfg.resume_from_checkpoint is not None:
            _link_into(run_folder, Path(self.cfg.resume_from_checkpoint))
        typer.echo(
            f"Checkpoints go to {run_folder}: {self.cfg.n_checkpoints} (--n_checkpoints), and one if Ctrl-C or SIGTERM "
            f"stops the run. Go on from the newest with\n{format_command(self.arguments, run_folder)}",
            err=True,
        )


def format_command(arguments: Sequence[str], checkpoint: Path | None) -> str:
    """The command with these flags, resuming from `checkpoint`."""
    words, flag = list(arguments), "--resume_from_checkpoint"
    if checkpoint is not None:
        words = [
            word
            for before, word in zip(["", *words], words, strict=False)
            if flag not in (before, word) and not word.startswith(f"{flag}=")
        ]
        words += [flag, str(checkpoint)]
    return shlex.join(["sae-lens-sampled", "train", *words])


@contextmanager
def _reasons() -> Iterator[None]:
    try:
        yield
    except (AssertionError, AttributeError, NameError, TypeError):
        raise
    except Exception as error:  # those of parser, Hub, files and torch have no common base
        raise TrainError(_reason(error)) from error


def _reason(error: Exception) -> str:
    text = str(error)[:1000]  # TransformerLens names every model that it knows
    if isinstance(error, (ValueError, OSError, ArgumentError)):
        return text
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({innermost.filename}, line {innermost.lineno})"


def _configure(arguments: Sequence[str]) -> LanguageModelSAERunnerConfig[Any]:
    try:
        cfg = _parse_cfg_args(arguments)
    except ZeroDivisionError as error:
        names = "train_batch_size_tokens, wandb_log_frequency and feature_sampling_window"
        raise ValueError(f"one of {names} is 0, and SAELens divides by each.") from error
    if cfg.training_tokens <= 0:
        raise ValueError(f"training_tokens={cfg.training_tokens} must be above 0.")
    for name in ("device", "llm_device", "act_store_device"):
        check_device(getattr(cfg, name), name)
    if cfg.resume_from_checkpoint is not None:
        cfg.resume_from_checkpoint = str(find_checkpoint(Path(cfg.resume_from_checkpoint)))
    return cfg


def _is_folded(trainer: SAETrainer[Any, Any]) -> bool:
    scaler = trainer.activation_scaler
    is_estimated = scaler.scaling_factor is not None or scaler.whitening is not None
    return trainer.sae.cfg.normalize_activations in UNFOLDED and not is_estimated


def _link_into(run_folder: Path, checkpoint: Path) -> None:
    """Make the checkpoint one of this run's, at no cost where the file system has links."""
    copy = run_folder / checkpoint.name
    if not copy.exists():
        with whole_folder(copy) as unfinished:
            shutil.copytree(checkpoint, unfinished, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
