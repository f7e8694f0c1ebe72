"""What the config in a folder says of the SAE there, without loading it."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `cfg.json`.

    Raises:
        ValueError: if it is missing or not a JSON object.
    """
    try:
        cfg = json.loads((folder / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(folder)!r} holds no SAE: it has no readable {SAE_CFG_FILENAME}.") from error
    if not isinstance(cfg, dict):
        raise ValueError(f"{str(folder)!r} holds no SAE: its {SAE_CFG_FILENAME} is not a JSON object.")  # noqa: TRY004
    return cfg


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder's config has fields that only training knows."""
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
