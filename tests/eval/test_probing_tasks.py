"""Probing tasks on made-up novels: no novel is in both parts, and only the text reveals the label."""

import itertools
import json
import random
import re
import textwrap
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from probing_helpers import bare, naive_bayes_accuracy

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from study import probing_tasks
from study.named_text import keep_titles, with_text, with_text_of_results
from study.probing_tasks import NOVELS, TASKS, draw, held_out, with_probing_tasks
from study.probing_texts import GENDER, PERSON, TENSE, decided
from study.storage import Storage
from study.studies import BLOCK_10, TINY

WORDS = ["amber", "basket", "candle", "door", "engine", "feather", "garden", "hollow", "island", "jacket", "kettle"]
N_ROWS, N_SPLITS = {"train": 24, "test": 12}, 3
TITLES = sorted({title for task in TASKS.values() for of_label in task.novels.values() for title in of_label})
STUDY = replace(BLOCK_10, probing_splits=N_SPLITS)
BY_WORDS = {"person": PERSON, "gender": GENDER, "tense": TENSE}


def name_in(title: str) -> str:
    """A name that occurs in all texts of a novel and in no other novel."""
    author, story, _ = title.split("_")
    return f"{author}{story.lower()}"


def made_up_novel(title: str) -> str:
    """Paragraphs of every kind that a task looks for; those that no task may use contain the word `broken`."""
    rng = random.Random(title)

    def sentence(*words: str) -> str:
        author = [f"{title.split('_')[0].lower()}ism"] * rng.randrange(2)  # a word typical of the author
        middle = [*rng.choices(WORDS, k=19), *words, *author, name_in(title)]
        return f"The {' '.join(rng.sample(middle, len(middle)))} end."

    def sentences(words_by_label) -> list[str]:
        return [
            sentence(rng.choice(sorted(words))) for label in words_by_label.values() for words in vars(label).values()
        ]

    paragraphs = [" ".join(["long"] * 60), f"Chapter of {title}"]
    for _ in range(14):
        paragraphs += [sentence(), *sentences(PERSON), *sentences(GENDER)]
        paragraphs += [f'"{text}"' for text in sentences(TENSE)]
        paragraphs += [f'"{sentence("inside")} {sentence("inside")} {sentence("inside")}" so it ended.']
        paragraphs += [f'"{name_in(title)} {" ".join(rng.choices(WORDS, k=8))}," answered the {rng.choice(WORDS)}.'] * 2
        paragraphs += [f'"No end of it. {sentence("broken")}']
        odd = ("--", "_so_", "1850", "café", "[sic]", "Daniel s", "LOUD", "...", "It 's")
        paragraphs += [sentence().replace("The", f"The broken {mark}") for mark in odd]
    if len(title) % 2:
        return "\ufeff" + "\n\n".join(textwrap.fill(text, 70) for text in paragraphs)
    return "\ufeff" + "\n".join(paragraphs)


