"""A training run's progress bar follows every step and the language model, and leaves the training unchanged."""

import io
import re

import pytest
import torch
from helpers import activations, sampled_sae
from sae_lens import LoggingConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.training import sae_trainer
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from sae_lens_sampled.runners import progress


def trainer(n_steps: int, provider=None) -> SAETrainer:
    config = SAETrainerConfig(
        total_training_samples=n_steps * 8,
        train_batch_size_samples=8,
        lr=1e-3,
        lr_end=1e-4,
        lr_warm_up_steps=0,
        lr_decay_steps=0,
        dead_feature_window=100,
        n_checkpoints=0,
        checkpoint_path=None,
        device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )
    batches = provider or (activations(8, seed=step) for step in range(n_steps))
    return SAETrainer(config, sampled_sae(), batches)


@pytest.fixture
def drawn(monkeypatch):
    """Output of the bars, which redraw at every change."""
    text = io.StringIO()
    tqdm = progress.tqdm
    monkeypatch.setattr(progress, "SECONDS", 0)
    monkeypatch.setattr(progress, "tqdm", lambda *a, **k: tqdm(*a, **k, file=text, mininterval=0, ncols=200))
    return text


def test_every_step_moves_the_bar(drawn):
    with progress.live_bar():
        trainer(3).fit()
    counts = re.findall(r"(\d+)/24 ", drawn.getvalue())
    assert list(dict.fromkeys(counts)) == ["0", "8", "16", "24"]
    assert "3| mse_loss: " in drawn.getvalue()


def test_a_resumed_run_of_several_saes_begins_where_it_was(drawn):
    resumed = MultiSAETrainer(trainer(3).cfg, {"one": sampled_sae()}, {"one": "hook"}, iter([{"hook": activations(8)}]))
    [of_one] = resumed.trainers.values()
    for of in (resumed, of_one):
        of.n_training_samples, of.n_training_steps = 16, 2
    with progress.live_bar():
        resumed.fit()
    assert re.findall(r"(\d+)/24 ", drawn.getvalue())[-1] == "24"


def test_the_bar_says_what_the_language_model_has_read(drawn, monkeypatch):
    monkeypatch.setattr(ActivationsStore, "get_activations", lambda store, tokens: activations(8))

    def provider():
        for _ in range(2):
            for _ in range(2):
                batch = ActivationsStore.get_activations(None, torch.zeros(4, 5))
            yield batch

    with progress.live_bar():
        trainer(2, provider()).fit()
    text = drawn.getvalue()
    assert text.index("language model: 20 tokens") < text.index("language model: 40 tokens") < text.index(" 8/16 ")
    assert "language model" not in text.rpartition("16/16")[2]


def test_losses_are_those_of_a_run_without_it(drawn):
    torch.manual_seed(0)
    plain = trainer(3).fit()
    torch.manual_seed(0)
    with progress.live_bar():
        shown = trainer(3).fit()
    assert torch.equal(plain.W_enc, shown.W_enc)


def test_the_bar_ends_where_the_run_ends_however_it_ends(drawn):
    def provider():
        yield activations(8)
        raise RuntimeError("the text has ended")

    update = SAETrainer._update_pbar
    with pytest.raises(RuntimeError, match="the text has ended") as caught, progress.live_bar():
        trainer(3, provider()).fit()
    assert caught.traceback  # its frames still hold the bar
    assert drawn.getvalue().endswith("\n")
    assert SAETrainer._update_pbar is update
    assert sae_trainer.tqdm is not None
