"""Build the labelled text sets of this folder: authors, periods, speech, sentence polarity and subjectivity.

    python examples/tiny_probing/build.py NOVELS_FOLDER LABELLED_FOLDER

NOVELS_FOLDER holds the novels of https://github.com/computationalstylistics/100_english_novels
(commit 143e601875d70e195f2cc5ebd8b034609271194d), `Author_Title_Year.txt` each. LABELLED_FOLDER holds the corpora
`sentence_polarity/` and `subjectivity/` of https://github.com/nltk/nltk_data
(commit 5db857e6f7df11eabb5e5665836db9ec8df07e28), by Bo Pang and Lillian Lee, CC BY 4.0.

Writes `<set>/{train,test}.jsonl`, one `{"text": ..., "label": ...}` per line; the same sources and seed give the same
bytes. What is chosen and what is left out says `README.md` beside this file.
"""

import argparse
import json
import random
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

Label = TypeVar("Label", bound=Hashable)
Rows = list[tuple[str, str]]  # (text, label)

# Three novels of each author; the last is for the test rows and was held out from the bundled language model.
AUTHORS = {
    "bronte": ("Cbronte_Jane_1847", "Cbronte_Shirley_1849", "Cbronte_Villette_1853"),
    "eliot": ("Eliot_Adam_1859", "Eliot_Daniel_1876", "Eliot_Felix_1866"),
    "james": ("James_Roderick_1875", "James_Tragic_1890", "James_Ambassadors_1903"),
    "morris": ("Morris_Water_1897", "Morris_Wood_1894", "Morris_Roots_1890"),
}
LATE_AUTHORS = {
    "chesterton": ("Chesterton_Innocence_1911", "Chesterton_Napoleon_1904", "Chesterton_Thursday_1908"),
    "conrad": ("Conrad_Almayer_1895", "Conrad_Nostromo_1904", "Conrad_Rover_1923"),
    "corelli": ("Corelli_Romance_1886", "Corelli_Satan_1895", "Corelli_Innocent_1914"),
    "haggard": ("Haggard_Mines_1885", "Haggard_She_1887", "Haggard_Sheallan_1921"),
}
PERIODS = {
    "1850s": ("Dickens_Bleak_1853", "Gaskell_Ruth_1855", "Lytton_What_1858"),
    "1920": ("Galsworthy_Saints_1919", "Conrad_Rover_1923", "Ward_Harvest_1920"),
}
NOVEL_SETS = {"authors": AUTHORS, "late_authors": LATE_AUTHORS, "periods": PERIODS}
SPEECH_NOVELS = ("Trollope_Angel_1881", "Gissing_Unclassed_1884", "Hardy_Madding_1874")
"""Novels with double quotation marks that come in pairs; the last is for the test rows."""
LABELLED = {
    "sentence_polarity": {"positive": "rt-polarity.pos", "negative": "rt-polarity.neg"},
    "subjectivity": {"subjective": "quote.tok.gt9.5000", "objective": "plot.tok.gt9.5000"},
}
PASSAGE_WORDS = (40, 60)
TRAIN_NOVEL_ROWS, TEST_NOVEL_ROWS = 125, 100
TRAIN_LABEL_ROWS, TEST_LABEL_ROWS = 400, 100
SPEECH_WORDS = (15, 40)

HEADING = re.compile(r"(?i:chapter|book|volume)\s+[IVXLC\d]+\b")
SENTENCE_END = re.compile(r"[.!?]+(?=\s+[A-Z])")
ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Messrs|Dr|St|Mme|Mlle|Esq|Rev|[A-Z])\.$")
SPEECH = re.compile(r"[\"`]|(?<!\w)'|'(?!\w)")


def one_line(text: str) -> str:
    return " ".join(text.split())


