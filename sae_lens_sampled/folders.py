"""Contents of a folder: an SAE's config, a checkpoint to resume from; and whether an SAE's normalisation is folded."""

import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from safetensors import SafetensorError, safe_open

UNFOLDED = ("expected_average_only_in", "covariance_whitening")
"""Values of SAELens' `normalize_activations` whose scaling has to be folded into the weights."""


def read_config(folder: Path) -> dict[str, Any]:
    """Read the folder's `cfg.json`.

    Raises:
        ValueError: if it is missing or not a JSON object.
    """
    try:
        cfg = json.loads((folder / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{str(folder)!r} holds no SAE: it has no readable {SAE_CFG_FILENAME}; pass a folder that has one."
        ) from error
    if not isinstance(cfg, dict):
        raise ValueError(  # noqa: TRY004
            f"{str(folder)!r} holds no SAE: its {SAE_CFG_FILENAME} is not a JSON object; pass another folder."
        )
    return cfg


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a training checkpoint, judging by the architecture and fields in its config."""
    cfg = read_config(folder)
    architecture = cfg.get("architecture")
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        return False
    if architecture not in SAE_CLASS_REGISTRY:
        return True
    training, inference = (registry[architecture][1] for registry in (SAE_TRAINING_CLASS_REGISTRY, SAE_CLASS_REGISTRY))
    return not cfg.keys().isdisjoint({f.name for f in fields(training)} - {f.name for f in fields(inference)})


def is_export(folder: Path) -> bool:
    """Whether the folder holds an SAE for inference."""
    return read_config(folder).get("architecture") in SAE_CLASS_REGISTRY and not is_checkpoint(folder)


def check_folded(normalize_activations: str | None, name: str) -> None:
    """Check that the normalisation of an SAE, called `name` in the message, is folded into its weights.

    Raises:
        ValueError: if it is not, with the way to fold it.
    """
    if normalize_activations in UNFOLDED:
        raise ValueError(
            f"{name} has normalize_activations={normalize_activations!r}, which is not folded into its weights yet, so "
            "its reconstructions would be wrong; load its training checkpoint with "
            "sae_lens_sampled.load_checkpoint(folder), which folds it."
        )


def find_checkpoint(folder: Path) -> Path:
    """Return the folder if it holds a complete checkpoint, or else the newest complete one in it.

    Raises:
        ValueError: if there is none; the message names the newest complete one beside the folder, if any.
    """
    damage = _first_unreadable(folder)
    checkpoint = folder if damage is None else _newest_whole(folder)
    if checkpoint is not None:
        return checkpoint
    why = f"holds no complete checkpoint: it has no readable {damage}" if folder.is_dir() else "is not a folder"
    beside = _newest_whole(folder.parent)
    way_out = (
        f"the newest complete checkpoint beside it is {str(beside)!r}."
        if beside
        else "there is no complete checkpoint beside it either. Leave resume_from_checkpoint out to start anew."
    )
    raise ValueError(f"resume_from_checkpoint={str(folder)!r} {why}; {way_out}")


def read_runner_config(folder: Path) -> dict[str, Any]:
    """The config of the run that wrote the folder; empty if it cannot be read."""
    try:
        config = json.loads((folder / RUNNER_CFG_FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _newest_whole(folder: Path) -> Path | None:
    """The complete checkpoint in `folder` with the most training samples; of several, the one finished last."""

    def progress(checkpoint: Path) -> tuple[int, int]:
        number = re.search(r"\d+$", checkpoint.name)  # clocks of hosts differ, so the number comes first
        return int(number[0]) if number else -1, (checkpoint / RUNNER_CFG_FILENAME).stat().st_mtime_ns

    whole = [inside for inside in folder.glob("*/") if _first_unreadable(inside) is None]
    return max(whole, key=progress, default=None)


def _first_unreadable(folder: Path) -> str | None:
    """Name of the first file needed to resume that is missing or truncated."""
    return next((name for name, is_readable in _NEEDED.items() if not is_readable(folder / name)), None)


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):  # compares the size of the file with what its header says
            return True
    except (OSError, SafetensorError):
        return False


_NEEDED: dict[str, Callable[[Path], bool]] = {
    SAE_CFG_FILENAME: _is_json,
    SAE_WEIGHTS_FILENAME: _is_safetensors,
    TRAINER_STATE_FILENAME: zipfile.is_zipfile,  # looks at the end of the file
    ACTIVATION_SCALER_CFG_FILENAME: _is_json,
    ACTIVATIONS_STORE_STATE_FILENAME: _is_safetensors,
    RUNNER_CFG_FILENAME: _is_json,  # SAELens writes it last
}
