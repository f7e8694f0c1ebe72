"""SAELens' runner on several processes that train one SAE: up to rounding, as one process on the whole batch would.

Additions to SAELens 6.54: each process reads its own text; the trainer's counters cover all processes; checkpoints
are written by one process and hold every process's position in its text; and all stop at the same step.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from sae_lens.config import HfDataset, LanguageModelSAERunnerConfig
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens.HookedTransformer import HookedRootModule  # type: ignore[attr-defined]  # where SAELens has it
from typing_extensions import override

from sae_lens_sampled.runners.patches import adopt_trainer, load_position_from
from sae_lens_sampled.runners.processes import (
    DEVICE_FIELDS,
    check_own_devices,
    join_processes,
    number_of_processes,
    own_device,
)
from sae_lens_sampled.runners.progress import no_bar
from sae_lens_sampled.runners.resumable import ResumableRunner, ResumableTrainer, with_newest_checkpoint
from sae_lens_sampled.sae.checks import check_groups
from sae_lens_sampled.sae.config import SampledTopKTrainingSAEConfig
from sae_lens_sampled.sae.gradient_sum import check_is_exact
from sae_lens_sampled.sae.training import SampledTopKTrainingSAE
from sae_lens_sampled.signals import Interrupted
from sae_lens_sampled.step.ranks import GroupRanks

OF_ONE_PROCESS = {
    *DEVICE_FIELDS,
    "checkpoint_path",  # has a random name
    "output_path",
    "logger",
    "verbose",
    "sae",  # compared by its fields
    "sae.device",
    "sae.metadata",
}
"""Config fields that may differ between processes."""
TIMEOUT = timedelta(hours=1)
"""How long processes wait for a busy one, such as the first while it evaluates or writes a checkpoint."""


class DataParallelTrainer(ResumableTrainer):
    """SAELens' trainer on one of several processes: counts the tokens and firings of all.

    A signal to any process stops all of them after the same step.
    """

    ranks: GroupRanks
    """The processes, for exchanging data on the CPU."""

    @override
    def stop_if_asked(self) -> None:
        # From the first step on signals are held, and obeyed only here: all processes stop, or none.
        if received := int(self.ranks.max(torch.tensor(self.signals.received))):
            raise Interrupted(received)

    @override
    def step(self, batch: Tensor) -> TrainStepOutput:
        selections, firings = self.sae.pool_record.selection_counts.clone(), self.act_freq_scores.clone()
        output = super().step(batch)
        # SAELens has counted this process's tokens; the SAE's own record covers all processes.
        n_fired = self.sae.pool_record.selection_counts - selections
        self.act_freq_scores = firings + n_fired
        self.n_forward_passes_since_fired[n_fired > 0] = 0
        self.n_training_samples += self.ranks.n_of_all(len(batch)) - len(batch)
        return output

    @override
    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self.ranks.rank == 0:
            super().save_checkpoint(*args, **kwargs)
        elif self.save_checkpoint_fn is not None:
            self.save_checkpoint_fn(checkpoint_path=None)  # sends the position in its text to the writing process


class DataParallelRunner(ResumableRunner):
    """SAELens' runner on one of several processes started by torchrun, or on a single process.

    `train_batch_size_tokens` and `training_tokens` are totals over all processes, and everything logged or saved covers
    all of them, except what covers only the first process's tokens: evaluations, and in the log of a step the losses,
    explained variance, L0, `export_...` and `..._per_kept`. The text is split between the processes; each has its own
    buffer of `n_batches_in_buffer` prompts.

    Args:
        cfg: as for SAELens' runner, the same on all processes. With `device="cuda"` each process has its own GPU.
        override_dataset: the whole text; each process takes its part.
        override_model: as for SAELens' runner.
        override_sae: a `SampledTopKTrainingSAE`; training starts from the first process's weights.
        timeout: how long a process waits for another before it fails.

    Raises:
        ValueError: at the start, as for `ResumableRunner`; for unavailable devices, or a checkpoint from a different
            number of processes. On several processes also if the batch cannot be split evenly, or only by splitting a
            group of `pool_group_size` tokens; for other architectures, `compile_sae`, devices that cannot be shared,
            and whatever `data_parallel` rejects; if a cache, or a text that is not streamed, has fewer rows than there
            are processes, or the processes have different configs.
        LostRankError: if other processes do not join, or do not answer within `timeout`.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: HookedRootModule | None = None,
        override_sae: TrainingSAE[Any] | None = None,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        self.control: GroupRanks | None = None  # for exchanging data on the CPU
        self.rank, count = 0, number_of_processes()
        cfg = with_newest_checkpoint(cfg)
        if cfg.resume_from_checkpoint is not None:
            check_same_number(Path(cfg.resume_from_checkpoint), count)
        if count > 1:
            check_can_be_split(cfg, count)
        check_own_devices(cfg)
        if count > 1:
            self.control = join_processes(own_device(cfg.device), timeout)
            self.rank = self.control.rank
            check_same_config(cfg, cfg.sae if override_sae is None else override_sae.cfg, self.control)
            cfg = _of_process(cfg, self.control)
        super().__init__(
            cfg, override_dataset=override_dataset, override_model=override_model, override_sae=override_sae
        )
        if count > 1:
            check_is_sampled(self.sae, count)
            split_text(self.activations_store, self.rank, count)
        if self.rank > 0:  # so that each process shuffles its buffer differently
            torch.manual_seed(torch.initial_seed() + self.rank)

    @override
    def run(self) -> TrainingSAE[Any]:
        with nullcontext() if self.rank == 0 else no_bar():
            return super().run()

    @override
    def adopt(self, trainer: SAETrainer[Any, Any]) -> None:
        super().adopt(trainer)
        if self.control is not None:
            trainer.sae.data_parallel()
            adopt_trainer(trainer, DataParallelTrainer).ranks = self.control
            scaler = trainer.activation_scaler
            trainer.activation_scaler = ScalerOfAll(scaler.scaling_factor, scaler.whitening, ranks=self.control)

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        if self.control is not None:
            _, *others = self.control.gather(self.activations_store.state_dict())
            if checkpoint_path is not None:  # before SAELens' own files, which must be the last
                for rank, place in enumerate(others, start=1):
                    save_file(place, checkpoint_path / data_position_file(rank))
        super().save_checkpoint(checkpoint_path)

    @override
    def save_final_sae(self, *args: Any, **kwargs: Any) -> None:
        if self.rank == 0:
            super().save_final_sae(*args, **kwargs)


