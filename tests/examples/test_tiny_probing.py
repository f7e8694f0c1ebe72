"""The bundled text sets match their README, and their script builds such sets."""

import importlib.util
import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from probing_helpers import bare, naive_bayes_accuracy

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_probing"
LABELS = {
    "authors": {"bronte", "eliot", "james", "morris"},
    "late_authors": {"chesterton", "conrad", "corelli", "haggard"},
    "periods": {"1850s", "1920"},
    "speech": {"spoken", "narrated"},
    "sentence_polarity": {"positive", "negative"},
    "subjectivity": {"subjective", "objective"},
}
FILES = {
    "positive": "sentence_polarity/rt-polarity.pos",
    "negative": "sentence_polarity/rt-polarity.neg",
    "subjective": "subjectivity/quote.tok.gt9.5000",
    "objective": "subjectivity/plot.tok.gt9.5000",
}
OF_NOVELS = ("authors", "late_authors", "periods")
ROWS = {name: (250, 100) if name in OF_NOVELS else (400, 100) for name in LABELS}


def load_build():
    spec = importlib.util.spec_from_file_location("tiny_probing_build", FOLDER / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


def read(folder: Path, name: str) -> tuple[list[dict], list[dict]]:
    train, test = ((folder / name / f"{split}.jsonl").read_text(encoding="utf-8") for split in ("train", "test"))
    return [json.loads(line) for line in train.splitlines()], [json.loads(line) for line in test.splitlines()]


def assert_well_formed(folder: Path, name: str) -> None:
    """Check columns, balanced labels in mixed order, plain single-line texts, and no duplicates, across splits too."""
    splits = read(folder, name)
    for rows, n in zip(splits, ROWS[name], strict=True):
        assert all(list(row) == ["text", "label"] for row in rows)
        assert Counter(row["label"] for row in rows) == dict.fromkeys(LABELS[name], n)
        n_changes = sum(row["label"] != following["label"] for row, following in itertools.pairwise(rows))
        assert n_changes == pytest.approx(len(rows) * (1 - 1 / len(LABELS[name])), rel=0.2)
    texts = [row["text"] for rows in splits for row in rows]
    assert all(
        text == " ".join(text.split()) and text.isascii() and not re.search(r"[&<>\[\]]", text) for text in texts
    )
    assert len({bare(text) for text in texts}) == len(texts)


@pytest.mark.parametrize("name", LABELS)
def test_sets_are_balanced_and_share_no_text_between_splits(name):
    assert_well_formed(FOLDER, name)


@pytest.mark.parametrize(
    ("name", "label", "word"),
    [
        ("authors", "morris", "thou"),
        ("late_authors", "conrad", "amongst"),
        ("periods", "1850s", "upon"),
        ("speech", "spoken", "you"),
        ("speech", "narrated", "his"),
        ("sentence_polarity", "negative", "bad"),
        ("sentence_polarity", "positive", "best"),
        ("subjectivity", "subjective", "movie"),
        ("subjectivity", "objective", "father"),
    ],
)
def test_labels_mean_what_they_say(name, label, word):
    rows = [row for split in read(FOLDER, name) for row in split]
    having = Counter(row["label"] for row in rows if word in row["text"].lower().split())
    assert having[label] > 0.7 * having.total() > 7


@pytest.mark.parametrize("name", OF_NOVELS)
def test_passages_of_novels_are_whole_sentences_of_40_to_60_words(name):
    for row in [row for rows in read(FOLDER, name) for row in rows]:
        assert 40 <= len(row["text"].split()) <= 60
        assert re.match(r"[A-Z]", row["text"])
        assert row["text"][-1] in ".!?"
        assert not re.search(r'"|CHAPTER|\b[XVI]{2,}\.', row["text"]), row["text"]


def test_author_test_passages_were_unseen_by_the_bundled_model_and_its_saes(tiny_lm):
    held_out = json.loads((tiny_lm / "training.json").read_text())["held_out_files"]
    for *train, test in build.AUTHORS.values():
        assert f"{test}.txt" in held_out
        assert not {f"{name}.txt" for name in train} & set(held_out)
    bundled = "".join((tiny_lm / "text" / f"{split}.jsonl").read_text("utf-8") for split in ("train", "validation"))
    bundled = bare(bundled.replace("\\n", " "))
    _, test = read(FOLDER, "authors")
    assert not [row for row in test if bare(row["text"])[:60] in bundled]


def test_files_are_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.suffix in (".jsonl", ".py", ".md")) < 1.6e6


