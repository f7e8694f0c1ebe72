"""Where a study keeps things: small results to be committed, and SAEs that can be trained again."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studies.configs import Study
from studies.plan import Arm, Unit

SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Storage:
    """The folders of one study. A file or folder that is there is complete."""

    study: Study
    results: Path
    """JSON files, a unit of work each; pictures."""
    work: Path
    """SAEs, SAEBench's own files, caches."""

    @property
    def cache(self) -> Path:
        """For what depends on the settings: a study with others has a folder of its own."""
        return self.work / self._hash(self.study.settings())

    def sae(self, unit: Unit) -> Path:
        return self.cache / "saes" / unit.trained

    def on_model(self, unit: Unit) -> Path:
        """Result on the language model."""
        return self.results / "language_model" / f"{unit.name}.json"

    def on_synthetic(self, unit: Unit) -> Path:
        return self.results / SYNTHETIC / f"{unit.name}.json"

    def comparison(self, a: Arm, b: Arm) -> Path:
        return self.results / "dictionaries" / f"{a.name}--{b.name}.json"

    def is_done(self, path: Path) -> bool:
        """Whether the result is there.

        Raises:
            ValueError: if it is of other settings.
        """
        if not path.exists():
            return False
        self.load(path)
        return True

    def load(self, path: Path) -> dict[str, Any]:
        """A result.

        Raises:
            ValueError: if it is of other settings.
        """
        found = json.loads(path.read_text())
        if found.pop("settings") != self._settings(path):
            raise ValueError(
                f"{path} is a result of this study with other settings; move the folder away, or name another one "
                "with --results-dir."
            )
        return found

    def save(self, path: Path, result: dict[str, Any]) -> None:
        """Write a result; a run that is killed leaves the whole file or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps({"settings": self._settings(path)} | rounded(result), indent=1) + "\n")
        os.replace(unfinished, path)

    @contextmanager
    def new_folder(self, path: Path) -> Iterator[Path]:
        """A folder that is called `path` once it is complete."""
        unfinished = path.with_name(f"{path.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        os.replace(unfinished, path)

    def _settings(self, path: Path) -> str:
        synthetic = path.parent.name == SYNTHETIC
        return self._hash(self.study.synthetic_settings() if synthetic else self.study.settings())

    @staticmethod
    def _hash(settings: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def rounded(value: Any) -> Any:
    """Numbers to 6 digits, whatever they are in: more would be noise, and differ between machines."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value
