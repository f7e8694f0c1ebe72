import json
import logging
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT / "examples"), str(ROOT / "eval")]  # scripts, not packages

# Shapes and types are checked at run time in the modules of pure functions; an int passes as a float, as in Python.
# jaxtyping's pytest option is not used, because it takes only one module if the type checker has arguments.
PURE = ("step", "metrics", "similarity", "sae.calibration")
jaxtyping.install_import_hook(
    [f"sae_lens_sampled.{module}" for module in PURE],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


torch.set_num_threads(1)  # all sizes here are small, and the tests run in several processes


SLOW = (
    "study_processes",
    "saebench_resuming",
    "examples",
    "data_parallel",
    "data_parallel_runner",
    "transcoder_runner",
    "interrupting",
    "benchmarks",
    "calibration",
    "triton",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest files first, so that no worker process is left with one of them at the end."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in SLOW)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  SAELens' own code draws from the global generator
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    """Restore logging, which scripts disable for their whole process."""
    before = logging.root.manager.disable
    yield
    logging.disable(before)


@pytest.fixture
def unchecked_types():
    """Disable run-time type checks: `torch.compile` cannot trace them, and they would raise before our own checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_lm() -> Path:
    """Folder of the bundled language model, in Hugging Face format, with its text in `text/`."""
    from bundled import TINY_LM

    return TINY_LM


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local Hub that the installed client treats as the real one."""
    from hub_server import TOKEN, HubServer
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import _http

    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))  # between retries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        _http.close_session()
        yield server
        _http.close_session()


@pytest.fixture(scope="session")
def activations(tiny_lm):
    """Activations of the bundled model at `HOOK`, shape (tokens, d_in)."""
    from eval_helpers import HOOK

    from sae_lens_sampled.saebench.models import load_model

    model = load_model(tiny_lm).hooked
    lines = (tiny_lm / "text" / "train.jsonl").read_text().splitlines()[:40]
    ids = model.tokenizer("".join(json.loads(line)["text"] for line in lines), verbose=False)["input_ids"]
    tokens = torch.tensor(ids[: 96 * 100]).view(100, 96)
    with torch.no_grad():
        return model.run_with_cache(tokens, names_filter=[HOOK])[1][HOOK].flatten(end_dim=1)


@pytest.fixture(scope="session")
def saes(activations):
    """Training SAEs: two seeds of sampled_topk, and one SAE of each other architecture in `KINDS`."""
    from eval_helpers import KINDS, trained_sae

    ours = [(f"sampled_seed{seed}", trained_sae("sampled_topk", seed, activations)) for seed in (0, 1)]
    others = [(kind, trained_sae(kind, 0, activations)) for kind in KINDS if kind != "sampled_topk"]
    return ours + others
