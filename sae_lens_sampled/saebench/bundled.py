"""Data bundled with the repository for offline use: a language model, its text and labelled texts."""

from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
BUNDLED_MODEL = EXAMPLES / "tiny_lm"
"""A small language model in Hugging Face format; an installed package contains none of these data."""
BUNDLED_TEXT = BUNDLED_MODEL / "text"
BUNDLED_PROBING_DATASETS = tuple(
    EXAMPLES / "tiny_probing" / name for name in ("authors", "sentence_polarity", "subjectivity")
)


def bundled(path: Path) -> Path:
    """Return `path`, which is in the repository.

    Raises:
        ValueError: if it does not exist, because the package was installed without the repository.
    """
    if not path.exists():
        raise ValueError(
            f"offline without a model, text and probing data sets uses those in the repository's examples folder, but "
            f"{path} does not exist; clone the repository, or pass your own."
        )
    return path
