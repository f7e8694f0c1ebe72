"""Worker process that runs `DataParallelRunner` on every case in turn; imported before the process is forked."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import wandb
from sae_lens import ActivationsStore, LanguageModelSAERunnerConfig, LoggingConfig, SAETrainer
from torch import Tensor

from sae_lens_sampled import (
    DataParallelRunner,
    SampledTopKTrainingSAE,
    SampledTopKTrainingSAEConfig,
    SampledTopKTranscoder,
    SampledTopKTranscoderConfig,
    TranscoderRunner,
)
from sae_lens_sampled.runners.processes import leave_processes
from sae_lens_sampled.signals import Interrupted

BATCH, N_STEPS, TIMEOUT = 128, 16, timedelta(seconds=3)
NORMALISED = ("expected_average_only_in", "covariance_whitening")


def sae(seed: int, normalize: str) -> SampledTopKTrainingSAE:
    torch.manual_seed(seed)
    config = SampledTopKTrainingSAEConfig(
        d_in=128,
        d_sae=192,
        k=4,
        pool_factor=3,
        normalize_activations=normalize,
        pool_group_size=16 if normalize == "covariance_whitening" else None,
    )
    return SampledTopKTrainingSAE(config)


def transcoder(seed: int) -> SampledTopKTranscoder:
    torch.manual_seed(seed)
    fields: dict[str, Any] = {"d_in": 128, "d_sae": 192, "k": 4, "pool_factor": 3, "skip": True}
    return SampledTopKTranscoder(SampledTopKTranscoderConfig(hook_name_out="gpt_neox.layers.2.mlp", **fields))


def transcoder_config(model: Path, folder: Path) -> LanguageModelSAERunnerConfig[Any]:
    hook_name = "gpt_neox.layers.2.post_attention_layernorm"
    return runner_config(model, folder, "none", sae=transcoder(0).cfg, hook_name=hook_name)


def runner_config(model: Path, folder: Path, normalize: str, **fields: Any) -> LanguageModelSAERunnerConfig[Any]:
    """Config whose activations come in the order of the text, so that batches of two stores can be put together."""
    data: dict[str, Any] = {
        "model_class_name": "AutoModelForCausalLM",
        "model_name": str(model),
        "hook_name": "gpt_neox.layers.2",
        "dataset_path": str(model / "text"),
        "is_dataset_tokenized": False,
        "context_size": 32,
        "activations_mixing_fraction": 0,
        "training_tokens": BATCH * N_STEPS,
        "train_batch_size_tokens": BATCH,
        "store_batch_size_prompts": 2,
        "n_batches_in_buffer": 4,
        "n_batches_for_norm_estimate": 3,
        "lr": 1e-3,
        "dead_feature_window": 3,
        "feature_sampling_window": 6,
        "n_checkpoints": 1,
        "save_final_checkpoint": True,
        "checkpoint_path": str(folder / "checkpoints"),
        "output_path": str(folder / "output"),
        "logger": LoggingConfig(log_to_wandb=False),
        "verbose": False,
    }
    return LanguageModelSAERunnerConfig(**({"sae": sae(0, normalize).cfg} | data | fields))


def runner(rank: int, cfg: LanguageModelSAERunnerConfig[Any], timeout: float = 60) -> DataParallelRunner:
    """Runner with different weights on every rank, of which those of rank 0 are used."""
    own = sae(rank, cfg.sae.normalize_activations)
    return DataParallelRunner(cfg, override_sae=own, timeout=timedelta(seconds=timeout))


def result_of(run: DataParallelRunner) -> dict[str, Any]:
    """State of the trainer, its SAE and the scaler after a run, and the position of this process in its text."""
    made: list[SAETrainer] = []
    fit, estimates = SAETrainer.fit, []

    def spied_fit(self):
        made.append(self)
        estimate = {name: getattr(self.activation_scaler, name) for name in SCALERS}

        def estimating(name):
            estimate[name](self.sae.cfg.d_in, self.data_provider, self.cfg.n_batches_for_norm_estimate)
            estimates.append((self.activation_scaler.scaling_factor, self.activation_scaler.whitening))

        for name in SCALERS:
            setattr(self.activation_scaler, name, lambda name=name, **given: estimating(name))
        return fit(self)

    SAETrainer.fit = spied_fit
    try:
        run.run()
    finally:
        SAETrainer.fit = fit
    (trainer,) = made
    return {
        "state": trainer.sae.state_dict(),
        "counters": [trainer.n_training_samples, trainer.n_training_steps, trainer.n_frac_active_samples],
        "act_freq_scores": trainer.act_freq_scores,
        "since_fired": trainer.n_forward_passes_since_fired,
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "estimates": estimates,
        "l0": trainer.sae.cfg.metadata.l0,
        "checkpoint_path": run.cfg.checkpoint_path,
        "place": run.activations_store.n_dataset_processed,
    }


OWN = {"logger": LoggingConfig(log_to_wandb=False, run_name="mine"), "output_path": "elsewhere", "verbose": True}
"""Config fields that may differ between processes."""
SCALERS = ("estimate_scaling_factor", "estimate_whitening")


def _resumed_run(rank: int, model: Path, folder: Path) -> dict[str, Any]:
    """Resumed with wandb and an evaluation, which only the first process performs."""
    logged: list[dict[str, Any]] = []
    wandb.log = lambda values, step=None: logged.append(values)
    wandb.init = wandb.finish = lambda **_: None
    LoggingConfig.log = lambda *_, **__: None
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=2, eval_every_n_wandb_logs=3)
    (run_folder,) = (folder / NORMALISED[0] / "checkpoints").iterdir()
    checkpoint = min(run_folder.iterdir(), key=lambda path: len(path.name))
    cfg = runner_config(
        model,
        folder / "resumed",
        NORMALISED[0],
        resume_from_checkpoint=str(checkpoint),
        logger=logger,
        n_eval_batches=1,
    )
    run, places = runner(rank, cfg), []
    load = type(run.activations_store).load
    run.activations_store.load = lambda path: (  # type: ignore[method-assign]
        places.append((Path(path).name, load(run.activations_store, path), run.activations_store.n_dataset_processed))
    )
    result = result_of(run)
    assert cfg.logger.log_to_wandb  # the user's own config is unchanged
    return result | {"resumed_at": places, "logged": [name for values in logged for name in values]}


def _told(function: Callable[[], Any]) -> tuple[str, str]:
    try:
        function()
    except (Interrupted, ValueError, ConnectionError) as error:
        return type(error).__name__, str(error)
    return "", ""


def _in_step(n: int, what: Callable[[], None]) -> Callable[..., Any]:
    """`training_forward_pass` that calls `what` before its n-th call, counted from 0."""
    original, steps = SampledTopKTrainingSAE.training_forward_pass, iter(range(1000))

    def forward(self, step_input):
        if next(steps) == n:
            what()
        return original(self, step_input)

    return forward


def _stopped_run(rank: int, model: Path, folder: Path) -> dict[str, Any]:
    """Only rank 1 receives a signal."""
    run = runner(rank, runner_config(model, folder / "stopped", "none"))
    if rank == 1:
        run.sae.training_forward_pass = _in_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM)).__get__(run.sae)
    return {"error": _told(run.run), "checkpoint": run.checkpoint, "steps": int(run.sae.pool_record.n_steps)}


def _batches(store: ActivationsStore, change: Callable[[int, Tensor], Tensor]) -> Iterator[Tensor]:
    loader = store.get_data_loader()
    return (change(step, batch) for step, batch in enumerate(loader))


def _not_finite(rank: int, model: Path, folder: Path) -> dict[str, Any]:
    """Only rank 1 has non-finite rows."""
    run = runner(rank, runner_config(model, folder / "not_finite", "none"))
    if rank == 1:
        run.activations_store._dataloader = _batches(
            run.activations_store, lambda step, batch: batch * (torch.inf if step == 2 else 1)
        )
    return {"error": _told(run.run), "steps": int(run.sae.pool_record.n_steps)}


def _hanging(rank: int, model: Path, folder: Path) -> dict[str, Any]:
    """Rank 1 waits for its text: first for less than the timeout, then for longer."""
    run = runner(rank, runner_config(model, folder / "hanging", "none"), timeout=TIMEOUT.total_seconds())

    def dawdle(step: int, batch: Tensor) -> Tensor:
        time.sleep({1: 1.5, 3: 3 * TIMEOUT.total_seconds()}.get(step, 0))
        return batch

    if rank == 1:
        run.activations_store._dataloader = _batches(run.activations_store, dawdle)
    started = time.monotonic()
    return {
        "error": _told(run.run),
        "seconds": time.monotonic() - started,
        "steps": int(run.sae.pool_record.n_steps),
    }


def _different(rank: int, model: Path, folder: Path) -> list[tuple[str, str]]:
    """Rank 1 differs in turn in a runner field, an SAE field, the SAE passed in, and fields that may differ."""
    plain = runner_config(model, folder / "different", "none")
    wider = SampledTopKTrainingSAE(dataclasses.replace(plain.sae, d_sae=256))
    changes: list[dict[str, Any]] = [{"lr": 2e-3}, {"sae": dataclasses.replace(plain.sae, k=5)}, {}, OWN]
    errors = []
    for fields in changes:
        cfg = runner_config(model, folder / "different", "none", **(fields if rank == 1 else {}))
        given = wider if rank == 1 and not fields else None
        errors.append(_told(lambda cfg=cfg, given=given: DataParallelRunner(cfg, override_sae=given)))
    return errors


def work(rank: int, count: int, ports: list[int], model: Path, folder: Path) -> None:
    """Run every case and write the results to `folder/rank_RANK.pt`."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ports[0]),
    }
    results: dict[str, Any] = {}
    for normalize in NORMALISED:
        results[normalize] = result_of(runner(rank, runner_config(model, folder / normalize, normalize)))
    cfg = transcoder_config(model, folder / "transcoder")
    results["transcoder"] = result_of(TranscoderRunner(cfg, override_sae=transcoder(rank)))
    results["resumed"] = _resumed_run(rank, model, folder)
    results["stopped"] = _stopped_run(rank, model, folder)
    results["not finite"] = _not_finite(rank, model, folder)
    results["different"] = _different(rank, model, folder)
    leave_processes()
    os.environ["MASTER_PORT"] = str(ports[1])
    results["hanging"] = _hanging(rank, model, folder)
    torch.save(results, folder / f"rank_{rank}.pt")