@pytest.mark.parametrize("name", LABELS)
def test_readme_table_is_what_the_files_hold(name):
    train, test = read(FOLDER, name)
    n_bytes = sum((FOLDER / name / f"{split}.jsonl").stat().st_size for split in ("train", "test"))
    accuracy = naive_bayes_accuracy(train, test)
    cells = f"{len(train):,} | {len(test)} | {n_bytes / 1000:.0f} | {1 / len(LABELS[name]):.2f} | {accuracy:.2f} |"
    lines = (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(f"| `{name}` |") and line.endswith(f" {cells}")], cells
    assert accuracy > 1 / len(LABELS[name]) + 0.15


@pytest.mark.parametrize(
    "phrase",
    [
        "https://creativecommons.org/licenses/by/4.0/",
        "Bo Pang and Lillian Lee",
        "A Sentimental Education",
        "Seeing stars",
        "public domain",
        "What was changed",
        "143e601875d70e195f2cc5ebd8b034609271194d",
        "5db857e6f7df11eabb5e5665836db9ec8df07e28",
    ],
)
def test_readme_gives_sources_and_licences(phrase):
    assert phrase in " ".join((FOLDER / "README.md").read_text(encoding="utf-8").split())


WORDS = ["amber", "basket", "candle", "door", "engine", "feather", "garden", "hollow", "island", "jacket", "kettle"]


def made_up_novel(name: str, rng: random.Random) -> str:
    """Chapters of wrapped sentences with the novel's name, speech and headings; those in the first 5/12 say `early`."""
    lines = []
    for chapter in range(120):
        part = "early" if chapter < 50 else "later"
        lines += ["CHAPTER IV. OF HEADINGS", "A Heading", "Chapter IV. Of headings and what is said of them.", ""]
        for _ in range(14):
            first, *rest = rng.choices(WORDS, k=12)
            lines += [" ".join([first.capitalize(), *rest]) + f" and Mr.\n{name} {part}."]
        lines += ['"Speech," said the headings. "More of it."', f"A naïve heading of {name}.", ""]
        words = [" ".join(rng.choices(WORDS, k=18)) for _ in range(2)]
        lines += [f'"Spoken {words[0]} of {name}," said he. "Spoken {words[1]} of {name}."']
        lines += [f'"Broken {words[0]}, without an end.'] if chapter == 0 else []
        lines += [""]
    return "\ufeff" + "\n".join(lines)


def made_up_sentences(label: str, rng: random.Random) -> bytes:
    """500 usable lines, the minimum, among lines to be skipped: duplicates, or lines with the word `broken`."""
    usable = [f"{label} {i} \x85 {' '.join(rng.choices(WORDS, k=6))} . " for i in range(500)]
    odd = ["caf\ufffd", "it's&#233 ;", "<b>bold</b>", "[cho's]"]
    broken = [f"{label} broken {i} {odd[i % len(odd)]} " for i in range(500)]
    shared = [f"broken {i} under both labels" for i in range(50)]
    twice = [line.upper().replace(" ", "  ") for line in usable]
    lines = [*usable[250:], *broken, *shared, *usable[:250]]
    rng.shuffle(lines)
    return "\n".join([*twice, *lines, ""]).encode().replace("\ufffd".encode(), b"\xe9")


def write_sources(folder: Path) -> None:
    """Write made-up novels and labelled sentences under the names of the real ones."""
    rng = random.Random(3)
    names = {name for groups in build.NOVEL_SETS.values() for names in groups.values() for name in names}
    for name in sorted(names | {*build.SPEECH_NOVELS}):
        (folder / f"{name}.txt").write_text(made_up_novel(name.split("_")[1], rng), encoding="utf-8")
    for label, file in FILES.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(made_up_sentences(label, rng))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder, folder


def run(monkeypatch, sources, out: Path, *arguments: str) -> dict[str, bytes]:
    monkeypatch.setattr(sys, "argv", ["build.py", *map(str, sources), "--out", str(out), *arguments])
    build.main()
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def test_script_writes_such_sets_and_says_so(monkeypatch, capsys, sources, tmp_path):
    files = run(monkeypatch, sources, tmp_path)
    assert list(files) == [f"{name}/{split}.jsonl" for name in sorted(LABELS) for split in ("test", "train")]
    printed = capsys.readouterr().out
    for name, content in files.items():
        assert re.search(rf"{name}: {content.count(b'text')} rows .*, {len(content):,} bytes", printed)
    for name in LABELS:
        assert_well_formed(tmp_path, name)
    assert not any(b"broken" in content or b"eading" in content for content in files.values())


