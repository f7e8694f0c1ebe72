"""Data in the repository for offline use: a language model, text to run it on, and labelled texts for probing."""

from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
BUNDLED_MODEL = EXAMPLES / "tiny_lm"
"""A small language model in Hugging Face format; an installed package contains none of these data."""
BUNDLED_TEXT = BUNDLED_MODEL / "text"
BUNDLED_PROBING_DATASETS = tuple(
    EXAMPLES / "tiny_probing" / name for name in ("authors", "sentence_polarity", "subjectivity")
)


def bundled(path: Path) -> Path:
    """Return `path`, after checking that these bundled data are there.

    Raises:
        ValueError: if `path` does not exist, because the package was installed without the repository.
    """
    if not path.exists():
        raise ValueError(
            f"with offline=True, a model, text or probing data sets that are not passed come from the repository's "
            f"examples folder, but {path} does not exist; clone the repository, or pass your own."
        )
    return path