@pytest.fixture(scope="module")
def novels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("novels")
    for title in TITLES:
        (folder / f"{title}.txt").write_text(made_up_novel(title), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def _few_rows(monkeypatch):
    monkeypatch.setattr(probing_tasks, "N_ROWS", N_ROWS)


@pytest.fixture(scope="module")
def built(novels, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing_tasks, "N_ROWS", N_ROWS)
        return with_text(STUDY, str(novels), tmp_path_factory.mktemp("work"))


def rows_of(study, name: str, split: int) -> dict[str, list[dict]]:
    [folder] = [Path(path) for path in study.probing_datasets if Path(path).name == f"{name}_split{split}"]
    return {part: [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()] for part in N_ROWS}


@pytest.mark.parametrize("name", TASKS)
def test_no_novel_is_in_both_parts_of_a_split(built, name):
    titles = {name_in(title): title for title in TITLES}
    listed = json.loads((Path(built.probing_datasets[0]).parent / NOVELS).read_text())
    for split in range(N_SPLITS):
        novels = {}
        for part, rows in rows_of(built, name, split).items():
            for row in rows:
                [title] = {titles[word] for word in re.findall(r"\w+", row["text"]) if word in titles}
                assert title in TASKS[name].novels[row["label"]]
                novels.setdefault(part, set()).add(title)
        assert not novels["train"] & novels["test"]
        assert {part: sorted(found) for part, found in novels.items()} == listed[f"{name}_split{split}"]
        n_of_label = [len(titles) for titles in dict.fromkeys(TASKS[name].novels.values())]
        assert len(novels["test"]) == sum(round(n / 3) for n in n_of_label)


@pytest.mark.parametrize("name", TASKS)
def test_parts_are_balanced_and_have_no_text_twice(built, name):
    for split in range(N_SPLITS):
        parts = rows_of(built, name, split)
        for part, rows in parts.items():
            assert all(list(row) == ["text", "label"] for row in rows)
            assert Counter(row["label"] for row in rows) == dict.fromkeys(TASKS[name].novels, N_ROWS[part])
            n_changes = sum(row["label"] != following["label"] for row, following in itertools.pairwise(rows))
            assert n_changes > len(rows) / 4  # mixed
        texts = [bare(row["text"]) for rows in parts.values() for row in rows]
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", TASKS)
def test_texts_fit_and_have_no_marks_of_speech_or_of_their_file(built, name):
    for split in range(N_SPLITS):
        for row in itertools.chain(*rows_of(built, name, split).values()):
            text, label = row["text"], row["label"]
            assert 20 <= len(text.split()) <= 45
            assert re.fullmatch(r"[A-Za-z ,.]+", text)  # all characters in these novels' clean texts
            assert "broken" not in text
            assert ("inside" not in text) or label == "dialogue" or name == "tense"
            assert ("answered" in text) <= (label == "dialogue")


@pytest.mark.parametrize("name", BY_WORDS)
def test_words_that_decide_a_test_label_are_in_no_training_text(built, name):
    words = BY_WORDS[name]
    for split in range(N_SPLITS):
        for part, rows in rows_of(built, name, split).items():
            assert all(decided(row["text"], words) == (row["label"], part) for row in rows)
    everything = [word for of_label in words.values() for deciding in vars(of_label).values() for word in deciding]
    assert len(everything) == len(set(everything))


@pytest.mark.parametrize("name", TASKS)
def test_words_tell_as_much_of_a_label_as_they_should(built, name):
    accuracies = [naive_bayes_accuracy(*rows_of(built, name, split).values()) for split in range(N_SPLITS)]
    mean = sum(accuracies) / N_SPLITS
    if name in BY_WORDS:  # training texts lack the words that decide test labels
        assert 0.3 < mean < 0.7
    elif name == "decades":  # words typical of authors do not help
        assert 0.2 < mean < 0.8
    else:
        assert 0.65 < mean < 1


def test_splits_have_other_test_novels_and_other_texts(built):
    for name in TASKS:
        held = [frozenset(titles) for titles in held_out(name, 5)]
        assert len(set(held)) == 5
        assert held[:3] == [frozenset(titles) for titles in held_out(name, 3)]
        first, second = (
            {row["text"] for row in itertools.chain(*rows_of(built, name, split).values())} for split in (0, 1)
        )
        assert len(first - second) > len(first) / 4


def test_the_same_novels_are_the_same_study_wherever_they_are(built, novels, tmp_path):
    again = with_text(STUDY, str(novels), tmp_path / "work")
    assert again.probing_datasets != built.probing_datasets
    assert again.settings() == built.settings()
    assert "probing_datasets" not in built.settings()
    assert len(built.probing_datasets) == N_SPLITS * len(TASKS)
    file = Path(again.probing_datasets[0]) / "test.jsonl"
    file.write_text(file.read_text().replace(WORDS[0], WORDS[1]))
    assert with_text(STUDY, str(novels), tmp_path / "work").settings() != built.settings()  # the sets count
    # What the results refer to is kept beside them, so they can be shown without the novels.
    storage = Storage(built, tmp_path / "results", tmp_path / "work")
    keep_titles(built, storage.results)
    assert len(json.loads((storage.results / NOVELS).read_text())) == N_SPLITS * len(TASKS)
    storage.evaluations.append({"arm": "topk", "seed": 0, "metrics": {}})
    shown = with_text_of_results(replace(STUDY, evals={"core": {}}), storage.results)
    assert shown.settings() == built.settings()
    assert list(Storage(shown, storage.results, tmp_path).evaluations.load()) == [("topk", 0)]


def test_sets_that_are_there_are_not_built_again(built, monkeypatch, tmp_path):
    work = Path(built.probing_datasets[0]).parents[1]
    monkeypatch.setattr(probing_tasks, "write_tasks", lambda *_: pytest.fail("built again"))
    assert with_probing_tasks(replace(STUDY, text=built.text), tmp_path, work).probing_tasks == built.probing_tasks
    assert with_probing_tasks(TINY, tmp_path, work) == TINY  # TINY has no such tasks


def test_missing_novels_are_named(novels, tmp_path):
    for title in TITLES[2:]:
        (tmp_path / f"{title}.txt").symlink_to(novels / f"{title}.txt")
    message = (
        rf"--text {tmp_path} lacks 2 of the {len(TITLES)} novels .*: {TITLES[0]}.txt, {TITLES[1]}.txt. "
        "Get them from https://github"
    )
    with pytest.raises(ValueError, match=message):
        with_text(STUDY, str(tmp_path), tmp_path / "work")
    assert not list((tmp_path / "work").glob("probing*"))
    with_text(replace(STUDY, probing_splits=0), str(tmp_path), tmp_path / "work")


def test_texts_are_drawn_in_turns_from_all_novels():
    sources = [[f"a{i}" for i in range(20)], ["b0", "b1"], [f"c{i}" for i in range(20)]]
    drawn = draw(sources, 10, "task/train/label")
    assert Counter(text[0] for text in drawn) == {"a": 4, "b": 2, "c": 4}
    assert draw(sources, 10, "task/train/label") == drawn
    assert set(draw(sources, 10, "other/train/label")) != set(drawn)
    with pytest.raises(
        ValueError, match=r"the probing task t/test/x has 42 usable texts but needs 43; use complete novels\."
    ):
        draw(sources, 43, "t/test/x")
