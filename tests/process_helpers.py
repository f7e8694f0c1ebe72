"""Processes forked from a server that has done the slow imports."""

import contextlib
import multiprocessing
import os
import runpy
import sys
import warnings
from pathlib import Path

import torch

FORKS = multiprocessing.get_context("forkserver")
# The slow imports; Python 3.11 does not find the tests' own modules, and modules not installed are skipped.
FORKS.set_forkserver_preload(["sae_lens_sampled", "sae_lens_sampled.saebench"])


def _run_script(script: Path | str, arguments: tuple[str, ...], folder: Path, log: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = [str(script), *arguments]
    if isinstance(script, Path):
        sys.path[0] = str(script.parent)
    warnings.simplefilter("ignore")
    with (
        log.open("w") as out,
        log.with_suffix(".err").open("w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        if isinstance(script, Path):
            runpy.run_path(str(script), run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)


def run_script(script: Path | str, *arguments: str, folder: Path, log: Path) -> str:
    """Run a script by its path, or a package by its name, in `folder`; returns its output, fails if the script does."""
    process = FORKS.Process(target=_run_script, args=(script, arguments, folder, log))
    process.start()
    process.join()
    assert process.exitcode == 0, log.with_suffix(".err").read_text()[-2000:]
    return log.read_text()
