"""Paths of the language model, the text and the labelled sets that come with the repository."""

from pathlib import Path

EXAMPLES = Path(__file__).parent
TINY_LM = EXAMPLES / "tiny_lm"
"""The language model, in Hugging Face format, with its text in `text/`."""
HELD_OUT_TEXT = TINY_LM / "text" / "validation.jsonl"
"""Passages of a novel that the SAEs are not trained on."""
PROBING_DATASETS = tuple(EXAMPLES / "tiny_probing" / name for name in ("authors", "sentence_polarity", "subjectivity"))
