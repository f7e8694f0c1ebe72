"""The user's own labelled texts for sparse probing."""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError

MIN_ROWS = 20
"""Fewest rows per class and split; with fewer, a probe's accuracy says nothing."""

Texts = dict[str, list[str]]


@dataclass(frozen=True)
class ProbingDataset:
    """A text classification data set: texts by class, to train and test a probe."""

    name: str
    train: Texts
    test: Texts | None
    """Texts for testing; None if the data has a single split, from which `split` draws both without overlap."""

    @property
    def classes(self) -> list[str]:
        """The labels, sorted."""
        return sorted(self.train)

    def largest_sizes(self) -> tuple[int, int]:
        """Largest train and test sizes that every class has texts for; as in SAEBench, each class fills half of a set.

        Without texts for testing, a fifth of `train` is left for them.
        """
        smallest = min(map(len, self.train.values()))
        if self.test is None:
            return 2 * (smallest * 4 // 5), 2 * (smallest - smallest * 4 // 5)
        return 2 * smallest, 2 * min(map(len, self.test.values()))

    def split(self, train_size: int, test_size: int, seed: int) -> tuple[Texts, Texts]:
        """Draw `train_size // 2` and `test_size // 2` texts of every class; return both sets, in SAEBench's form.

        Raises:
            ValueError: if a class has too few texts.
        """
        n_train, n_test = train_size // 2, test_size // 2
        train, test = {}, {}
        for label in self.classes:
            order = np.random.default_rng(seed)
            texts = [self.train[label][i] for i in order.permutation(len(self.train[label]))]
            if self.test is None:
                self._check(label, "", len(texts), n_train + n_test)
                train[label], test[label] = texts[:n_train], texts[n_train : n_train + n_test]
            else:
                self._check(label, "train ", len(texts), n_train)
                self._check(label, "test ", len(self.test[label]), n_test)
                held_out = [self.test[label][i] for i in order.permutation(len(self.test[label]))]
                train[label], test[label] = texts[:n_train], held_out[:n_test]
        return train, test

    def _check(self, label: str, split: str, n_rows: int, needed: int) -> None:
        if n_rows < needed:
            raise ValueError(
                f"probing data set {self.name!r} has {n_rows} {split}rows of class {label!r}, but {needed} are needed; "
                "lower probe_train_set_size and probe_test_set_size (half of each is taken per class)."
            )


def load_probing_dataset(
    source: "str | Path | datasets.Dataset | datasets.DatasetDict",
    name: str | None = None,
    text_column: str = "text",
    label_column: str = "label",
) -> ProbingDataset:
    """Load labelled texts from a parquet, csv, jsonl or json file, a folder of such files, or a `Dataset`.

    A folder holds a file `train` and, if it has a test split, a file `test`. A `DatasetDict` without `test` is tested
    on `validation`. The name is that of the file or folder, without its ending, or "dataset", unless `name` is given.

    Raises:
        ValueError: if there is no such file, or it is incomplete, the split `train` or a column is missing, a split has
            no rows, a row has no text or label, there is only one class, the test split has other classes, or a class
            has too few rows.
    """
    if isinstance(source, (str, Path)):
        splits = _read(Path(source))
        name = name or Path(source).resolve().stem
    else:
        splits = dict(source) if isinstance(source, datasets.DatasetDict) else {"train": source}
        name = name or "dataset"
    if "train" not in splits:
        raise ValueError(f"probing data set {name!r} has no split 'train', only {sorted(splits)}; rename a split.")
    held_out = splits.get("test", splits.get("validation"))
    train = _by_class(name, "training", splits["train"], text_column, label_column)
    test = None if held_out is None else _by_class(name, "test", held_out, text_column, label_column)
    for split, by_class in {"train": train, "test": test}.items():
        if by_class is not None and not by_class:
            raise ValueError(f"probing data set {name!r} has no rows for {split!r}.")
    if len(train) < 2:
        raise ValueError(
            f"column {label_column!r} of probing data set {name!r} has only one class, {min(train)!r}; use two or more."
        )
    if test is not None and set(test) != set(train):
        only_train, only_test = sorted(set(train) - set(test)), sorted(set(test) - set(train))
        raise ValueError(
            f"the splits of probing data set {name!r} have different classes: {only_train} are only in the training "
            f"split, {only_test} only in the test split; add rows of these classes, or leave them out."
        )
    if test is None:
        enough = 5 * (MIN_ROWS - 1) + 1  # `largest_sizes` leaves a fifth for testing, rounded up
        _check_rows(name, "", train, enough, " without a test split, for which a fifth is used")
    else:
        _check_rows(name, " in the training split", train, MIN_ROWS)
        _check_rows(name, " in the test split", test, MIN_ROWS)
    return ProbingDataset(name, train, test)


def load_probing_datasets(sources: Sequence[ProbingDataset | str | Path]) -> list[ProbingDataset]:
    """Load the data sets of `sources` that are paths; return them and those already loaded, in order.

    Raises:
        ValueError: if two data sets have the same name, or for the same reasons as `load_probing_dataset`.
    """
    loaded = [source if isinstance(source, ProbingDataset) else load_probing_dataset(source) for source in sources]
    names = [dataset.name for dataset in loaded]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two of probing_datasets have the same name: {names}; rename a file, or load one with "
            "load_probing_dataset(path, name)."
        )
    return loaded


