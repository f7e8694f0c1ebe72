"""Storage of a study: small results, to be committed, and SAEs, which can be trained again."""

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sae_lens_sampled.files import atomic_write
from study.configs import Study
from study.plan import Unit

Key = tuple[Any, ...]
SETTINGS = "settings.json"
"""Name of the file beside the results with the settings that they depend on."""


class StaleResultsError(ValueError):
    """The results in a folder are from other settings."""


@dataclass(frozen=True)
class ResultTable:
    """The results of one stage: a line of JSON for each unit of work, in order of completion.

    Each is on disk before the next one is added. An incomplete last line of a killed run is ignored, and cut off when
    the next line is added. Runs of different arms may add lines at the same time.
    """

    file: Path
    key_fields: tuple[str, ...]
    """The fields that identify a result."""
    settings: dict[str, dict[str, Any]]
    """All settings of the study, by section (the results that depend on them); written once, next to the tables."""
    section: str
    """The section of the settings that these results depend on."""

    def load(self) -> dict[Key, dict[str, Any]]:
        """Results, by the values of the key fields.

        Raises:
            ValueError: if the folder has results of the study with other settings for this section.
        """
        lines, _, _ = (self.file.read_bytes() if self.file.exists() else b"").rpartition(b"\n")
        results = [json.loads(line) for line in lines.splitlines()]
        if results or self._settings_file.exists():  # rejected before the work, not when its result is added
            self._check_settings()
        return {self._key(result): result for result in results}

    def append(self, result: dict[str, Any]) -> None:
        """Add a result; if another process has added it meanwhile, that one is kept.

        Raises:
            ValueError: if the existing results are from other settings.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(rounded(result)).encode() + b"\n"
        with self.file.open("a+b") as table:
            fcntl.lockf(table, fcntl.LOCK_EX)
            table.seek(0)
            lines = table.read()
            n_whole = lines.rfind(b"\n") + 1
            if n_whole == 0 and not self._settings_file.exists():
                atomic_write(self._settings_file, json.dumps(self.settings, indent=1) + "\n")
            self._check_settings()
            if self._key(result) in {self._key(json.loads(whole)) for whole in lines[:n_whole].splitlines()}:
                return
            table.truncate(n_whole)
            table.write(line)
            table.flush()
            os.fsync(table.fileno())

    def _key(self, result: dict[str, Any]) -> Key:
        return tuple(result[field] for field in self.key_fields)

    @property
    def _settings_file(self) -> Path:
        return self.file.with_name(SETTINGS)

    def _check_settings(self) -> None:
        settings = self.settings[self.section]
        written = json.loads(self._settings_file.read_text()).get(self.section, {})
        differing = sorted(n for n in settings.keys() | written.keys() if settings.get(n) != written.get(n))
        if differing:
            raise StaleResultsError(
                f"{self.file.parent} has results of this study with other settings ({', '.join(differing)}); move the "
                "folder away, or name another one with --results-dir."
            )


@dataclass(frozen=True)
class Storage:
    """The folders of one study."""

    study: Study
    results: Path
    """Results, one table for each stage but `train`, their settings, and pictures."""
    work: Path
    """SAEs, SAEBench's own files and caches. The folder of an SAE, a text or probing tasks exists only if complete."""

    @property
    def device(self) -> str:
        """Name of the device that results are computed on, as stored with them."""
        device = torch.device(self.study.device)
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    @property
    def evaluations(self) -> ResultTable:
        """Evaluations of the exports on the language model."""
        return self._table("evaluate", ("arm", "seed"), "language_model")

    @property
    def absorption(self) -> ResultTable:
        """Absorption of the SAEs that get it in a separate stage."""
        return self._table("absorption", ("arm", "seed"), "absorption")

    @property
    def comparisons(self) -> ResultTable:
        """Comparisons of pairs of arms."""
        return self._table("compare", ("arm", "other_arm"), "language_model")

    @property
    def synthetic(self) -> ResultTable:
        """Evaluations of SAEs on data with known features."""
        return self._table("synthetic", ("arm", "seed"), "synthetic")

    @property
    def cache(self) -> Path:
        """Folder for files that depend on the settings; other settings have another folder."""
        return self.work / _fingerprint(self.study.settings())

    @property
    def activations(self) -> Path:
        """Folder of the activations for training; shared if model, hook, dtype, prompts, text and token count are."""
        study = self.study
        text, n_tokens = study.text or study.dataset, study.steps * study.batch_size
        read = [study.model, study.hook, study.dtype, study.context_size, text, n_tokens]
        return self.work / f"activations_{_fingerprint(read)}"

    @property
    def sae_bench(self) -> Path:
        """Folder of SAEBench's results and of its caches, which are per model; studies in one work folder share it."""
        return self.work / "sae_bench"

    def release(self, unit: Unit) -> str:
        """Name of an SAE in `sae_bench`, with its study and settings, so that no other study uses the same name."""
        return f"{self.study.name}_{self.cache.name}_{unit.name}"

    def sae(self, unit: Unit) -> Path:
        """Folder of the trained SAE that `unit` is exported from."""
        return self.cache / "saes" / unit.trained

    def _table(self, stage: str, key_fields: tuple[str, ...], section: str) -> ResultTable:
        settings = {"language_model": self.study.settings(), "synthetic": self.study.synthetic_settings()}
        if self.study.absorption:
            settings["absorption"] = self.study.absorption_settings()
        return ResultTable(self.results / f"{stage}.jsonl", key_fields, settings, section)


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def rounded(value: Any) -> Any:
    """Round all floats in nested containers to 6 significant digits: more digits are noise that differs by machine."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(entry) for entry in value]
    return value
