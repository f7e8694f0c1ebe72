"""Folders of SAELens' checkpoints that a run can be resumed from: which are whole, the newest, and of the same kind."""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lens.config import LanguageModelSAERunnerConfig
from sae_lens.constants import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATIONS_STORE_STATE_FILENAME,
    RUNNER_CFG_FILENAME,
    SAE_CFG_FILENAME,
    SAE_WEIGHTS_FILENAME,
    TRAINER_STATE_FILENAME,
)
from safetensors import SafetensorError, safe_open

from sae_lens_sampled.language_model import defining_kwargs
from sae_lens_sampled.normalisation import UNFOLDED
from sae_lens_sampled.sae_folder import read_config

WEIGHT_FIELDS = (
    "d_in",
    "d_sae",
    "d_out",
    "skip",
    "apply_b_dec_to_input",
    "rescale_acts_by_decoder_norm",
    "normalize_activations",
    "hook_name_out",
)
"""Fields of an SAE's config, beside its architecture, that say which weights there are and what they mean."""
ACTIVATION_FIELDS = ("hook_name", "hook_head_index", "model_class_name", "model_from_pretrained_kwargs")
"""Fields of a runner's config that say which activations the weights are of; a model's folder may have moved."""


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


def check_same_weights(folder: Path, sae: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights do not fit an SAE of this config, or would mean something else in it.

    Fields that the checkpoint's config lacks are not compared; a config that cannot be read is left to the loader.

    Raises:
        ValueError: with the field, both values and the way out.
    """
    try:
        theirs = read_config(folder)
    except ValueError:
        return
    if theirs.get("architecture") != sae["architecture"]:
        raise ValueError(
            f"{str(folder)!r} holds a {theirs.get('architecture')!r} SAE, which cannot be resumed as "
            f"{sae['architecture']!r}; an SAE exported for inference cannot be trained further, and from a TopK, "
            "BatchTopK or Matryoshka training checkpoint sae_lens_sampled.from_batchtopk(folder, cfg) starts a new run."
        )
    normalized = (_runner_config(folder).get("sae") or {}).get("normalize_activations")
    if normalized in UNFOLDED and normalized == sae["normalize_activations"]:
        theirs = theirs | {"normalize_activations": normalized}  # "none" at the end of a run, which folds it
    _check_equal(folder, WEIGHT_FIELDS, _with_meaning(theirs), _with_meaning(sae))


def check_same_activations(folder: Path, cfg: LanguageModelSAERunnerConfig[Any], own_model: bool) -> None:
    """Refuse a checkpoint of a run on other activations; of the user's `own_model` the config says nothing.

    Raises:
        ValueError: with the field, both values and the way out.
    """
    names = [name for name in ACTIVATION_FIELDS if not (own_model and name.startswith("model_"))]
    _check_equal(folder, names, _with_meaning(_runner_config(folder)), _with_meaning(cfg.to_dict()))


def _check_equal(folder: Path, names: Sequence[str], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    for name in names:
        if name in theirs and name in ours and theirs[name] != ours[name]:
            raise ValueError(
                f"{name}={ours[name]!r}, but {str(folder)!r} was trained with {name}={theirs[name]!r}: its weights "
                f"do not fit, or would mean something else. Resume with {name}={theirs[name]!r}, or leave "
                "resume_from_checkpoint out to start anew."
            )


def _with_meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON has it, where equal values mean the same."""
    known = json.loads(json.dumps(dict(config), default=str))
    if known.get("d_out") is None and "d_out" in known:
        known["d_out"] = known["d_in"]
    if known.get("hook_name_out") is None:
        known.pop("hook_name_out", None)  # trained on batches that somebody put together
    if isinstance(known.get("model_from_pretrained_kwargs"), dict):
        known["model_from_pretrained_kwargs"] = defining_kwargs(known["model_from_pretrained_kwargs"])
    return known


def _runner_config(folder: Path) -> dict[str, Any]:
    """The config of the run that wrote the checkpoint; empty where it cannot be read."""
    try:
        config = json.loads((folder / RUNNER_CFG_FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


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
