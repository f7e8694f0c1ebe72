"""The page of latents and its readers: what is drawn, that nothing reveals the answers, how answers are scored."""

import json
import random
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from scipy import stats

from latents.page import blind, write_page
from latents.places import Passage, Place, asked_passages, bands_of, shown_places, windows
from latents.rating import Answer, agreements, read_answers, score, told_share
from latents.tables import agreement_texts, means_text, rating_table, table, token_table

RESULTS = Path(__file__).parents[2] / "eval" / "results" / "latents_smollm2_easy"


def some_bands() -> torch.Tensor:
    acts = torch.rand(40, 81) * (torch.rand(40, 81) < 0.06)
    acts[:, 0] = 0
    return bands_of(acts)


def places_of(bands: torch.Tensor, seed: int, context=lambda prompt, at: f"{prompt}, {at}") -> list[Place]:
    return shown_places(bands, context, random.Random(seed)) or []


def passages_of(bands: torch.Tensor, tokens: torch.Tensor, seed: int) -> list[Passage]:
    return asked_passages(bands, tokens, random.Random(seed)) or []


def test_bands_are_fifths_of_the_active_places_by_rank():
    acts = torch.rand(7, 9) * (torch.rand(7, 9) < 0.7)
    acts[2:4, 5] = 0.5  # a tie
    bands = bands_of(acts)
    active = sorted((acts[p, a].item(), p, a) for p in range(7) for a in range(9) if acts[p, a] > 0)
    want = torch.zeros(7, 9, dtype=torch.int64)
    for rank, (_, prompt, at) in enumerate(active):
        want[prompt, at] = int(5 * rank / len(active)) + 1
    assert bands.tolist() == want.tolist()
    assert bands_of(torch.zeros(3, 4)).sum() == 0


def test_passages_have_sixteen_tokens_and_sixteen_before_them():
    values = torch.arange(3 * 54).reshape(3, 54)
    want = [[values[prompt, start : start + 16].tolist() for start in (17, 33)] for prompt in range(3)]
    assert windows(values).tolist() == want


def test_eight_places_of_five_bands_in_different_prompts():
    bands, drawn = some_bands(), set()
    for seed in range(20):
        places = places_of(bands, seed)
        assert [place.band for place in places] == [5, 4, 3, 2, 1, 5, 4, 3]
        assert all(bands[place.prompt, place.at] == place.band for place in places)
        assert len({place.prompt for place in places}) == 8
        drawn |= set(places)
    assert len(drawn) > 80  # not the same places for every seed
    assert not places_of(bands[:7], 0)


def test_no_context_is_shown_twice():
    bands = some_bands()
    for seed in range(20):
        places = places_of(bands, seed, lambda prompt, at: f"text {at % 20}")
        assert len({at % 20 for _, at, _ in places}) == 8
    assert not places_of(bands, 0, lambda prompt, at: f"text {at % 7}")