def test_script_labels_each_text_by_its_source(monkeypatch, sources, tmp_path):
    run(monkeypatch, sources, tmp_path)
    for name in ("sentence_polarity", "subjectivity"):
        for row in [row for rows in read(tmp_path, name) for row in rows]:
            assert row["text"].lower().startswith(row["label"])
    for name in OF_NOVELS:
        train, test = read(tmp_path, name)
        for label, (first, second, held_out) in build.NOVEL_SETS[name].items():
            titles = [novel.split("_")[1] for novel in (first, second, held_out)]
            of_label = [[row["text"] for row in rows if row["label"] == label] for rows in (train, test)]
            found = [[sum(f"Mr. {title} " in text for text in texts) for title in titles] for texts in of_label]
            assert found == [[125, 125, 0], [0, 0, 100]]
            assert all("later" in text and "early" not in text for text in of_label[1])
            assert all(text.endswith(("later.", "early.")) for texts in of_label for text in texts)
    *train_novels, test_novel = (name.split("_")[1] for name in build.SPEECH_NOVELS)
    train, test = read(tmp_path, "speech")
    for rows, novels in ((train, train_novels), (test, [test_novel])):
        for row in rows:
            assert row["text"].startswith("Spoken") == (row["label"] == "spoken")
            assert any(novel in row["text"] for novel in novels)


def test_script_is_deterministic_and_seeded(monkeypatch, sources, tmp_path):
    first, again = (run(monkeypatch, sources, tmp_path / name) for name in ("first", "again"))
    assert first == again
    other = run(monkeypatch, sources, tmp_path / "other", "--seed", "1")
    assert not [name for name in first if set(first[name].splitlines()) == set(other[name].splitlines())]


def test_too_small_a_source_is_refused(monkeypatch, sources, tmp_path):
    monkeypatch.setattr(build, "TRAIN_LABEL_ROWS", 401)
    with pytest.raises(ValueError, match="positive has 500 usable texts but needs 501; pass the complete source"):
        build.build(*sources, seed=0)


def test_sentences_end_at_full_stops_but_not_at_abbreviations():
    block = "Mr. Rochester came. Did I see St. John, or M. Paul? I did... Yes! what then, etc. and so on. No end"
    want = ["Mr. Rochester came.", "Did I see St. John, or M. Paul?", "I did...", "Yes! what then, etc. and so on."]
    assert list(build.sentences(block)) == want


def test_blocks_end_at_headings_but_not_at_blank_lines():
    novel = (
        "Jane Eyre\nCHAPTER I\nThere was no\npossibility of walking\n\nthat day. Cold\nwinds came.\nThe Workshop\nII.\n"
    )
    long = novel.replace("no\n", f"no {'very ' * 9}good\n").replace("walking\n", f"walking {'so ' * 9}far\n")
    long = long.replace("Cold\n", f"Cold and {'very ' * 8}piercing\n")
    found = [block for block in build.blocks(long) if block]
    assert len(found) == 1
    assert found[0].startswith("There was no very")
    assert found[0].endswith("winds came.")


def test_passages_are_consecutive_sentences_of_40_to_60_words_together():
    lengths = [20, 20, 30, 35, 7, 70, 45, 12, 12, 12, 12, 39, 60, 1, 59, 39]
    text = " ".join(" ".join(["Then", *[f"s{i}"] * (n - 1)]) + "." for i, n in enumerate(lengths))
    numbers = [sorted({int(i) for i in re.findall(r"s(\d+)", passage)}) for passage in build.passages(text)]
    assert numbers == [[0, 1], [6], [7, 8, 9, 10], [14]]
    assert [len(passage.split()) for passage in build.passages(text)] == [40, 45, 48, 60]


@pytest.mark.parametrize("odd", ['He said "No."', "'Tis so.", "The café closed.", "The `go' came."])
def test_passages_stop_at_speech_and_odd_characters(odd):
    half = " ".join(["Then it"] * 12) + "."
    assert [len(passage.split()) for passage in build.passages(f"{half} It stayed. {half}")] == [50]
    assert list(build.passages(f"{half} {odd} {half}")) == []


def test_passages_begin_at_the_beginning_of_a_sentence():
    rest = " ".join(["and then it"] * 15) + "."
    assert list(build.passages(f"CHAPTER II\nThis is whole {rest}")) == [f"This is whole {rest}"]
    assert list(build.passages(f"CHAPTER II\nthis is not {rest}")) == []


def test_spaces_before_commas_and_full_stops_are_taken_out():
    text = f"To be kind  for you pity , and so on{' and on' * 20} ."
    assert list(build.passages(text)) == [f"To be kind for you pity, and so on{' and on' * 20}."]
