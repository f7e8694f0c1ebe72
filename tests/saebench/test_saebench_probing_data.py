"""Labelled texts for sparse probing: accepted formats, splits, and data that cannot be probed."""

import datasets
import pytest

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from eval_helpers import PROBING

from sae_lens_sampled.saebench import load_probing_dataset
from sae_lens_sampled.saebench.probing_data import common_sizes


@pytest.fixture
def rows():
    return [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(200)]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_files_of_all_kinds_are_read(kind, rows, tmp_path):
    file = tmp_path / "a [folder]" / f"mine.{kind}"
    file.parent.mkdir()
    data = datasets.Dataset.from_list(rows)
    {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[kind](str(file))
    got = load_probing_dataset(file)
    assert (got.name, got.classes, got.test) == ("mine", ["a", "b"], None)
    assert got.train["a"] == [row["text"] for row in rows if row["label"] == "a"]


def test_a_folder_and_a_dataset_dict_have_splits_and_other_columns_can_be_named(rows, tmp_path):
    renamed = [{"review": row["text"], "stars": i % 2} for i, row in enumerate(rows)]
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list(renamed[:120]), test=datasets.Dataset.from_list(renamed[120:])
    )
    got = load_probing_dataset(both, "reviews", text_column="review", label_column="stars")
    assert (len(got.train["0"]), len(got.test["1"])) == (60, 40)
    polarity = load_probing_dataset(PROBING)
    assert (polarity.name, polarity.classes) == ("sentence_polarity", ["negative", "positive"])
    assert polarity.test is not None


def test_splits_are_balanced_random_and_disjoint(rows):
    data = load_probing_dataset(datasets.Dataset.from_list(rows), "mine")
    assert data.largest_sizes() == (160, 40)
    train, test = data.split(160, 40, seed=1)
    for label in "ab":
        assert (len(train[label]), len(test[label])) == (80, 20)
        assert sorted(train[label] + test[label]) == sorted(row["text"] for row in rows if row["label"] == label)
    assert data.split(160, 40, seed=1) == (train, test)
    assert data.split(160, 40, seed=2) != (train, test)
    assert common_sizes([data], 4000, 20) == (160, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: [row | {"label": "a"} for row in rows],
            r"^column 'label' of probing data set 'mine' has only one class, 'a'; use two or more\.$",
        ),
        (
            lambda rows: rows[:60],
            r"^probing data set 'mine' has only 30 rows of class 'a'; at least 96 per class are needed without a test "
            r"split, for which a fifth is used\. Add rows, or leave the class out\.$",
        ),
        (
            lambda rows: [{"words": row["text"]} for row in rows],
            r"^the training split of probing data set 'mine' has no column 'text', only \['words'\]; rename one",
        ),
    ],
)
def test_data_that_cannot_be_probed_is_reported(change, message, rows):
    with pytest.raises(ValueError, match=message):
        load_probing_dataset(datasets.Dataset.from_list(change(rows)), "mine")


def test_splits_that_do_not_fit_are_reported(rows):
    def load(**splits):
        return load_probing_dataset(
            datasets.DatasetDict({name: datasets.Dataset.from_list(part) for name, part in splits.items()}), "mine"
        )

    with pytest.raises(ValueError, match=r"different classes: \['b'\] are only in the training split, \[\] only"):
        load(train=rows[:100], test=[row for row in rows[100:] if row["label"] == "a"])
    with pytest.raises(ValueError, match=r"has no split 'train', only \['test'\]; rename a split\.$"):
        load(test=rows)
    with pytest.raises(
        ValueError,
        match=r"^row 1 of the training split of probing data set 'mine' must have a string .* None and 'a'; ",
    ):
        load(train=[{"text": None, "label": "a"}, *rows])
    with pytest.raises(ValueError, match=r"has only 19 rows of class 'a' in the test split; at least 20 per class are"):
        load(train=rows[:100], test=rows[101:140])
    with pytest.raises(ValueError, match=r"has only 19 rows of class 'b' in the training split; at least 20 per class"):
        load(train=rows[:39], test=rows[100:])
    with pytest.raises(ValueError, match=r"^row 2 of the test split of probing data set 'mine' must have a string as"):
        load(train=rows[:100], test=[rows[0], {"text": "words", "label": None}])
    assert len(load(train=rows[:40], test=rows[100:140]).test["a"]) == 20
    both = load(train=rows[:100], test=rows[100:], unsupervised=rows)
    test = both.split(100, 60, seed=3)[1]
    assert set(test["a"]) < {row["text"] for row in rows[100:] if row["label"] == "a"}
    assert test["a"] != [row["text"] for row in rows[100:] if row["label"] == "a"][:30]
    with pytest.raises(ValueError, match=r"has 50 test rows of class 'a', but 60 are needed"):
        both.split(100, 120, seed=3)


def test_sizes_that_a_class_cannot_fill_are_reported_with_what_is_needed(rows):
    data = load_probing_dataset(datasets.Dataset.from_list(rows), "mine")
    with pytest.raises(
        ValueError, match=r"'mine' has 100 rows of class 'a', but 140 are needed; lower probe_train_set_size"
    ):
        data.split(200, 80, seed=0)


def test_invalid_data_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"is neither a parquet, csv, jsonl or json file nor a folder with one"):
        load_probing_dataset(tmp_path / "none.jsonl")
