"""SAELens' synthetic data with known features, made faster where there are many thousand features."""

import hashlib
import json
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from sae_lens.synthetic import FeatureDictionary, SyntheticModel, SyntheticModelConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lens_sampled.files import atomic_path

ROWS = 64
"""Samples generated at a time on a CPU: few enough that with 16,384 features they stay in the processor's cache, which
halves the time."""


@cache
def synthetic_data(config: str, device: str) -> SyntheticModel:
    """The synthetic model of a config given as JSON."""
    return SyntheticModel(SyntheticModelConfig.from_dict(json.loads(config)), device=device)


def large_synthetic_model(config: SyntheticModelConfig, device: str, folder: Path) -> SyntheticModel:
    """SAELens' synthetic model, whose features are made nearly orthogonal in a minute and cached in `folder`.

    SAELens' own code takes most of an hour for 16,384 features on two CPU cores.
    """
    assert config.orthogonalization is not None
    features = FeatureDictionary(
        config.num_features, config.hidden_dim, config.bias, initializer=None, device=device, seed=config.seed
    )
    num_steps, lr = config.orthogonalization.num_steps, config.orthogonalization.lr
    given = json.dumps([config.num_features, config.hidden_dim, config.bias, config.seed, num_steps, lr, device])
    file = folder / f"features_{hashlib.sha256(given.encode()).hexdigest()[:16]}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):  # so that processes started together have bitwise equal features
        if not file.exists():
            vectors = orthogonalized(features.feature_vectors.data, num_steps, lr)
            with atomic_path(file) as unfinished:
                save_file({"vectors": vectors}, unfinished)
    features.feature_vectors.data = load_file(file, device=device)["vectors"]
    return SyntheticModel(config, feature_dict=features, device=device)


def orthogonalized(vectors: Tensor, num_steps: int, lr: float) -> Tensor:
    """SAELens' `orthogonalize_embeddings`, with the gradient of its loss in closed form.

    The loss is sum_{i != j} <e_i, e_j>^2 + n sum_i (|e_i|^2 - 1)^2. Its gradient needs only E^T E, which is (width,
    width), not (features, features). The result equals SAELens' up to rounding.
    """
    vectors = (vectors / vectors.norm(dim=1, keepdim=True)).requires_grad_()
    optimizer = torch.optim.Adam([vectors], lr=lr)
    for _ in range(num_steps):
        with torch.no_grad():
            squares = vectors.square().sum(1, keepdim=True)
            off_diagonal = vectors @ (vectors.T @ vectors) - squares * vectors
            vectors.grad = 4 * off_diagonal + 4 * len(vectors) * (squares - 1) * vectors
        optimizer.step()
    vectors = vectors.detach()
    return vectors / vectors.norm(dim=1, keepdim=True)


@torch.no_grad()
def sample_with_features(data: SyntheticModel, n_samples: int) -> tuple[Tensor, Tensor]:
    """Samples, shape (n_samples, hidden_dim), and their features, shape (n_samples, num_features).

    SAELens draws them, but on a CPU in parts, so that there they differ from those of `data.sample` with the same seed.
    """
    if data.device != "cpu":
        return data.sample_with_features(n_samples)
    parts = [data.activation_generator.sample(min(ROWS, n_samples - done)) for done in range(0, n_samples, ROWS)]
    features = torch.cat(parts)
    return data.feature_dict(features.to_sparse()), features
