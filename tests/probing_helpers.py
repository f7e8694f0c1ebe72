"""Checks of labelled text data sets: duplicates, and the accuracy of a simple classifier."""

import math
import re
from collections import Counter


def bare(text: str) -> str:
    """Lower-cased letters and digits only: equal for texts that differ only in case, spacing or punctuation."""
    return "".join(letter for letter in text.lower() if letter.isalnum())


def naive_bayes_accuracy(train: list[dict], test: list[dict]) -> float:
    """Accuracy of multinomial naive Bayes over lower-cased words, with add-one smoothing and balanced classes."""
    counts = {row["label"]: Counter() for row in train}
    for row in train:
        counts[row["label"]].update(re.findall(r"[a-z]+", row["text"].lower()))
    vocabulary = set().union(*counts.values())

    def log_likelihood(words: list[str], label: str) -> float:
        total = counts[label].total() + len(vocabulary)
        return sum(math.log((counts[label][word] + 1) / total) for word in words if word in vocabulary)

    def guess(text: str) -> str:
        words = re.findall(r"[a-z]+", text.lower())
        return max(sorted(counts), key=lambda label: log_likelihood(words, label))

    return sum(guess(row["text"]) == row["label"] for row in test) / len(test)
