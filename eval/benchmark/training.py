"""Trains and evaluates the arms of a stream; a killed run continues from its last checkpoint, if there is one."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias

import torch
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.synthetic import SyntheticModel
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import temporary_seed
from torch import Tensor

from benchmark.plan import Benchmark, BenchmarkUnit, Data, new_sae
from study.known_features import large_synthetic_model, sample_with_features
from study.synthetic import evaluate_on_synthetic_data

Sample: TypeAlias = Callable[[int], Tensor]
WHOLE = "whole"
"""Name of the file that marks a checkpoint as complete."""


def run(benchmark: Benchmark, together: Sequence[BenchmarkUnit], work: Path) -> Iterator[dict[str, Any]]:
    """Train the arms that share a stream of samples, and evaluate them.

    Several processes may train different arms of one stream: the samples are the same, and checkpoints are separate.
    """
    data, sample = features_of(benchmark.data[together[0].data], benchmark.device, work)
    saes = untrained(benchmark, together)
    trainer = new_trainer(benchmark, saes, work / "-".join(map(str, together[0].stream)))
    trainer.data_provider = stream(sample, benchmark.batch_size, trainer.n_training_samples)
    trainer.fit()
    for unit in together:
        metrics = evaluate_on_synthetic_data(
            trainer.saes[unit.arm], data, benchmark.eval_samples, benchmark.batch_size, benchmark.device
        )
        yield {**asdict(unit), "metrics": metrics}


def features_of(data: Data, device: str, work: Path) -> tuple[SyntheticModel, Sample]:
    """The model that makes the data, and a function that draws samples from it."""
    if not data.large:
        model = SyntheticModel(data.features, device=device)
        return model, model.sample
    model = large_synthetic_model(data.features, device, work)
    return model, lambda n_samples: sample_with_features(model, n_samples)[0]


def untrained(benchmark: Benchmark, together: Sequence[BenchmarkUnit]) -> dict[str, TrainingSAE]:
    """Untrained SAEs by arm; those of one seed start from the same weights."""
    saes = {}
    for unit in together:
        torch.manual_seed(unit.seed)
        saes[unit.arm] = new_sae(benchmark, unit)
    return saes


def new_trainer(benchmark: Benchmark, saes: dict[str, TrainingSAE], folder: Path) -> MultiSAETrainer:
    """A trainer without data, resumed from the newest complete checkpoint in `folder` that has all SAEs, if any.

    It saves its own checkpoints in a subfolder named by a hash of the arms' names.
    """
    arms = hashlib.sha256(" ".join(saes).encode()).hexdigest()[:8]
    steps = benchmark.steps
    config = SAETrainerConfig(
        total_training_samples=steps * benchmark.batch_size,
        train_batch_size_samples=benchmark.batch_size,
        lr=benchmark.lr,
        lr_end=benchmark.lr / 10,  # as in SAELens' runners
        lr_warm_up_steps=int(steps * benchmark.warm_up),
        lr_decay_steps=int(steps * benchmark.decay),
        dead_feature_window=benchmark.dead_window,
        n_checkpoints=benchmark.n_checkpoints,
        checkpoint_path=str(folder / arms),
        device=benchmark.device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = MultiSAETrainer(config, saes, dict.fromkeys(saes, "data"), iter(()), save_checkpoint_fn=finish_checkpoint)
    whole = [marker.parent for marker in folder.glob(f"*/*/{WHOLE}")]
    usable = [checkpoint for checkpoint in whole if all((checkpoint / name).exists() for name in saes)]
    if usable:
        trainer.load_checkpoint(max(usable, key=lambda checkpoint: int(checkpoint.name)))
    later = [threshold for threshold in trainer.checkpoint_thresholds if threshold > trainer.n_training_samples]
    trainer.checkpoint_thresholds = later
    return trainer


def finish_checkpoint(checkpoint_path: Path | None) -> None:
    """Mark a checkpoint as complete, and delete the others in its folder."""
    assert checkpoint_path is not None
    (checkpoint_path / WHOLE).touch()
    for other in checkpoint_path.parent.iterdir():
        if other != checkpoint_path:
            shutil.rmtree(other)


def stream(sample: Sample, batch_size: int, n_seen: int) -> Iterator[dict[str, Tensor]]:
    """Batches after the first `n_seen` samples.

    Each depends only on its index: batches are the same for every arm and seed, and in a resumed run.
    """
    for batch in count(n_seen // batch_size):
        with temporary_seed(batch), torch.no_grad():
            samples = sample(batch_size)
        yield {"data": samples}
