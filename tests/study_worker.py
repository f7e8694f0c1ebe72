"""A process that runs the study."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sae_bench.evals.absorption import common, vocab


def fewer_words(tokenizer: Any, **kwargs: Any) -> list[str]:
    """Every third word for absorption, whose words are most of the time."""
    return sorted(vocab.get_alpha_tokens(tokenizer, **kwargs))[::3]


def work(argv: Sequence[str], log: Path) -> None:
    """Run it on one thread; what it prints goes to the end of `log`."""
    torch.set_num_threads(1)
    common.get_alpha_tokens = fewer_words
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        from study.run import main  # changes sys.path, as a script may

        main(argv)
