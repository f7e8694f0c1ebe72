"""Ten probing tasks with two labels each, built in several splits from novels that the user supplies.

A split has texts for training and for testing a probe. No novel is in both parts, so that names of characters do not
help. Splits differ in their test novels and in the texts that are drawn; two splits may share texts. `probing_texts.py`
defines the texts and the words that decide their labels.
"""

import hashlib
import itertools
import json
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sae_lens_sampled.files import atomic_path
from study.configs import Study
from study.probing_texts import dialogue, gender, narration, person, spoken, tense
from tiny_probing.build import Rows, distinct, read, shuffled, write

N_ROWS = {"train": 150, "test": 75}
"""Number of texts per label, by part."""
NOVELS = "probing_novels.json"
"""Name of the file beside the tasks that says which novels are in which part of which split."""
SOURCE = "https://github.com/computationalstylistics/100_english_novels"

SEED = 0

Text = tuple[str, str | None]
"""A text, and the part that it must be in, or None for any."""
Source = tuple[str, str]
"""Label and novel."""
Finder = Callable[[str, str], Iterable[Text]]
"""Finds the texts of a label in a novel."""


@dataclass(frozen=True)
class Task:
    """A probing task; each part of a split has as many texts of one label as of the other."""

    novels: Mapping[str, tuple[str, ...]]
    """Novels by label, `Author_Title_Year`; about a third of each label's are for the test."""
    find: Finder
    """Finds the texts of a label in one of its novels."""

    def test_novels(self) -> list[set[str]]:
        """Every choice of test novels, a third of each label's; labels with the same novels share the choice."""
        of_labels = dict.fromkeys(self.novels.values())
        chosen = itertools.product(*(itertools.combinations(titles, round(len(titles) / 3)) for titles in of_labels))
        return [set(itertools.chain(*of_each)) for of_each in chosen]


def _narration(novel: str, _label: str) -> Iterable[Text]:
    return ((text, None) for text in narration(novel))


def _dialogue(novel: str, label: str) -> Iterable[Text]:
    return ((text, None) for text in (dialogue(novel) if label == "dialogue" else narration(novel)))


def _by_words(find: Callable[[str], Iterable[str]], decide: Callable[[str], tuple[str, str] | None]) -> Finder:
    """A finder of texts whose words decide label and part."""

    def of_label(novel: str, label: str) -> Iterable[Text]:
        kinds = ((text, decide(text)) for text in find(novel))
        return ((text, kind[1]) for text, kind in kinds if kind is not None and kind[0] == label)

    return of_label


def _from_own_novels(novels: Mapping[str, str]) -> Task:
    """A task whose labels have their own novels."""
    return Task({label: tuple(titles.split()) for label, titles in novels.items()}, _narration)


def _from_same_novels(labels: tuple[str, str], find: Finder, novels: str) -> Task:
    """A task whose novels have texts of both labels."""
    return Task(dict.fromkeys(labels, tuple(novels.split())), find)


