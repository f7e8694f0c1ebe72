"""Entry point of a process that runs the study."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import eval_helpers  # noqa: F401  absorption takes fewer words
import torch


def work(argv: Sequence[str], log: Path) -> None:
    """Run the study on one thread, and append its output to `log`."""
    torch.set_num_threads(1)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        from study.run import main  # imported here because the script changes sys.path

        main(argv)
