"""Folders of SAELens' checkpoints that a run can be resumed from: which are whole, and which is the newest."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from safetensors import SafetensorError, safe_open


def find_checkpoint(folder: Path) -> Path:
    """The folder, if it holds a whole checkpoint, or else the newest whole one in it.

    Raises:
        ValueError: if there is none; it names the newest one beside the folder.
    """
    damage = _first_unreadable(folder)
    checkpoint = folder if damage is None else _newest_whole(folder)
    if checkpoint is not None:
        return checkpoint
    why = f"holds no whole checkpoint: it has no readable {damage}" if folder.is_dir() else "is not a folder"
    beside = _newest_whole(folder.parent)
    way_out = (
        f"the newest whole one beside it is {str(beside)!r}."
        if beside
        else "nor is there a whole one beside it. Leave resume_from_checkpoint out to start anew."
    )
    raise ValueError(f"resume_from_checkpoint={str(folder)!r} {why}; {way_out}")


def _newest_whole(folder: Path) -> Path | None:
    """The whole checkpoint in `folder` that was finished last."""
    whole = [inside for inside in folder.glob("*/") if _first_unreadable(inside) is None]
    return max(whole, key=lambda checkpoint: (checkpoint / RUNNER_CFG_FILENAME).stat().st_mtime_ns, default=None)


def _first_unreadable(folder: Path) -> str | None:
    """Name of the first file that is needed to resume and is missing or cut short."""
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