@dataclass
class ScalerOfAll(ActivationScaler):
    """SAELens' estimate of the activation normalisation, from the tokens of all processes; the same on all."""

    ranks: GroupRanks = field(kw_only=True)

    @override
    def estimate_scaling_factor(self, d_in: int, data_provider: Iterator[Tensor], *args: Any, **kwargs: Any) -> None:
        norms = (batch.norm(dim=-1, keepdim=True) for batch in data_provider)  # all that the estimate needs
        super().estimate_scaling_factor(d_in, self._whole_batches(norms), *args, **kwargs)
        self.scaling_factor = self.ranks.gather(self.scaling_factor)[0]

    @override
    def estimate_whitening(self, d_in: int, data_provider: Iterator[Tensor], *args: Any, **kwargs: Any) -> None:
        super().estimate_whitening(d_in, self._whole_batches(data_provider), *args, **kwargs)
        self.whitening = self.ranks.gather(self.whitening)[0]

    def _whole_batches(self, own: Iterator[Tensor]) -> Iterator[Tensor]:
        return (torch.cat(self.ranks.gather(batch.cpu())) for batch in own)


def data_position_file(rank: int) -> str:
    """Name of the checkpoint file with a process's position in its text; for the first process, SAELens' own."""
    name = Path(ACTIVATIONS_STORE_STATE_FILENAME)
    return name.name if rank == 0 else f"{name.stem}_{rank}{name.suffix}"


