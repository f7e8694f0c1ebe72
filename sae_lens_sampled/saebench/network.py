"""Whether an evaluation needs downloads from the Hugging Face Hub, and whether the Hub can be reached."""

import socket
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import datasets.config
import huggingface_hub.constants
from huggingface_hub import try_to_load_from_cache
from transformer_lens.loading_from_pretrained import get_official_model_name

TIMEOUT = 3.0
"""Seconds to wait for the Hub before reporting that it is unreachable: the libraries' own retries take minutes."""


def check_network(
    model: str,
    text: str | None,
    default_probing_datasets: bool,
    offline: bool,
    model_kwargs: Mapping[str, Any] | None = None,
) -> bool:
    """Return whether the Hub can be used or is not needed; if False, the cache has everything needed.

    SAEBench's own probing data sets always count as missing from the cache.

    Args:
        model: official name or folder of the language model.
        text: Hub name or folder of core's data set; None if core is not run.
        default_probing_datasets: whether SAEBench's own eight data sets are used.
        offline: whether the user forbids the network.
        model_kwargs: arguments of `from_pretrained`; `revision` and `subfolder` decide which files are needed.

    Raises:
        ValueError: if `model` is neither a folder nor an official name.
        ConnectionError: if something must be downloaded, but the Hub cannot be reached or `offline` forbids it.
    """
    ways_out = {}
    from_hub = {} if Path(model).is_dir() else {f"model {model!r}": _is_cached_model(model, model_kwargs or {})}
    ways_out |= dict.fromkeys(from_hub, "a folder as model (--model)")
    if text is not None and not Path(text).is_dir():
        from_hub[f"text {text!r}"] = _is_cached_dataset(text)
        ways_out[f"text {text!r}"] = "a folder as text (--text)"
    if default_probing_datasets:
        from_hub["SAEBench's eight probing data sets"] = False
        ways_out["SAEBench's eight probing data sets"] = "files as probing_datasets (--probing-data)"
    if not from_hub:
        return True
    reachable = not offline and _is_reachable()
    missing = [what for what, is_cached in from_hub.items() if not is_cached]
    if missing and not reachable:
        why = "offline is set" if offline else f"{huggingface_hub.constants.ENDPOINT} cannot be reached"
        raise ConnectionError(
            f"{', '.join(missing)} must be downloaded, but {why}; pass local ones: "
            f"{', '.join(ways_out[what] for what in missing)}. For SAEs of the bundled model, offline=True (--offline) "
            "is enough."
        )
    return reachable


def _is_cached_model(name: str, kwargs: Mapping[str, Any]) -> bool:
    try:
        official = get_official_model_name(name)
    except ValueError:
        if Path(name).is_absolute():
            raise ValueError(
                f"model={name!r} is not a folder on this machine; pass the language model's folder, or its official "
                "name, as model (--model)."
            ) from None
        raise ValueError(
            f"model={name!r} is neither a folder nor one of TransformerLens' official model names "
            "(transformer_lens.supported_models.OFFICIAL_MODEL_NAMES); for another model on the Hub pass the folder "
            f"that `hf download {name} --local-dir FOLDER` writes."
        ) from None
    config = str(PurePosixPath(kwargs.get("subfolder") or "", "config.json"))
    return isinstance(try_to_load_from_cache(official, config, revision=kwargs.get("revision")), str)


def _is_cached_dataset(name: str) -> bool:
    return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir()


def _is_reachable() -> bool:
    if getproxies():
        return True  # behind a proxy a direct connection proves nothing; the libraries will report failures
    url = urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        with socket.create_connection((url.hostname or "", port), timeout=TIMEOUT):
            return True
    except OSError:
        return False