TASKS = {
    # Pairs of authors of about the same time.
    "barclay_lawrence": _from_own_novels(
        {
            "barclay": "Barclay_Rosary_1909 Barclay_Postern_1911 Barclay_Ladies_1917",
            "lawrence": "Lawrence_Peacock_1911 Lawrence_Women_1920 Lawrence_Serpent_1926",
        }
    ),
    "blackmore_braddon": _from_own_novels(
        {
            "blackmore": "Blackmore_Lorna_1869 Blackmore_Erema_1877 Blackmore_Springhaven_1887",
            "braddon": "Braddon_Audley_1862 Braddon_Quest_1871 Braddon_Phantom_1883",
        }
    ),
    "burnett_doyle": _from_own_novels(
        {
            "burnett": "Burnett_Lord_1886 Burnett_Princess_1905 Burnett_Garden_1911",
            "doyle": "Doyle_Micah_1889 Doyle_Hound_1902 Doyle_Lost_1912",
        }
    ),
    "gaskell_meredith": _from_own_novels(
        {
            "gaskell": "Gaskell_Ruth_1855 Gaskell_Lovers_1863 Gaskell_Wives_1865",
            "meredith": "Meredith_Feverel_1859 Meredith_Richmond_1871 Meredith_Marriage_1895",
        }
    ),
    "lytton_thackeray": _from_own_novels(
        {
            "lytton": "Lytton_Novel_1853 Lytton_What_1858 Lytton_Kenelm_1873",
            "thackeray": "Thackeray_Pendennis_1850 Thackeray_Esmond_1852 Thackeray_Virginians_1859",
        }
    ),
    # Fourteen authors, one novel each.
    "decades": _from_own_novels(
        {
            "1850s": "Cbronte_Shirley_1849 Gaskell_Ruth_1855 Lytton_Novel_1853 Meredith_Feverel_1859 "
            "Thackeray_Pendennis_1850 Trollope_Warden_1855 Wcollins_Basil_1852",
            "1910s": "Barclay_Postern_1911 Bennet_Helen_1910 Burnett_Garden_1911 Chesterton_Innocence_1911 "
            "Corelli_Innocent_1914 Doyle_Lost_1912 Lawrence_Peacock_1911",
        }
    ),
    # The files of all tasks have paragraphs; those of the next two also mark speech with double quotation marks.
    "dialogue": _from_same_novels(
        ("dialogue", "narration"),
        _dialogue,
        "Braddon_Quest_1871 Cbronte_Shirley_1849 Chesterton_Thursday_1908 Doyle_Hound_1902 Eliot_Felix_1866 "
        "Gaskell_Wives_1865 Lawrence_Peacock_1911 Lytton_Kenelm_1873 Thackeray_Pendennis_1850",
    ),
    "tense": _from_same_novels(
        ("present", "past"),
        _by_words(spoken, tense),
        "Anon_Clara_1864 Barclay_Ladies_1917 Barclay_Rosary_1909 Blackmore_Springhaven_1887 Braddon_Quest_1871 "
        "Cbronte_Shirley_1849 Eliot_Daniel_1876 Gaskell_Wives_1865 Lytton_Kenelm_1873 Lytton_Novel_1853 "
        "Lytton_What_1858 Thackeray_Virginians_1859",
    ),
    # All told in the first person.
    "person": _from_same_novels(
        ("first", "third"),
        _by_words(narration, person),
        "Anon_Clara_1864 Blackmore_Erema_1877 Blackmore_Lorna_1869 Cbronte_Jane_1847 Doyle_Hound_1902 Doyle_Lost_1912 "
        "Doyle_Micah_1889 Haggard_Mines_1885 Haggard_She_1887 Haggard_Sheallan_1921 Lawrence_Peacock_1911 "
        "Meredith_Richmond_1871",
    ),
    # All told in the third person.
    "gender": _from_same_novels(
        ("man", "woman"),
        _by_words(narration, gender),
        "Barclay_Ladies_1917 Bennet_Helen_1910 Blackmore_Springhaven_1887 Braddon_Audley_1862 Cbronte_Shirley_1849 "
        "Eliot_Daniel_1876 Galsworthy_Man_1906 Gaskell_Lovers_1863 Gissing_Women_1893 James_Roderick_1875 "
        "Lawrence_Women_1920 Lytton_Kenelm_1873 Meredith_Marriage_1895 Thackeray_Pendennis_1850 Ward_Ashe_1905",
    ),
}


def with_probing_tasks(study: Study, novels: Path, work: Path) -> Study:
    """The study with `probing_splits` splits of each task, built in the folder `work`; unchanged if it has none.

    Raises:
        ValueError: if the folder `novels` lacks a novel of the tasks, or the novels have too few texts.
    """
    if not study.probing_splits:
        return study
    folder = work / f"probing_{study.text}_{study.probing_splits}"
    if not folder.is_dir():
        with atomic_path(folder) as unfinished:
            write_tasks(novels, unfinished, study.probing_splits)
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*/*.jsonl")):
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode() + file.read_bytes())
    datasets = sorted({str(file.parent) for file in folder.glob("*/*.jsonl")})
    return replace(study, probing_datasets=tuple(datasets), probing_tasks=digest.hexdigest()[:16])


