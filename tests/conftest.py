import random
import sys
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "examples"), str(ROOT / "eval")]  # scripts, which are no packages

# Shapes and types are checked at run time in the modules of pure functions; int passes for float, as in Python. Not by
# jaxtyping's pytest option, which takes a single module if the checker has arguments.
PURE = (
    "activation_statistics",
    "calibration",
    "dictionary_similarity",
    "metrics",
    "pool_record",
    "scores",
    "selection",
    "thresholds",
)
jaxtyping.install_import_hook(
    [f"sae_lens_sampled.{module}" for module in PURE],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  SAELens' own code draws from the global generator
    torch.manual_seed(0)


@pytest.fixture
def unchecked_types():
    """Without run-time type checks: `torch.compile` cannot trace them, and they would answer before our errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_lm() -> Path:
    """The bundled language model, in Hugging Face format, with `text/` beside it."""
    from bundled import TINY_LM

    return TINY_LM
