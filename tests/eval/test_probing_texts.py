"""Which passages of a novel a probing task uses, and which label their words determine."""

import pytest

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from study.probing_texts import dialogue, gender, is_clean, narration, paragraphs, person, spoken, tense

TEN = "so many words are in here to make up ten"


def test_narration_is_of_paragraphs_without_speech():
    quiet = f"The one {TEN}. The two {TEN}."
    talk = f'"The three {TEN}. The four {TEN}. The five {TEN}. The six {TEN}." So it was.'
    single = talk.replace('"', "'")
    assert list(narration("\n\n".join([quiet, talk, single, quiet.replace("one", "seven")]))) == [
        quiet,
        quiet.replace("one", "seven"),
    ]


def test_dialogue_joins_paragraphs_with_speech_and_drops_the_marks():
    novel = f'"Is it {TEN}?" said he.\n\n"No, not {TEN}." And so on.\n\nThe one {TEN}. The two {TEN}.'
    assert list(dialogue(novel)) == [f"Is it {TEN}? said he. No, not {TEN}. And so on."]
    # A paragraph without speech, or with an odd number of quotation marks, separates those before and after it.
    for between in (f"The one {TEN}.", f'"No end, {TEN}.'):
        assert list(dialogue(f'"Is it {TEN}?" said he.\n\n{between}\n\n"No, not {TEN}." And so on.')) == []


def test_speech_is_what_stands_between_marks():
    novel = f'He said, "Yes, {TEN}. Yes, {TEN}." Then she {TEN}, "No, {TEN}; no, {TEN}!"\n\n"No end, {TEN} and {TEN}.'
    assert list(spoken(novel)) == [f"Yes, {TEN}. Yes, {TEN}.", f"No, {TEN}; no, {TEN}!"]


@pytest.mark.parametrize("find", [narration, spoken, dialogue])
@pytest.mark.parametrize(("n_words", "is_taken"), [(19, False), (20, True), (45, True), (46, False)])
def test_texts_have_20_to_45_words(find, n_words, is_taken):
    text = f"So{' word' * (n_words - 1)}."
    assert list(find(text if find is narration else f'"{text}"')) == [text] * is_taken


def test_paragraphs_are_lines_where_lines_are_not_wrapped():
    assert list(paragraphs("One\ntwo.\n\nThree\n  four.\n")) == ["One two.", "Three four."]
    long = "word " * 50
    assert list(paragraphs(f"One.\n{long}\nTwo  three.")) == ["One.", long.strip(), "Two three."]
    assert list(paragraphs("")) == [""]


@pytest.mark.parametrize(
    "text",
    [
        "He went--and came.", "He went - and came.", "He _went_ and came.", "In 1850 he came.", "he went.", "He went",
        "He GO came.", "He went... and came.", "He went .", "Sir Daniel s own.", "I ll come.", "He came (so it was).",
        'He said "No."',
    ],
)  # fmt: skip
def test_texts_with_marks_of_their_file_are_left_out(text):
    assert not is_clean(text)


def test_clean_texts_have_words_and_plain_punctuation():
    assert is_clean("I can't; is Mr. Smith's well-known house there? No, it isn't!")


@pytest.mark.parametrize(
    ("decide", "text", "kind"),
    [
        (person, "Then I went to my house.", ("first", "train")),
        (person, "Then We went to the house.", ("first", "test")),
        (person, "Then he went to her house.", ("third", "train")),
        (person, "Then they went home.", ("third", "test")),
        (person, "Then I went to his house.", None),
        (person, "Then I went to our house.", None),
        (person, "Then the house fell.", None),
        (gender, "Mr. Smith, the father.", ("man", "train")),
        (gender, "So he himself went.", ("man", "test")),
        (gender, "Two women went.", ("woman", "train")),
        (gender, "So it was hers.", ("woman", "test")),
        (gender, "So the women met him.", None),
        (gender, "So he met Mr. Smith.", None),
        (tense, "It is late.", ("present", "train")),
        (tense, "Are they here?", ("present", "test")),
        (tense, "It was late.", ("past", "train")),
        (tense, "Had it begun?", ("past", "test")),
        (tense, "It is late; they were here.", None),
        (tense, "It is late; they are here.", None),  # words of both parts, so usable in neither
        (tense, "It is so, he said.", None),
        (tense, "It was so, I think.", None),
        (tense, "It was so, he says.", None),
        (tense, "It was so, and I have it.", None),
        (tense, "It is so, and it's late.", None),
        (tense, "It is so, and they're late.", None),
        (tense, "It was so, and he would not.", None),
        (tense, "The man's house is here.", ("present", "train")),
    ],
)
def test_words_decide_on_label_and_part(decide, text, kind):
    assert decide(text) == kind
