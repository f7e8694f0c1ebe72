"""Data that the repository brings along to work without a network: a language model, its text, labelled texts."""

from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
BUNDLED_MODEL = EXAMPLES / "tiny_lm"
"""A small language model in Hugging Face format; none of this is in an installed package."""
BUNDLED_TEXT = BUNDLED_MODEL / "text"
BUNDLED_PROBING_DATASETS = tuple(
    EXAMPLES / "tiny_probing" / name for name in ("authors", "sentence_polarity", "subjectivity")
)


def bundled(path: Path) -> Path:
    """`path`, which is in the repository.

    Raises:
        ValueError: if it is not there, because the package was installed without the repository.
    """
    if not path.exists():
        raise ValueError(
            f"offline without a model, text and probing data sets takes those of the repository's examples folder, but "
            f"{path} is not there; clone the repository, or pass your own."
        )
    return path