def write_tasks(novels: Path, folder: Path, n_splits: int) -> None:
    """Write `TASK_splitI/{train,test}.jsonl` for each task and split, and which novels are in which part.

    Raises:
        ValueError: if the folder `novels` lacks a novel of the tasks, or the novels have too few texts.
    """
    check_novels(novels)
    novels_of: dict[str, dict[str, list[str]]] = {}
    for name, task in TASKS.items():
        texts = find_texts(task, novels)
        for split, test in enumerate(held_out(name, n_splits)):
            of_split = f"{name}_split{split}"
            for part, rows in split_rows(of_split, texts, test).items():
                write(rows, folder / of_split / f"{part}.jsonl")
            titles = {title for of_label in task.novels.values() for title in of_label}
            novels_of[of_split] = {"train": sorted(titles - test), "test": sorted(test)}
    (folder / NOVELS).write_text(json.dumps(novels_of, indent=1))


def check_novels(folder: Path) -> None:
    """Reject a folder that lacks novels of the tasks.

    Raises:
        ValueError: if files are missing; the message lists them.
    """
    files = sorted(
        {f"{title}.txt" for task in TASKS.values() for of_label in task.novels.values() for title in of_label}
    )
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(
            f"--text {folder} lacks {len(missing)} of the {len(files)} novels that the probing tasks are built from: "
            f"{', '.join(missing)}. Get them from {SOURCE}, or set probing_splits=0 in the study."
        )


def find_texts(task: Task, novels: Path) -> dict[Source, list[Text]]:
    """All texts of a task, by label and novel, without duplicates."""
    found = {
        (label, title): dict(task.find(read(novels / f"{title}.txt"), label))
        for label, titles in task.novels.items()
        for title in titles
    }
    texts = distinct(found)
    return {source: [(text, found[source][text]) for text in texts[source]] for source in found}


def held_out(name: str, n_splits: int) -> list[set[str]]:
    """Test novels of each split of a task; a choice of novels repeats only after all others were used."""
    choices = TASKS[name].test_novels()
    random.Random(f"{SEED}/{name}").shuffle(choices)
    return list(itertools.islice(itertools.cycle(choices), n_splits))


def split_rows(name: str, texts: Mapping[Source, list[Text]], test: Collection[str]) -> dict[str, Rows]:
    """Rows of both parts of a split, in random order.

    Args:
        name: name of the split, which seeds the draws.
        texts: texts by label and novel.
        test: test novels.

    Raises:
        ValueError: if a label has too few texts for a part.
    """
    parts: dict[str, Rows] = {}
    for part, n_rows in N_ROWS.items():
        rows: Rows = []
        for label in dict.fromkeys(label for label, _ in texts):
            sources = [
                [text for text, only_in in found if only_in in (None, part)]
                for (of_label, title), found in texts.items()
                if of_label == label and (title in test) == (part == "test")
            ]
            rows += [(text, label) for text in draw(sources, n_rows, f"{name}/{part}/{label}")]
        parts[part] = shuffled(rows, SEED)
    return parts


def draw(sources: Sequence[Sequence[str]], n: int, name: str) -> list[str]:
    """Draw `n` texts, taking one from each source in turn until it has no more; `name` seeds the draw.

    Raises:
        ValueError: if the sources have fewer than `n` texts.
    """
    generator = random.Random(f"{SEED}/{name}")
    in_turns = itertools.zip_longest(*(generator.sample(source, len(source)) for source in sources))
    texts = [text for turn in in_turns for text in turn if text is not None]
    if len(texts) < n:
        raise ValueError(f"the probing task {name} has {len(texts)} usable texts but needs {n}; use complete novels.")
    return texts[:n]