def common_sizes(probing_datasets: Sequence[ProbingDataset], train_size: int, test_size: int) -> tuple[int, int]:
    """The requested train and test sizes, limited to those that every data set can fill."""
    largest = [dataset.largest_sizes() for dataset in probing_datasets]
    return min(train_size, *(n for n, _ in largest)), min(test_size, *(n for _, n in largest))


def _read(path: Path) -> dict[str, datasets.Dataset]:
    files = {file.stem: file for file in sorted(path.iterdir())} if path.is_dir() else {"train": path}
    kinds = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json", ".json": "json"}
    chosen = {split: file for split, file in files.items() if file.suffix in kinds and split in ("train", "test")}
    if not path.exists() or "train" not in chosen:
        raise ValueError(
            f"probing data {str(path)!r} is neither a parquet, csv, jsonl or json file nor a folder with one named "
            "train (and, if there is a test split, one named test)."
        )
    return {split: _read_file(kinds[file.suffix], file) for split, file in chosen.items()}


def _read_file(kind: str, file: Path) -> datasets.Dataset:
    try:
        # Escaped, as brackets in a path would be a pattern.
        return datasets.load_dataset(kind, data_files=glob.escape(str(file)), split="train")  # type: ignore[return-value]
    except (DatasetGenerationError, StopIteration) as error:  # datasets 5 raises StopIteration for an empty jsonl file
        raise ValueError(f"probing data {str(file)!r} has no rows or is not a complete {kind} file.") from error


def _check_rows(name: str, where: str, texts: Texts, needed: int, condition: str = "") -> None:
    """Reject a split in which a class has too few rows for a probe."""
    rarest = min(texts, key=lambda label: len(texts[label]))
    if len(texts[rarest]) < needed:
        raise ValueError(
            f"probing data set {name!r} has only {len(texts[rarest])} rows of class {rarest!r}{where}; at least "
            f"{needed} per class are needed{condition}. Add rows, or leave the class out."
        )


def _by_class(name: str, split: str, rows: datasets.Dataset, text_column: str, label_column: str) -> Texts:
    for column in (text_column, label_column):
        if column not in rows.column_names:
            raise ValueError(
                f"the {split} split of probing data set {name!r} has no column {column!r}, only {rows.column_names}; "
                "rename one, or name the columns: load_probing_dataset(path, text_column=..., label_column=...)."
            )
    texts: Texts = {}
    for row, (text, label) in enumerate(zip(rows[text_column], rows[label_column], strict=True), start=1):
        if not isinstance(text, str) or label is None:
            raise ValueError(
                f"row {row} of the {split} split of probing data set {name!r} must have a string as text, "
                f"and a label, but has {text!r} and {label!r}; remove or complete it."
            )
        texts.setdefault(str(label), []).append(text)
    return texts
