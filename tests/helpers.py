"""Small SAEs, and inputs such as a trainer passes to them."""

from pathlib import Path
from typing import Any

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepInput, TrainStepOutput
from torch import Tensor

from sae_lens_sampled import (
    SampledTopKTrainingSAE,
    SampledTopKTrainingSAEConfig,
    SampledTopKTranscoder,
    SampledTopKTranscoderConfig,
)

D_IN, D_SAE, K = 12, 40, 3


def config_of(fields: dict[str, Any]) -> SampledTopKTrainingSAEConfig:
    """Config with the given fields: a transcoder's if they include `d_out`."""
    return (SampledTopKTranscoderConfig if "d_out" in fields else SampledTopKTrainingSAEConfig)(**fields)


def sae_of(cfg: SampledTopKTrainingSAEConfig) -> SampledTopKTrainingSAE:
    return (SampledTopKTranscoder if cfg.architecture() == "sampled_topk_transcoder" else SampledTopKTrainingSAE)(cfg)


def config(**fields: Any) -> SampledTopKTrainingSAEConfig:
    return config_of({"d_in": D_IN, "d_sae": D_SAE, "k": K, "pool_factor": 4, **fields})


def randomise(sae: TrainingSAE[Any]) -> None:
    """Weights with uneven decoder norms and non-zero biases, so that nothing holds by symmetry."""
    generator = torch.Generator().manual_seed(1)
    for parameter in sae.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3 + 0.02
        parameter.data.copy_(noise.to(parameter.dtype))


def train_arguments(model: Path, folder: Path, **changes: Any) -> list[str]:
    """Flags of a short run of `train` on the bundled model that writes into `folder`."""
    flags = {
        "architecture": "sampled_topk",
        "model_class_name": "AutoModelForCausalLM",
        "model_name": model,
        "hook_name": "gpt_neox.layers.2",
        "dataset_path": model / "text",
        "is_dataset_tokenized": False,
        "d_in": 128,
        "d_sae": 192,
        "k": 8,
        "pool_factor": 3,
        "pool_group_size": 16,
        "context_size": 32,
        "training_tokens": 1024,
        "train_batch_size_tokens": 128,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 8,
        "output_path": folder / "output",
        "checkpoint_path": folder / "checkpoints",
        "log_to_wandb": False,
    }
    return [text for name, value in (flags | changes).items() for text in (f"--{name}", str(value))]


def sampled_sae(**fields: Any) -> SampledTopKTrainingSAE:
    sae = SampledTopKTrainingSAE(config(**fields))
    randomise(sae)
    return sae


def batchtopk_sae(**fields: Any) -> BatchTopKTrainingSAE:
    cfg = BatchTopKTrainingSAEConfig(**{"d_in": D_IN, "d_sae": D_SAE, "k": K, "aux_loss_coefficient": 1 / 32, **fields})
    sae = BatchTopKTrainingSAE(cfg)
    randomise(sae)
    return sae


def activations(*shape: int, seed: int = 0) -> Tensor:
    """Token activations with a common mean and uneven scale over dimensions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D_IN, generator=generator) * torch.linspace(0.5, 2, D_IN) + 0.3


def step_input(sae_in: Tensor, n_dead: int = 0, step: int = 0) -> TrainStepInput:
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[5 : 5 + n_dead] = True
    return TrainStepInput(
        sae_in=sae_in, coefficients={}, dead_neuron_mask=dead, n_training_steps=step, is_logging_step=False
    )


def train(sae: TrainingSAE[Any], n_steps: int, batch_size: int = 64, lr: float = 3e-3, first: int = 0) -> list[Tensor]:
    """Take plain Adam steps on reproducible batches; returns the losses."""
    optimizer = torch.optim.Adam(sae.parameters(), lr=lr)
    losses = []
    for step in range(first, first + n_steps):
        output = sae.training_forward_pass(step_input(activations(batch_size, seed=100 + step), step=step))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.detach())
    return losses


def gradients(sae: TrainingSAE[Any], output: TrainStepOutput) -> dict[str, Tensor]:
    sae.zero_grad()
    output.loss.backward()
    return {name: parameter.grad.clone() for name, parameter in sae.named_parameters()}


def assert_equal_training(ours: TrainingSAE[Any], theirs: TrainingSAE[Any], bfloat16: bool) -> None:
    """Activations, losses, all gradients and weights, and the threshold are bit-identical over 20 Adam steps."""
    optimizers = [torch.optim.Adam(sae.parameters(), lr=1e-2) for sae in (ours, theirs)]
    for step in range(20):
        given = step_input(activations(31, seed=step), n_dead=step % 9)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            mine, want = (sae.training_forward_pass(given) for sae in (ours, theirs))
        for name in ("feature_acts", "hidden_pre", "sae_out", "loss"):
            assert torch.equal(getattr(mine, name), getattr(want, name)), name
        assert list(mine.losses) == list(want.losses)
        assert all(torch.equal(mine.losses[name], want.losses[name]) for name in want.losses)
        mine_gradients, want_gradients = gradients(ours, mine), gradients(theirs, want)
        assert mine_gradients.keys() == want_gradients.keys()
        assert all(torch.equal(mine_gradients[name], want_gradients[name]) for name in want_gradients)
        assert torch.equal(ours.topk_threshold, theirs.topk_threshold)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