def key(text: str) -> str:
    """What two texts share if they differ in case, spacing and punctuation only."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def is_plain(text: str) -> bool:
    """Whether `text` is printable ASCII without markup and editors' brackets.

    Broken encodings, HTML entities and brackets depend on the source file, so that they would give the label away.
    """
    return text.isascii() and text.isprintable() and not set(text) & set("&<>[]")


def blocks(novel: str) -> Iterator[str]:
    """Running text between headings, lines of verse and the like, on one line each."""
    lines: list[str] = []
    for line in map(str.strip, novel.splitlines()):
        is_title = 0 < len(line) < 45 and line[-1].isalnum()
        if line and (is_title or HEADING.match(line) or not re.search("[a-z]", line)):
            yield one_line(" ".join(lines))
            lines = []
        else:
            lines.append(line)
    yield one_line(" ".join(lines))


def sentences(block: str) -> Iterator[str]:
    """Whole sentences of `block` in order; what follows its last full stop is left out."""
    start = 0
    for end in SENTENCE_END.finditer(f"{block} A"):
        sentence = block[start : end.end()].strip()
        if not ABBREVIATION.search(sentence):
            yield sentence
            start = end.end()


def passages(novel: str, n_words: tuple[int, int] = PASSAGE_WORDS) -> Iterator[str]:
    """Consecutive whole sentences of narration, `n_words` words together, that do not overlap.

    Speech is left out: its quotation marks differ from file to file.
    """
    shortest, longest = n_words
    for block in blocks(novel):
        words: list[str] = []
        # Round brackets are blanked out in these files, some of them before a comma.
        for sentence in sentences(re.sub(r" ([,;:.!?])", r"\1", block)):
            usable = is_plain(sentence) and sentence[0].isupper() and not SPEECH.search(sentence)
            words = [*words, *sentence.split()] if usable else []
            if len(words) >= shortest:
                if len(words) <= longest:
                    yield " ".join(words)
                words = []


def narrated(novel: str) -> Iterator[str]:
    """Sentences of narration, `SPEECH_WORDS` words long."""
    for block in blocks(novel):
        yield from (sentence for sentence in sentences(block) if not SPEECH.search(sentence) and _fits(sentence))


def spoken(novel: str) -> Iterator[str]:
    """What stands between double quotation marks, without these, `SPEECH_WORDS` words long."""
    for block in blocks(novel):
        if block.count('"') % 2 == 0:  # else it is not clear what is inside
            yield from (text for text in block.split('"')[1::2] if not SPEECH.search(text) and _fits(text))


def _fits(text: str) -> bool:
    shortest, longest = SPEECH_WORDS
    return shortest <= len(text.split()) <= longest


def second_half(novel: str) -> str:
    """The part of a novel that no passage in the bundled language model's folder is from."""
    return novel[len(novel) // 2 :]


def distinct(texts_by_label: Mapping[Label, Iterable[str]]) -> dict[Label, list[str]]:
    """Plain texts only, one of each `key`, and none whose key has two labels."""
    keyed = {
        label: {key(text): text for text in map(one_line, texts) if key(text) and is_plain(text)}
        for label, texts in texts_by_label.items()
    }
    n_labels = Counter(name for texts in keyed.values() for name in texts)
    return {label: [text for name, text in texts.items() if n_labels[name] == 1] for label, texts in keyed.items()}


def sample(texts: list[str], n: int, name: str, seed: int) -> list[str]:
    """`n` of `texts` in random order, drawn independently for each `name`.

    Raises:
        ValueError: if there are fewer.
    """
    if len(texts) < n:
        raise ValueError(f"{name} has {len(texts)} usable texts but needs {n}; pass the complete source.")
    return random.Random(f"{seed}/{name}").sample(texts, n)


def shuffled(rows: Rows, seed: int) -> Rows:
    return random.Random(seed).sample(rows, len(rows))


def novel_rows(groups: Mapping[str, Sequence[str]], novels: Mapping[str, str], seed: int) -> dict[str, Rows]:
    """Equal numbers of passages from each label's novels, the test rows from another novel than the training rows."""
    held_out = {names[-1] for names in groups.values()}
    novels = {name: novels[name] for names in groups.values() for name in names}
    texts = distinct({name: passages(second_half(text) if name in held_out else text) for name, text in novels.items()})
    splits: dict[str, Rows] = {"train": [], "test": []}
    for label, names in groups.items():
        for name in names:
            split, n = ("test", TEST_NOVEL_ROWS) if name in held_out else ("train", TRAIN_NOVEL_ROWS)
            splits[split] += [(text, label) for text in sample(texts[name], n, name, seed)]
    return {split: shuffled(rows, seed) for split, rows in splits.items()}


def speech_rows(novels: Mapping[str, str], seed: int) -> dict[str, Rows]:
    """Equal numbers of spoken and of narrated texts from each novel, the test rows from another one."""
    *train, test = SPEECH_NOVELS
    splits: dict[str, Rows] = {"train": [], "test": []}
    of_label = {"spoken": spoken, "narrated": narrated}
    texts = distinct(
        {f"{name} {label}": find(novels[name]) for name in SPEECH_NOVELS for label, find in of_label.items()}
    )
    for label in of_label:
        for name in SPEECH_NOVELS:
            split, n = ("test", TEST_LABEL_ROWS) if name == test else ("train", TRAIN_LABEL_ROWS // len(train))
            drawn = sample(texts[f"{name} {label}"], n, f"{name} {label}", seed)
            splits[split] += [(text, label) for text in drawn]
    return {split: shuffled(rows, seed) for split, rows in splits.items()}


def labelled_rows(texts_by_label: Mapping[str, Iterable[str]], seed: int) -> dict[str, Rows]:
    """Equal numbers of texts of each label, first those of the training split."""
    splits: dict[str, Rows] = {"train": [], "test": []}
    for label, texts in distinct(texts_by_label).items():
        drawn = [(text, label) for text in sample(texts, TRAIN_LABEL_ROWS + TEST_LABEL_ROWS, label, seed)]
        splits["train"] += drawn[:TRAIN_LABEL_ROWS]
        splits["test"] += drawn[TRAIN_LABEL_ROWS:]
    return {split: shuffled(rows, seed) for split, rows in splits.items()}


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")


def build(novels: Path, labelled: Path, seed: int) -> dict[str, dict[str, Rows]]:
    """Rows of each set and split."""
    names = {name for groups in NOVEL_SETS.values() for names in groups.values() for name in names} | {*SPEECH_NOVELS}
    texts = {name: read(novels / f"{name}.txt") for name in sorted(names)}
    sets = {name: novel_rows(groups, texts, seed) for name, groups in NOVEL_SETS.items()}
    sets["speech"] = speech_rows(texts, seed)
    for folder, files in LABELLED.items():
        # Not splitlines(), which takes other control characters for line ends too.
        texts = {label: read(labelled / folder / file).split("\n") for label, file in files.items()}
        sets[folder] = labelled_rows(texts, seed)
    return sets


def write(rows: Rows, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows]
    file.write_text("".join(lines), encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("novels", type=Path, help="folder with the novels as .txt files")
    parser.add_argument("labelled", type=Path, help="folder with sentence_polarity/ and subjectivity/")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, splits in build(args.novels, args.labelled, args.seed).items():
        for split, rows in splits.items():
            file = args.out / name / f"{split}.jsonl"
            write(rows, file)
            counts = ", ".join(f"{n} {label}" for label, n in sorted(Counter(label for _, label in rows).items()))
            print(f"{file}: {len(rows)} rows ({counts}), {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
