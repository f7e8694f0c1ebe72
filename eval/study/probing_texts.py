"""Texts of the probing tasks: passages of novels, and the words that decide which label a passage gets."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tiny_probing.build import SPEECH, passages, sentences

N_WORDS = (20, 45)
"""Minimum and maximum number of words of a text; nearly all have at most 64 tokens."""
LONG_LINE = 200
"""Maximum length of a line in a file with wrapped lines."""

CLEAN = re.compile(r"[A-Z](?:[A-Za-z ,.;:!?']|(?<=[A-Za-z])-(?=[A-Za-z]))*[.!?]")
"""Whole sentences without dashes, numbers and marks for italics."""
ODD = re.compile(r"\b[A-Z]{2}|\.\.|[,.;:!?]{2}| (?:[,.;:!?]|(?:d|ll|m|re|s|t|ve)\b)")
"""Capitals for italics, rows of dots, double punctuation, spaces before punctuation, lost apostrophes."""


def is_clean(text: str) -> bool:
    """Whether a text shows no traces of its source file, which would give authors and periods away."""
    return CLEAN.fullmatch(text) is not None and not ODD.search(text)


def narration(novel: str) -> Iterator[str]:
    """Consecutive sentences of paragraphs without any quotation mark.

    Paragraphs with speech are skipped as a whole, because the middle sentences of a speech have no quotation marks.
    """
    for paragraph in paragraphs(novel):
        if not SPEECH.search(paragraph):
            yield from filter(is_clean, passages(paragraph, N_WORDS))


def dialogue(novel: str) -> Iterator[str]:
    """Consecutive paragraphs with speech, including their unspoken parts, without the quotation marks."""
    words: list[str] = []
    for paragraph in paragraphs(novel):
        has_speech = '"' in paragraph and paragraph.count('"') % 2 == 0  # otherwise it is unclear where speech ends
        words = [*words, *paragraph.replace('"', " ").split()] if has_speech else []
        if len(words) >= N_WORDS[0]:
            yield from _usable(words)
            words = []


def spoken(novel: str) -> Iterator[str]:
    """Consecutive sentences of one speech, without the quotation marks."""
    for paragraph in paragraphs(novel):
        for speech in paragraph.split('"')[1::2] if paragraph.count('"') % 2 == 0 else ():
            words: list[str] = []
            for sentence in sentences(speech.strip()):
                words = [*words, *sentence.split()]
                if len(words) >= N_WORDS[0]:
                    yield from _usable(words)
                    words = []


def paragraphs(novel: str) -> Iterator[str]:
    """Paragraphs, on one line each: the lines of a file without wrapping, the blocks between blank lines of others."""
    is_wrapped = max(map(len, novel.splitlines()), default=0) <= LONG_LINE
    parts = re.split(r"\n\s*\n", novel) if is_wrapped else novel.splitlines()
    return (" ".join(part.split()) for part in parts)


def _usable(words: list[str]) -> list[str]:
    """The words as one text, in a list; empty if the text is not usable."""
    text = " ".join(words)
    return [text] if len(words) <= N_WORDS[1] and is_clean(text) and not SPEECH.search(text) else []


@dataclass(frozen=True)
class DecidingWords:
    """Deciding words of a label: its texts have some of them, and none of the other label's.

    No training text has deciding words of test texts, so a probe on a latent for a single word is no better than
    chance.
    """

    train: frozenset[str]
    test: frozenset[str]


def _words(train: str, test: str) -> DecidingWords:
    return DecidingWords(frozenset(train.split()), frozenset(test.split()))


PERSON = {
    "first": _words("i me my mine myself", "we us our ours ourselves"),
    "third": _words("he him his himself she her hers herself", "they them their theirs themselves"),
}
"""Trained on the singular, tested on the plural."""
GENDER = {
    "man": _words(
        "boy boys brother brothers captain count duke earl father fellow gentleman gentlemen husband king lord man "
        "master men mr prince sir son uncle",
        "he him his himself",
    ),
    "woman": _words(
        "aunt countess daughter duchess girl girls ladies lady madam maid miss mistress mother mrs princess queen "
        "sister sisters widow wife woman women",
        "she her hers herself",
    ),
}
"""Trained on nouns, tested on pronouns."""
TENSE = {
    "present": _words("is", "am are has do does"),
    "past": _words("was", "were had did"),
}
"""Trained on one auxiliary, tested on the others."""

UNDECIDED = re.compile(
    r"\b(?:have|having|cannot|can|could|may|might|must|ought|shall|should|will|would)\b|\w'(?:d|ll|m|re|t|ve)\b"
    r"|\b(?:he|here|how|it|she|that|there|what|where|who)'s\b",
    re.IGNORECASE,
)
"""Words that occur in both tenses or hide an auxiliary."""
PRESENT_VERB = re.compile(
    r"\b(?:i|you|we|they|who|people)(?: \w+ly| never| always| often)? (?:ask|believe|care|come|doubt|fear|feel|find|get"
    r"|give|go|hate|hear|hope|keep|know|like|live|look|love|make|mean|need|remember|say|see|seem|stand|suppose|take|tell"
    r"|think|trust|understand|want|wish)\b|\b(?:appears|becomes|believes|comes|feels|finds|gets|gives|goes|hears|holds"
    r"|keeps|knows|makes|remains|says|seems|sees|takes|tells|thinks)\b",
    re.IGNORECASE,
)
PAST_VERB = re.compile(
    r"\b(?:answered|appeared|asked|became|began|believed|broke|brought|called|came|carried|chose|cried|died|drank|drew"
    r"|drove|fell|felt|flew|forgot|found|gave|got|grew|happened|hated|heard|held|hoped|kept|knew|laughed|left|liked|lived"
    r"|looked|loved|made|meant|met|paid|passed|ran|remained|rose|said|sang|sank|sat|saw|seemed|sent|spent|spoke|stood"
    r"|talked|thought|threw|told|took|tore|tried|turned|walked|wanted|went|wished|wore|wrote)\b",
    re.IGNORECASE,
)


def decided(text: str, words: Mapping[str, DecidingWords]) -> tuple[str, str] | None:
    """The label, and the part of the split ("train" or "test"), to which a text's deciding words belong.

    None without deciding words, or with words of more than one label or part.
    """
    present = set(re.findall("[a-z]+", text.lower()))
    kinds = [
        (label, part)
        for label, of_label in words.items()
        for part, deciding in (("train", of_label.train), ("test", of_label.test))
        if present & deciding
    ]
    return kinds[0] if len(kinds) == 1 else None


def person(text: str) -> tuple[str, str] | None:
    """Whether a text is about its narrator or about others, and in which part it may be."""
    return decided(text, PERSON)


def gender(text: str) -> tuple[str, str] | None:
    """Whether a text is about men or about women, and in which part it may be."""
    return decided(text, GENDER)


def tense(text: str) -> tuple[str, str] | None:
    """The tense of all verbs, as far as auxiliaries and common verbs show it, and in which part the text may be."""
    kind = None if UNDECIDED.search(text) else decided(text, TENSE)
    if kind is None or {"present": PAST_VERB, "past": PRESENT_VERB}[kind[0]].search(text):
        return None
    return kind
