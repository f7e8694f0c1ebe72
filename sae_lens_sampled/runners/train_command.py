"""`sae-lens-sampled train`: SAELens' training on a language model, from flags, on one or several processes."""

import os
import shlex
import shutil
import traceback
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import typer
from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args

from sae_lens_sampled.files import atomic_path, link_or_copy
from sae_lens_sampled.runners.data_parallel import DataParallelRunner
from sae_lens_sampled.runners.processes import leave_processes, number_of_processes, rank_of_process
from sae_lens_sampled.runners.progress import live_bar
from sae_lens_sampled.runners.resumable import with_newest_checkpoint
from sae_lens_sampled.runners.run_checks import check_run
from sae_lens_sampled.runners.transcoder import TranscoderRunner
from sae_lens_sampled.sae.transcoder import SampledTopKTranscoderConfig
from sae_lens_sampled.signals import Interrupted, Signals


class TrainError(RuntimeError):
    """Training could not start or continue; the message is the reason."""


def train(arguments: Sequence[str]) -> int:
    """Train with SAELens' flags; returns the exit status. A stopped run prints how to resume it.

    If WORLD_SIZE is above 1, as in a process started by torchrun, this is one process of several.

    Raises:
        TrainError: with the reason, for any failure except unknown flags (SystemExit) and programming errors
            (AssertionError, AttributeError, NameError, TypeError), which propagate.
    """
    runner = None
    with _reasons(), Signals() as signals, ExitStack() as stack:
        is_first = rank_of_process() == 0
        stack.callback(leave_processes)
        try:
            stack.enter_context(live_bar())
            cfg = _configure(arguments)
            reads_two_hooks = isinstance(cfg.sae, SampledTopKTranscoderConfig)
            runner = (TranscoderRunner if reads_two_hooks else DataParallelRunner)(cfg)
            runner.signals = signals
            if is_first:
                runner.on_start = partial(_announce, arguments, cfg)
            runner.run()
        except Interrupted as interrupted:
            stack.close()  # closes the bar before anything is printed
            if is_first:
                checkpoint = None if runner is None else runner.checkpoint
                done = "without a new checkpoint" if checkpoint is None else f"with all progress saved in {checkpoint}"
                command = format_command(arguments, checkpoint)
                typer.echo(f"Stopped by {interrupted.signal_name} {done}. Continue with\n{command}", err=True)
            return interrupted.exit_status
    return 0


def format_command(arguments: Sequence[str], checkpoint: Path | None) -> str:
    """The command with these flags and the current number of processes; it resumes from `checkpoint`, if any."""
    words, flag = list(arguments), "--resume_from_checkpoint"
    if checkpoint is not None:
        words = [
            word
            for before, word in zip(["", *words], words, strict=False)
            if flag not in (before, word) and not word.startswith(f"{flag}=")
        ]
        words += [flag, str(checkpoint)]
    return shlex.join([*_program(), "train", *words])


def _program() -> list[str]:
    """The command before `train`; the flags by which torchrun's machines find each other are for the user to repeat."""
    if number_of_processes() == 1:
        return ["sae-lens-sampled"]
    n_nodes, n_local = (os.environ.get(name, "") for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = [] if n_nodes in ("", "1") else ["--nnodes", n_nodes]
    return ["torchrun", *nodes, "--nproc-per-node", n_local or str(number_of_processes()), "-m", "sae_lens_sampled"]


def _announce(arguments: Sequence[str], cfg: LanguageModelSAERunnerConfig[Any], run_folder: Path) -> None:
    """Print how to resume from the newest checkpoint: a run that is killed has no time to print it later."""
    if cfg.resume_from_checkpoint is not None:
        _link_into(run_folder, Path(cfg.resume_from_checkpoint))
    typer.echo(
        f"Checkpoints go to {run_folder}: {cfg.n_checkpoints} over all of training (--n_checkpoints), and another if "
        f"Ctrl-C or SIGTERM stops the run. Resume from the newest with\n{format_command(arguments, run_folder)}",
        err=True,
    )


def _link_into(run_folder: Path, checkpoint: Path) -> None:
    """Put the resumed checkpoint into this run's folder too; it takes no space if the file system has hard links."""
    copy = run_folder / checkpoint.name
    if not copy.exists():
        with atomic_path(copy, replace=True) as unfinished:
            shutil.copytree(checkpoint, unfinished, copy_function=link_or_copy)


@contextmanager
def _reasons() -> Iterator[None]:
    try:
        yield
    except (AssertionError, AttributeError, NameError, TypeError):
        raise
    except Exception as error:  # errors of parser, Hub, files and torch share no base
        raise TrainError(_reason(error)) from error


def _reason(error: Exception) -> str:
    text = str(error)[:1000]  # TransformerLens lists every model it knows
    if isinstance(error, (ValueError, OSError, ArgumentError)):
        return text
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({innermost.filename}, line {innermost.lineno})"


def _configure(arguments: Sequence[str]) -> LanguageModelSAERunnerConfig[Any]:
    try:
        cfg = _parse_cfg_args(arguments)
    except ZeroDivisionError as error:
        names = "train_batch_size_tokens, wandb_log_frequency and feature_sampling_window"
        raise ValueError(f"one of {names} is 0, but SAELens divides by each; set it to at least 1.") from error
    check_run(cfg)
    return with_newest_checkpoint(cfg)