def test_passages_are_what_they_are_said_to_be():
    bands, tokens = some_bands(), torch.arange(40 * 81).reshape(40, 81)
    n_positive, where, of_bands = Counter(), Counter(), Counter()
    for seed in range(300):
        passages = passages_of(bands, tokens, seed)
        for prompt, window, band in passages:
            start = 1 + 16 * (window + 1)
            assert band == max(bands[prompt, at].item() for at in range(start, start + 16))
        assert [passage.start for passage in passages] == [17 + 16 * passage.window for passage in passages]
        assert len({passage.prompt for passage in passages}) == 10
        positive = [passage.band for passage in passages if passage.band]
        assert max(Counter(positive).values()) <= -(-len(positive) // 5)  # from all bands
        n_positive[len(positive)] += 1
        of_bands.update(positive)
        where.update(number for number, passage in enumerate(passages) if passage.band)
    assert sorted(n_positive) == [3, 4, 5, 6, 7]
    assert min(n_positive.values()) > 30
    assert len(where) == 10
    assert min(where.values()) > 100  # of 300: their order reveals nothing
    assert min(of_bands.values()) > 200


def test_no_passage_is_shown_twice_and_too_few_are_none():
    bands = some_bands()
    assert not passages_of(bands, torch.zeros(40, 81, dtype=torch.int64), 0)
    assert not passages_of(bands[:9], torch.arange(9 * 81).reshape(9, 81), 0)
    assert not passages_of(bands.clamp(min=1), torch.arange(40 * 81).reshape(40, 81), 0)
    tokens = torch.arange(40 * 81).reshape(40, 81)
    tokens[1::2] = tokens[::2]  # every prompt occurs twice
    for seed in range(20):
        passages = passages_of(bands, tokens, seed)
        assert len({(prompt // 2, window) for prompt, window, _ in passages}) == 10


def a_row(name: str, latent: int, rng: random.Random) -> dict:
    bands = [rng.choice([0, 3, 5]) for _ in range(10)]
    bands[latent % 10], bands[(latent + 1) % 10] = 0, 5
    context = {"before": "a <b>\n", "token": f"t{latent}", "after": "c", "band": 4, "activation": 2.25}
    return {
        "sae": name,
        "latent": latent,
        "density": 0.5,
        "commonest_share": 0.25,
        "token_precision": 0.75,
        "token_accuracy": 0.5,
        "n_same_token": 8,
        "contexts": [context] * 8,
        "passages": [{"before": "x\ny", "text": f"text {n} of {latent}", "band": band} for n, band in enumerate(bands)],
        "fires": [n for n, band in enumerate(bands, start=1) if band],
        "token_fires": [n for n in range(1, 11) if rng.random() < 0.5],
    }


ROWS = [a_row(name, latent, random.Random(latent)) for name in ("secret_one", "secret_two") for latent in range(10)]


def page_of(rows, folder) -> str:
    write_page(rows, folder / "page.html")
    return (folder / "page.html").read_text()


def test_the_page_does_not_tell_whose_latents_it_shows(tmp_path):
    rows = blind(ROWS, seed=0)
    assert [row["id"] for row in rows] == [f"{number:03}" for number in range(1, 21)]
    assert {row["sae"] for row in rows[:6]} == {"secret_one", "secret_two"}
    assert blind(ROWS, seed=1) != rows
    page = page_of(rows, tmp_path)
    assert "secret" not in page
    assert re.findall(r"<h2>(\d+)</h2>", page) == [row["id"] for row in rows]
    assert len(re.findall(r'<input type="radio"', page)) == 20 * 4
    assert len(re.findall(r'<input type="checkbox"', page)) == 20 * 10


def test_every_place_is_shown_with_its_token_marked_and_line_breaks_visible(tmp_path):
    page = page_of(blind(ROWS[:3], seed=0), tmp_path)
    assert len(re.findall(r'a &lt;b&gt;↵\n<mark>t\d</mark><span class="after">c</span>', page)) == 3 * 8
    read, more = page.split("<article")[1].split("<fieldset>")
    assert (read.count("<mark>"), more.count("<mark>")) == (5, 3)
    broken = [{**ROWS[0], "contexts": [{"before": "a", "token": "\n", "after": "b"}] * 8}]
    assert "a<mark>↵\n</mark>" in page_of(blind(broken, seed=0), tmp_path)


def test_nothing_on_the_page_tells_the_answers(tmp_path):
    rows = blind(ROWS, seed=0)
    rng = random.Random(1)
    told = ("sae", "latent", "density", "commonest_share", "token_precision", "token_accuracy", "n_same_token")
    others = [
        {
            **row,
            **{key: row[key] * 2 for key in told},
            "contexts": [{**context, "band": 1, "activation": 7.5} for context in row["contexts"]],
            "passages": [{**passage, "band": rng.randint(0, 5)} for passage in row["passages"]],
            "fires": rng.sample(range(1, 11), 5),
            "token_fires": [],
        }
        for row in rows
    ]
    page = page_of(rows, tmp_path)
    assert page == page_of(others, tmp_path)
    passages = re.findall(r"<label class=\"passage\">.*?</label>", page, flags=re.DOTALL)
    numbers = [(latent["id"], n) for latent in rows for n in range(10)]
    without_text = {
        re.sub(rf"\b{n + 1}\b", "N", passage.replace(f"text {n} of {row['latent']}", ""))
        for passage, (row, n) in zip(passages, [(row, n) for row in rows for n in range(10)], strict=True)
    }
    assert len(numbers) == len(passages) == 200
    assert len(without_text) == 1  # and passages are in the given order, or a text would remain


def csv_of(folder: Path, text: str) -> Path:
    file = folder / "ratings.csv"
    file.write_text(text)
    return file


def test_answers_are_read_with_what_was_left_out(tmp_path):
    file = csv_of(tmp_path, '\ufeffid,rating,fires,label\n001,3,2 5 7,"a, b"\n002,,4,\n003,1,,\n004,4\n')
    assert read_answers(file) == {
        "001": Answer(3, frozenset({2, 5, 7})),
        "002": Answer(None, frozenset({4})),
        "003": Answer(1, None),
        "004": Answer(4, None),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,rating\n001,5\n", r"ratings.csv, latent 001: rating '5' is not one of 1, 2, 3, 4"),
        ("id,rating\n001,3.0\n", r"latent 001: rating '3.0' is not one of"),
        ("id,mark\n001,4\n", "must have the columns id and rating"),
        ("", "must have the columns id and rating"),
        ("id,rating\n001,4\n001,3\n", "has two rows for latent 001; keep one"),
        ("id,rating,fires\n001,4,2;5\n", "latent 001: fires '2;5' must be distinct passage numbers separated by"),
        ("id,rating,fires\n001,4,2 2\n", "latent 001: fires '2 2' must be distinct passage numbers"),
        ("id,rating,fires\n001,4,-2\n", "latent 001: fires '-2' must be distinct passage numbers"),
        ("id,rating\n999,4\n", "a has answers for latents that are not on this page: 999"),
        ("id,rating,fires\n002,4,2 11 12\n", "a: latent 002 has 10 passages; there is no number 11"),
        ("id,rating,fires\n002,4,0\n", "a: latent 002 has 10 passages; there is no number 0"),
    ],
)
def test_other_answers_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        score(blind(ROWS, seed=0), {"a": read_answers(csv_of(tmp_path, text))})


def test_answers_on_passages_of_a_page_without_any_are_refused():
    rows = json.loads((RESULTS / "latents.json").read_text())
    with pytest.raises(ValueError, match="latent 001 has 0 passages; there is no number 2"):
        score(rows, {"a": {"001": Answer(4, frozenset({2}))}})


def test_told_share_is_the_balanced_accuracy_of_ten_passages():
    row = {"passages": [None] * 10, "fires": [1, 2, 7]}
    assert told_share(row, [1, 2, 7]) == 1
    assert told_share(row, []) == 0.5
    assert told_share(row, range(1, 11)) == 0.5
    assert told_share(row, [1, 2, 3]) == pytest.approx((2 / 3 + 6 / 7) / 2)


def test_answers_are_given_back_to_their_saes():
    rows = blind(ROWS, seed=0)
    one = [row for row in rows if row["sae"] == "secret_one"]
    two = [row for row in rows if row["sae"] == "secret_two"]
    wrong = frozenset(range(1, 11)) - set(one[1]["fires"])
    answers = {
        one[0]["id"]: Answer(4, frozenset(one[0]["fires"])),
        one[1]["id"]: Answer(2, wrong),
        one[2]["id"]: Answer(None, frozenset(one[2]["token_fires"])),
        two[0]["id"]: Answer(1, None),
    }
    of_one, of_two = score(rows, {"a": answers})
    assert (of_one["sae"], of_one["reader"], of_one["rated"], of_one["clear"], of_one["told"]) == (
        "secret_one",
        "a",
        2,
        0.5,
        3,
    )
    assert (of_one["rating"].mean, of_one["rating"].error) == (3, 1)
    by_token = [told_share(row, row["token_fires"]) for row in one[:3]]
    assert of_one["accuracy"].mean == pytest.approx((1 + 0 + by_token[2]) / 3)
    over = [1 - by_token[0], 0 - by_token[1], 0]
    interval = stats.ttest_1samp(over, 0).confidence_interval()
    assert of_one["over_token"].mean == pytest.approx(statistics.mean(over))
    assert (of_one["over_token"].low, of_one["over_token"].high) == pytest.approx((interval.low, interval.high))
    assert (of_two["rated"], of_two["rating"].mean, of_two["rating"].low, of_two["clear"]) == (1, 1, None, 0)
    assert (of_two["told"], of_two["accuracy"], of_two["over_token"]) == (0, None, None)


def test_agreement_is_that_of_a_table_of_counts():
    rng = random.Random(0)
    one = {str(n): rng.randint(1, 4) for n in range(40)}
    other = {key: min(4, max(1, rating + rng.choice([-2, 0, 0, 1]))) for key, rating in one.items()}
    both = list(zip(one.values(), other.values(), strict=True))
    seen = sum((a - b) ** 2 for a, b in both) / 40
    by_chance = sum((a - b) ** 2 for a in one.values() for b in other.values()) / 40**2
    readers = {
        "one": {key: Answer(rating, None) for key, rating in one.items()} | {"50": Answer(3, None)},
        "other": {key: Answer(rating, None) for key, rating in other.items()} | {"51": Answer(3, None)},
        "none": {"0": Answer(None, None), "60": Answer(1, None)},
    }
    [(pair, found)] = agreements(readers).items()
    assert (pair, found.n) == (("one", "other"), 40)
    assert found.exact == sum(a == b for a, b in both) / 40
    assert found.kappa == pytest.approx(1 - seen / by_chance)


def test_equal_ratings_have_no_kappa_and_one_latent_no_interval():
    answers = {"1": Answer(3, None), "2": Answer(3, None)}
    assert agreement_texts({"a": answers, "b": answers})[0].endswith("; quadratic kappa: not defined.")
    rows = [row for row in json.loads((RESULTS / "latents.json").read_text()) if row["sae"] == "batchtopk"]
    assert re.search(r"\| BatchTopK \| 1 \| 0\.\d{3} \|", table(rows[:1], {"batchtopk": "BatchTopK"}))


def test_the_committed_ratings_are_of_the_page_that_was_rated():
    rows = json.loads((RESULTS / "latents.json").read_text())
    readers = {name: read_answers(RESULTS / f"{name}.csv") for name in ("ratings_1", "ratings_2")}
    assert all(answers.keys() == {row["id"] for row in rows} for answers in readers.values())
    [agreement] = agreements(readers).values()
    assert (agreement.n, round(agreement.exact, 3), round(agreement.kappa, 2)) == (123, 0.894, 0.56)
    means = [round(result["rating"].mean, 2) for result in score(rows, readers)]
    assert means == [3.74, 3.62, 3.84, 3.78, 3.96, 3.78]
    names = {"groups_16_factor_10": "groups", "batchtopk": "BatchTopK", "one_pool_5": "one pool"}
    text = rating_table(rows, readers, names)
    assert re.findall(r"\| (\w[\w ]*) \| ratings_1 \|", text) == ["groups", "BatchTopK", "one pool"]
    assert "| BatchTopK | ratings_2 | 50 | 3.62 [3.42, 3.82] | 72% |\n" in text
    assert (
        means_text(rows, readers, names) == "groups: 3.84 and 3.78; BatchTopK: 3.74 and 3.62; one pool: 3.96 and 3.78"
    )
    [text] = agreement_texts(readers)
    assert text.endswith("both ratings_1 and ratings_2: 123; the same rating: 89.4%; quadratic kappa: 0.56.")


def test_both_readers_answered_everything_on_the_harder_page():
    folder = RESULTS.with_name("latents_smollm2")
    rows = json.loads((folder / "latents.json").read_text())
    readers = [read_answers(folder / f"ratings_{n}.csv") for n in (1, 2)]
    for answers in readers:
        assert answers.keys() == {row["id"] for row in rows}
        assert all(answer.rating and 3 <= len(answer.fires) <= 7 for answer in answers.values())


def test_older_rows_have_their_table_and_none_of_tokens():
    rows = json.loads((RESULTS / "latents.json").read_text())
    names = {"batchtopk": "BatchTopK"}
    line = "| BatchTopK | 50 | 0.447 ± 0.032 | 9.579 ± 1.014 | 0.657 ± 0.070 | 0.003 ± 0.023 | 0.05 (largest 0.3) |"
    assert line in table(rows, names)
    assert token_table(rows, names) == ""


def test_tables_of_new_rows():
    rows = blind(ROWS, seed=0)
    names = {"secret_one": "One", "secret_two": "Two"}
    in_passages = statistics.mean(told_share(row, row["token_fires"]) for row in ROWS[:10])
    cells = "| One | 10 | 0.500 [0.500, 0.500] | 0.250 [0.250, 0.250] | 0.750 [0.750, 0.750] | 0.500 [0.500, 0.500] |"
    assert f"{cells} {in_passages:.3f} [" in token_table(rows, names)
    found = rating_table(rows, {"a": {row["id"]: Answer(4, frozenset(row["fires"])) for row in rows}}, names)
    assert "above the token alone" in found
    assert "| One | a | 10 | 4.00 [4.00, 4.00] | 100% | 10 | 1.00 [1.00, 1.00] | +" in found
