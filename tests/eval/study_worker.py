"""A process that runs the study."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import eval_helpers  # noqa: F401  absorption takes fewer words
import torch


def work(argv: Sequence[str], log: Path) -> None:
    """Run it on one thread; what it prints goes to the end of `log`."""
    torch.set_num_threads(1)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        from study.run import main  # changes sys.path, as a script may

        main(argv)
