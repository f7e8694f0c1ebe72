"""Result files of an output folder, read into one `SAEResults` per SAE, which may lack evals.

SAEBench's own results can be read too, with None for the metrics that `run_evals` adds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae_lens_sampled.saebench.evals import EVALS
from sae_lens_sampled.saebench.results import NOT_COMPUTED, load_result
from sae_lens_sampled.saebench.sources import CUSTOM_SAE_ID, seed_group

EVAL_NAMES = {"absorption_first_letter": "absorption"}
"""Names of evals by the `eval_type_id` in their results, for those where the two differ."""
MARKING = ("core", "sparse_probing")
"""Evals whose results have `NOT_COMPUTED` in place of missing numbers. In MMCS, -1 may be a cosine."""


@dataclass(frozen=True)
class SAEResults:
    """All results of one SAE."""

    release: str
    sae_id: str
    results: dict[str, dict[str, Any]] = field(repr=False, compare=False)
    """Results by eval, with None for numbers that were not computed."""

    @property
    def name(self) -> str:
        """Name in the names of result files and in MMCS's pairs."""
        return f"{self.release}_{self.sae_id}".replace("/", "_")

    @property
    def label(self) -> str:
        """The displayed name."""
        return self.release if self.sae_id == CUSTOM_SAE_ID else f"{self.release} {self.sae_id}"

    @property
    def group(self) -> str:
        """The label without its seeds, the same for SAEs whose labels differ in the seed alone."""
        return " ".join(filter(None, map(seed_group, self.label.split(" ")))) or self.label

    @property
    def sae_class(self) -> str:
        """The architecture that the SAE was trained as; "unknown" if the results do not say."""
        configs = (result.get("sae_cfg_dict") or {} for result in self.results.values())
        return next((str(cfg["architecture"]) for cfg in configs if cfg.get("architecture")), "unknown")

    def get(self, *path: str) -> Any:
        """Value at `path`: an eval, then keys in its result; None if any of these is missing."""
        value: Any = self.results
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, *path: str) -> float | None:
        """The finite number at `path`, or None."""
        value = self.get(*path)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        return float(value) if is_number else None


def read_results(output_dir: str | Path) -> list[SAEResults]:
    """Read the results in `<output_dir>/eval_results`, or else in `output_dir` itself; SAEs are in alphabetical order.

    Of several results of one SAE and eval, the newest counts.

    Raises:
        ValueError: if the folder does not exist or holds no readable result.
    """
    way_out = "pass the output_dir of a finished run_evals (--output-dir of `eval`)."
    if not Path(output_dir).is_dir():
        raise ValueError(f"output_dir={str(output_dir)!r} is not a folder; {way_out}")
    finished = [result for file in _files(output_dir) if (result := load_result(file))]
    by_sae: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for result in sorted(finished, key=lambda result: result.get("datetime_epoch_millis", 0)):
        sae = (str(result.get("sae_lens_release_id")), str(result.get("sae_lens_id")))
        name = str(result.get("eval_type_id"))
        by_sae.setdefault(sae, {})[EVAL_NAMES.get(name, name)] = _without_markers(result) if name in MARKING else result
    if not by_sae:
        broken = unreadable(output_dir)
        what = (
            f"no readable *_eval_results.json, only the broken {', '.join(broken)}"
            if broken
            else "no *_eval_results.json"
        )
        raise ValueError(f"output_dir={str(output_dir)!r} holds {what}; {way_out}")
    return [SAEResults(release, sae_id, results) for (release, sae_id), results in sorted(by_sae.items())]


def unreadable(output_dir: str | Path) -> list[str]:
    """Names, as `<folder>/<name>`, of result files that are left out because they are truncated or of another form."""
    return [f"{file.parent.name}/{file.name}" for file in _files(output_dir) if load_result(file) is None]


def _files(output_dir: str | Path) -> list[Path]:
    folder = Path(output_dir)
    folder = folder / "eval_results" if (folder / "eval_results").is_dir() else folder
    return sorted(folder.rglob("*_eval_results.json"))


def evals_of(saes: Sequence[SAEResults]) -> list[str]:
    """The evals for which any of `saes` has results: in the order in which evals run, then unknown ones."""
    names = {name for sae in saes for name in sae.results}
    return [name for name in EVALS if name in names] + sorted(names - EVALS.keys())


def _without_markers(result: dict[str, Any]) -> dict[str, Any]:
    """`result` with None for numbers that SAEBench did not compute, in the metrics and the densities of core's latents.

    Other details of a latent, such as a bias or a cosine, may truly be -1 and are kept.
    """
    metrics = _unmarked(result.get("eval_result_metrics"))
    details = [
        latent | {"feature_density": _unmarked(latent["feature_density"])} if "feature_density" in latent else latent
        for latent in result.get("eval_result_details") or []
    ]
    densities = [latent["feature_density"] for latent in details if "feature_density" in latent]
    if densities and set(densities) == {None}:  # core then counts every latent as dead
        metrics = (metrics or {}) | {"misc_metrics": None}
    return result | {"eval_result_metrics": metrics, "eval_result_details": details}


def _unmarked(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unmarked(entry) for key, entry in value.items()}
    return None if value == NOT_COMPUTED else value
