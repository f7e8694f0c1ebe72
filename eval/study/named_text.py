"""A text that the user supplies: plain text files, such as novels, some of which are held out."""

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sae_lens_sampled.files import atomic_path, atomic_write
from study.configs import Study
from study.probing_tasks import NOVELS, with_probing_tasks
from study.storage import SETTINGS

EVERY = 20
"""Every file at a multiple of this place in alphabetical order is held out; of fewer files, the last."""
CHARACTERS = 2000
"""Minimum length of a passage, the unit that is shuffled; the last of a file may be shorter."""
TITLES = "titles.json"
"""Name of the file that says which texts are in which part."""


def with_text(study: Study, text: str, work: Path) -> Study:
    """The study on another text: a folder of .txt files, some of which are held out, or a Hub data set for training.

    Raises:
        ValueError: if the folder has fewer than two text files, lacks novels of the study's probing tasks, or has too
            few texts for them.
    """
    if not Path(text).is_dir():
        return replace(study, dataset=text)
    files = sorted(Path(text).glob("*.txt"))
    if len(files) < 2:
        raise ValueError(f"--text {text} must have at least two .txt files, one of which is held out.")
    fingerprint = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[
        :16
    ]
    folder = work / f"text_{fingerprint}"
    if not folder.is_dir():
        with atomic_path(folder) as unfinished:
            split(files, unfinished)
    study = replace(study, dataset=str(folder / "train"), held_out=str(folder / "held_out"), text=fingerprint)
    return with_probing_tasks(study, Path(text), work)


def with_text_of_results(study: Study, results: Path) -> Study:
    """The study with the text, labelled sets and evals of its existing results, if a user supplied their text.

    This is enough to show the results. Computing new ones needs the text itself, see `with_text`.
    """
    file = results / SETTINGS
    settings = json.loads(file.read_text())["language_model"] if file.exists() else {}
    if "text" not in settings:
        return study
    return replace(
        study,
        text=settings["text"],
        evals=settings["evals"],
        probing_datasets=tuple(settings.get("probing_datasets", ())),
        probing_tasks=settings.get("probing_tasks", ""),
    )


def keep_titles(study: Study, results: Path) -> None:
    """Copy the titles of both parts of the study's text, and of its probing tasks, next to its results.

    A Hub data set has no titles.
    """
    files = [Path(study.dataset).parent / TITLES] if study.text else []
    files += [Path(study.probing_datasets[0]).parent / NOVELS] if study.probing_tasks and study.probing_datasets else []
    for file in filter(Path.is_file, files):
        atomic_write(results / file.name, file.read_text())


def split(files: list[Path], folder: Path) -> None:
    """Write `train/` and `held_out/` with passages in random order, and the titles of both."""
    held_out = files[EVERY - 1 :: EVERY] or files[-1:]
    parts = {"train": [file for file in files if file not in held_out], "held_out": held_out}
    for name, part in parts.items():
        rows = [passage for file in part for passage in passages(file.read_text(encoding="utf-8-sig"))]
        random.Random(0).shuffle(rows)
        (folder / name).mkdir(parents=True)
        with (folder / name / "train.jsonl").open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": row}) + "\n" for row in rows)
    titles = {name: [title(file) for file in part] for name, part in parts.items()}
    (folder / TITLES).write_text(json.dumps(titles, indent=1))


def passages(text: str) -> Iterator[str]:
    """Runs of whole lines with at least `CHARACTERS` characters each, and the shorter rest unless it is blank."""
    passage = ""
    for line in text.splitlines(keepends=True):
        passage += line
        if len(passage) >= CHARACTERS:
            yield passage
            passage = ""
    if passage.strip():
        yield passage


def title(file: Path) -> str:
    """`Dickens_Bleak_1853.txt` is "Dickens, Bleak (1853)"; other names stay as they are."""
    parts = file.stem.split("_")
    return f"{parts[0]}, {' '.join(parts[1:-1])} ({parts[-1]})" if len(parts) > 2 else file.stem