def split_text(store: ActivationsStore, rank: int, count: int) -> None:
    """Restrict a store to this process's part of each batch, and of its text or of its cached activations.

    Raises:
        ValueError: if there are fewer rows than processes; those of a streamed text cannot be counted.
    """
    for name, what in {"dataset": "text", "cached_activation_dataset": "activation cache"}.items():
        whole = getattr(store, name)
        if isinstance(whole, Dataset) and len(whole) < count:
            raise ValueError(
                f"the {what} has {len(whole)} rows, fewer than the {count} processes, which each need at least one; "
                "use more rows or fewer processes."
            )
        if whole is not None:
            setattr(store, name, split_dataset_by_node(whole, rank, count))
    if store.dataset is not None:
        store.iterable_sequences = store._iterate_tokenized_sequences()
    store.train_batch_size_tokens //= count
    load_position_from(store, data_position_file(rank))


def check_can_be_split(cfg: LanguageModelSAERunnerConfig[Any], count: int) -> None:
    """Reject configs that several processes cannot train together, before anything is loaded.

    Raises:
        ValueError: naming the reason.
    """
    if not isinstance(cfg.sae, SampledTopKTrainingSAEConfig):
        raise ValueError(  # noqa: TRY004  a wrong flag, not a wrong type
            f"architecture={cfg.sae.architecture()!r} trains on one process only, but there are {count}; use "
            "sampled_topk, which is BatchTopK with pool_factor=d_sae / k."
        )
    if cfg.compile_sae:
        raise ValueError(
            "compile_sae=True works on one process only, because exchanges between processes cannot be compiled; set "
            "it to False."
        )
    if cfg.train_batch_size_tokens % count:
        raise ValueError(
            f"train_batch_size_tokens={cfg.train_batch_size_tokens} is not a multiple of {count}, the number of "
            "processes, which must all get equally many tokens; change the batch size or the number of processes."
        )
    check_groups(cfg.train_batch_size_tokens // count, cfg.sae.pool_group_size, count)
    check_is_exact(cfg.sae)


def check_is_sampled(sae: TrainingSAE[Any], count: int) -> None:
    """Reject an SAE of another class, given as `override_sae` or by `from_pretrained_path`.

    Raises:
        ValueError: naming the class.
    """
    if not isinstance(sae, SampledTopKTrainingSAE):
        raise ValueError(  # noqa: TRY004  as for every invalid argument
            f"a {type(sae).__name__} trains on one process only, but there are {count}; from_batchtopk "
            "converts TopK, BatchTopK and Matryoshka training SAEs."
        )


def check_same_number(checkpoint: Path, count: int) -> None:
    """Reject resuming with another number of processes: a checkpoint holds a position for each one's part of the text.

    Raises:
        ValueError: naming both numbers.
    """
    saved = 1 + sum(1 for _ in checkpoint.glob(data_position_file(1).replace("_1", "_[0-9]*")))
    if saved != count:
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r} holds positions in the text for {saved} "
            f"process{'es' * (saved > 1)}, but {count} {'are' if count > 1 else 'is'} running; start {saved}."
        )


def check_same_config(cfg: LanguageModelSAERunnerConfig[Any], sae: TrainingSAEConfig, control: GroupRanks) -> None:
    """Reject processes that were started with different configs, which would hang waiting for each other.

    Raises:
        ValueError: on all processes, naming the field and both values.
    """
    fields = {**cfg.to_dict(), **{f"sae.{name}": value for name, value in sae.to_dict().items()}}
    own = {name: repr(value) for name, value in fields.items() if name not in OF_ONE_PROCESS}
    first, *others = control.gather(own)
    for rank, theirs in enumerate(others, start=1):
        for name in {**first, **theirs}:
            if theirs.get(name) != first.get(name):
                raise ValueError(
                    f"{name}={theirs.get(name)} on process {rank}, but {first.get(name)} on process 0: start all with "
                    "the same config."
                )


def _of_process(cfg: LanguageModelSAERunnerConfig[Any], control: GroupRanks) -> LanguageModelSAERunnerConfig[Any]:
    """The config of one process: its own GPU, the first one's checkpoint folder, and a logger on the first only."""
    cfg = copy.deepcopy(cfg)
    for name in DEVICE_FIELDS:
        setattr(cfg, name, own_device(getattr(cfg, name)))
    cfg.checkpoint_path = control.gather(cfg.checkpoint_path)[0]  # each process has chosen a random name
    cfg.logger.log_to_wandb &= control.rank == 0
    return cfg
