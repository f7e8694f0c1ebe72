"""Readers' answers on the page, and what they say about each SAE."""

import csv
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sklearn.metrics import cohen_kappa_score

from sae_lens_sampled.confidence import Interval, mean_interval

SCALE = {
    1: "no pattern",
    2: "a pattern in some places",
    3: "a pattern in most places",
    4: "one clear thing, in every place",
}
"""How a reader rates a latent."""


class Answer(NamedTuple):
    """A reader's answer on one latent."""

    rating: int | None
    """On `SCALE`; None if not rated."""
    fires: frozenset[int] | None
    """Numbers of the passages that the reader says the latent fires on; None if the passages were left out."""


class Agreement(NamedTuple):
    """How far two readers' ratings agree."""

    n: int
    """Latents that both rated."""
    exact: float
    """Share of them with the same rating."""
    kappa: float
    """Cohen's kappa with quadratic weights: 1 for equal ratings (NaN if all are one number), 0 for chance agreement."""


def read_answers(file: Path) -> dict[str, Answer]:
    """Answers by id, from a CSV with the columns `id`, `rating` and, if passages were asked about, `fires`: "2 5 7".

    Raises:
        ValueError: if a column or every row is missing, a latent appears twice, or an answer is invalid.
    """
    with file.open(newline="", encoding="utf-8-sig") as stream:
        lines = list(csv.DictReader(stream))
    if not lines or not {"id", "rating"} <= lines[0].keys():
        raise ValueError(f"{file} must have the columns id and rating, and at least one row.")
    answers = {}
    for line in lines:
        if line["id"] in answers:
            raise ValueError(f"{file} has two rows for latent {line['id']}; keep one.")
        try:
            answers[line["id"]] = Answer(rating_of(line["rating"]), passages_of(line.get("fires")))
        except ValueError as error:
            raise ValueError(f"{file}, latent {line['id']}: {error}") from error
    return answers


def rating_of(text: str | None) -> int | None:
    """The rating in a text; None if there is no text.

    Raises:
        ValueError: if the text is not on the scale.
    """
    if text and text.strip() not in map(str, SCALE):
        raise ValueError(f"rating {text!r} is not one of {', '.join(map(str, SCALE))}.")
    return int(text) if text else None


def passages_of(text: str | None) -> frozenset[int] | None:
    """The passage numbers in a text, where spaces separate them; None if there are none.

    Raises:
        ValueError: if the text has anything else, or a number appears twice.
    """
    numbers = (text or "").split()
    if not all(number.isdecimal() for number in numbers) or len(set(numbers)) < len(numbers):
        raise ValueError(f'fires {text!r} must be distinct passage numbers separated by spaces, such as "2 5 7".')
    return frozenset(map(int, numbers)) or None


def score(rows: Sequence[Mapping[str, Any]], readers: Mapping[str, Mapping[str, Answer]]) -> list[dict[str, Any]]:
    """Mean rating, share at the top of the scale, and accuracy on the passages, for each SAE and reader.

    Accuracy is balanced accuracy. Its excess over a predictor that sees only the token is 0 for a reader who judges as
    this predictor does.

    Args:
        rows: the page's latents, with the SAEs and answers that the page hides.
        readers: answers by reader and id.

    Raises:
        ValueError: if an answer is about a latent or a passage that is not on the page.
    """
    for reader, answers in readers.items():
        check_answers(rows, reader, answers)
    results = []
    for name in sorted({row["sae"] for row in rows}):
        for reader, answers in readers.items():
            answered = [(row, answers[row["id"]]) for row in rows if row["sae"] == name and row["id"] in answers]
            ratings = [answer.rating for _, answer in answered if answer.rating is not None]
            told = [
                (told_share(row, answer.fires), told_share(row, row["token_fires"]))
                for row, answer in answered
                if answer.fires is not None
            ]
            results.append(
                {
                    "sae": name,
                    "reader": reader,
                    "rated": len(ratings),
                    "rating": interval_of(ratings),
                    "clear": sum(rating == max(SCALE) for rating in ratings) / len(ratings) if ratings else None,
                    "told": len(told),
                    "accuracy": interval_of([by_reader for by_reader, _ in told]),
                    "over_token": interval_of([by_reader - by_token for by_reader, by_token in told]),
                }
            )
    return results


def check_answers(rows: Iterable[Mapping[str, Any]], reader: str, answers: Mapping[str, Answer]) -> None:
    """Raise a ValueError if an answer is about a latent or a passage that is not on the page."""
    n_passages = {row["id"]: len(row.get("passages", [])) for row in rows}
    if unknown := answers.keys() - n_passages.keys():
        raise ValueError(
            f"{reader} has answers for latents that are not on this page: {', '.join(sorted(unknown))}. Use the folder "
            "of the page that was rated."
        )
    for latent, answer in answers.items():
        wrong = [number for number in answer.fires or () if not 1 <= number <= n_passages[latent]]
        if wrong:
            raise ValueError(
                f"{reader}: latent {latent} has {n_passages[latent]} passages; there is no number {min(wrong)}."
            )


def told_share(row: Mapping[str, Any], said: Iterable[int]) -> float:
    """Balanced accuracy of an answer: mean of the shares judged right where the latent fires and where it does not."""
    numbers, fires, said = set(range(1, len(row["passages"]) + 1)), set(row["fires"]), set(said)
    silent = numbers - fires
    return (len(fires & said) / len(fires) + len(silent - said) / len(silent)) / 2


def agreements(readers: Mapping[str, Mapping[str, Answer]]) -> dict[tuple[str, str], Agreement]:
    """Agreement of each pair of readers who both rated some of the same latents."""
    found = {}
    for (one, of_one), (other, of_other) in itertools.combinations(readers.items(), 2):
        pairs = [(of_one[key].rating, of_other[key].rating) for key in of_one if key in of_other]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        if pairs:
            kappa = float(cohen_kappa_score(*zip(*pairs, strict=True), labels=list(SCALE), weights="quadratic"))
            found[one, other] = Agreement(len(pairs), sum(a == b for a, b in pairs) / len(pairs), kappa)
    return found


def interval_of(values: Sequence[float]) -> Interval | None:
    """Mean with its 95 % interval; None without values."""
    return mean_interval(values) if values else None
