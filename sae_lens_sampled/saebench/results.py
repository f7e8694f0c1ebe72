"""Result files: their paths, the fingerprints of what they were computed from, and atomic writing."""

import json
import math
from pathlib import Path
from typing import Any

from sae_lens_sampled.files import atomic_write
from sae_lens_sampled.saebench.models import EvalModel
from sae_lens_sampled.saebench.sources import EvalSAE

STAMP = "sae_lens_sampled"
"""Key of a result's fingerprints in its `sae_cfg_dict`, which may hold any keys in SAEBench's format."""
NOT_COMPUTED = -1
"""Value that SAEBench's core and sparse probing write for a number that they did not or could not compute."""


def result_path(output_dir: Path, eval_name: str, sae: EvalSAE) -> Path:
    """Path of a result, with SAEBench's folder and file names."""
    return output_dir / "eval_results" / eval_name / f"{sae.name}_eval_results.json"


def load_result(path: Path) -> dict[str, Any] | None:
    """Load a result; None if the file is missing, truncated or not of SAEBench's form."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return None
    return result if _has_form(result) else None


def is_result_of(result: dict[str, Any], sae: EvalSAE, model: EvalModel) -> bool:
    """Whether a result is for exactly these weights on this model."""
    stamp = _stamp(result)
    return stamp.get("sae") == sae.fingerprint and stamp.get("model") == model.fingerprint


def is_same(result: dict[str, Any], stamp: dict[str, str]) -> bool:
    """Whether a result has exactly these fingerprints."""
    return _stamp(result) == stamp


def differences(result: dict[str, Any], stamp: dict[str, str]) -> str:
    """Which of SAE, model and configuration differ, in words; all if the result has no fingerprints."""
    present = _stamp(result)
    return " and ".join(what for what, fingerprint in stamp.items() if present.get(what) != fingerprint)


def write_result(path: Path, result: dict[str, Any], sae: EvalSAE, stamp: dict[str, str]) -> dict[str, Any]:
    """Write a `result` atomically, with the SAE's own release and id, and return what was written.

    Its architecture, which plots show, is the one that the SAE was trained as; otherwise every exported BatchTopK SAE
    and Sampled-SAE would be "jumprelu".
    """
    names = {"sae_lens_release_id": sae.release, "sae_lens_id": sae.sae_id}
    cfg = result["sae_cfg_dict"] | {"architecture": sae.sae_class, STAMP: stamp}
    result = _finite(result | names | {"sae_cfg_dict": cfg})
    atomic_write(path, json.dumps(result, indent=2, allow_nan=False))
    return result


def _has_form(result: Any) -> bool:
    """Whether `result` has SAEBench's form, as far as this package relies on it."""
    if not isinstance(result, dict) or not isinstance(result.get("eval_type_id"), str):
        return False
    details, cfg = result.get("eval_result_details") or [], result.get("sae_cfg_dict") or {}
    return (
        isinstance(result.get("eval_result_metrics"), dict)
        and isinstance(result.get("datetime_epoch_millis", 0), (int, float))
        and isinstance(details, list)
        and all(isinstance(detail, dict) for detail in details)
        and isinstance(cfg, dict)
        and isinstance(cfg.get(STAMP, {}), dict)
    )


def _finite(value: Any) -> Any:
    """`value` with non-finite numbers replaced by None."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stamp(result: dict[str, Any]) -> dict[str, str]:
    return (result.get("sae_cfg_dict") or {}).get(STAMP, {})
