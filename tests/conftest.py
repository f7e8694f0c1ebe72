import random

import jaxtyping
import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  SAELens' own code draws from the global generator
    torch.manual_seed(0)


@pytest.fixture
def unchecked_types():
    """Without the run-time shape checks, which `torch.compile` cannot trace and which would answer before our errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
