"""Result files: where they lie, whose they are, and how they get there whole."""

import json
import math
from pathlib import Path
from typing import Any

from sae_lens_sampled.files import atomic_write
from sae_lens_sampled.saebench.models import EvalModel
from sae_lens_sampled.saebench.sources import EvalSAE

STAMP = "sae_lens_sampled"
"""Key in `sae_cfg_dict` of a result under which its fingerprints are: the one part of the format that is free."""
NOT_COMPUTED = -1
"""What SAEBench's core and sparse probing write for a number that they did not, or could not, compute."""


def result_path(output_dir: Path, eval_name: str, sae: EvalSAE) -> Path:
    """SAEBench's place and name for a result."""
    return output_dir / "eval_results" / eval_name / f"{sae.name}_eval_results.json"


def load_result(path: Path) -> dict[str, Any] | None:
    """The result in a file; None if there is no file, or one that is cut short or of another form."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError):
        return None
    return result if _has_form(result) else None


def is_result_of(result: dict[str, Any], sae: EvalSAE, model: EvalModel) -> bool:
    """Whether a result is of these very weights on this very model."""
    stamp = _stamp(result)
    return stamp.get("sae") == sae.fingerprint and stamp.get("model") == model.fingerprint


def is_same(result: dict[str, Any], stamp: dict[str, str]) -> bool:
    """Whether a result has all these fingerprints."""
    return _stamp(result) == stamp


def differences(result: dict[str, Any], stamp: dict[str, str]) -> str:
    """Which of SAE, model and configuration are others, in words."""
    present = _stamp(result)
    return " and ".join(what for what, fingerprint in stamp.items() if present.get(what) != fingerprint)


def write_result(path: Path, result: dict[str, Any], sae: EvalSAE, stamp: dict[str, str]) -> dict[str, Any]:
    """Put a `result` in its place, under the SAE's own names, in one step that cannot be interrupted.

    Returns what was written. Plots show the architecture that the SAE was trained as: exported, a BatchTopK or Sampled
    SAE is a "jumprelu".
    """
    names = {"sae_lens_release_id": sae.release, "sae_lens_id": sae.sae_id}
    cfg = result["sae_cfg_dict"] | {"architecture": sae.sae_class, STAMP: stamp}
    result = _finite(result | names | {"sae_cfg_dict": cfg})
    atomic_write(path, json.dumps(result, indent=2, allow_nan=False))
    return result


def _has_form(result: Any) -> bool:
    """Whether it is of SAEBench's form, as far as anything here relies on that."""
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
    """`value` with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _stamp(result: dict[str, Any]) -> dict[str, str]:
    return (result.get("sae_cfg_dict") or {}).get(STAMP, {})
