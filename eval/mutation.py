"""Mutation tests: change one thing at a time in the modules that compute, and run each module's tests.

    python eval/mutation.py                        # all, some hours on two cores; a second call resumes
    python eval/mutation.py --sample 100           # up to a hundred mutants per module
    python eval/mutation.py --modules step/scores  # one module
    python eval/mutation.py --survivors            # prints the mutants that no test noticed, as diffs
    python eval/mutation.py --again                # reruns the survivors with the current tests
    python eval/mutation.py --report               # updates the table in eval/README.md

A mutant is a module with one change by mutmut (`pip install mutmut`): of an operator, a constant, an argument or a
name. It is killed if a test fails or the tests take longer than `TIMEOUT_SECONDS`. mutmut itself skips decorated
functions, which most of ours are, so this script runs the mutants: in a copy of the repository, each in a fork of a
process that has already imported the dependencies. The mutants' order is random but fixed. Changes that cannot be
noticed on a CPU, such as another `device=`, are left out. Results are stored under a hash of the mutant's code, so the
mutants of a changed module are run again.
"""

import argparse
import ast
import contextlib
import difflib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from pages import markdown_table

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "sae_lens_sampled"
RESULTS = ROOT / "eval" / "results" / "mutation.jsonl"
REASONS = ROOT / "eval" / "results" / "mutation_survivors.json"
TIMEOUT_SECONDS = 120
MARKS = "<!-- mutants -->", "<!-- end of mutants -->"
MODULES = {
    "step/scores": ["step/test_scores"],
    "step/selection": ["step/test_selection", "step/test_nested", "step/test_step_paths", "sae/test_data_parallel"],
    "step/column_scan": ["step/test_kept_entries", "step/test_step_paths", "sae/test_data_parallel", "test_whole_life"],
    "step/sparse_codes": [
        "step/test_sparse_codes",
        "step/test_kept_entries",
        "step/test_step_paths",
        "step/test_nested",
    ],
    "step/kept_entries": [
        "step/test_kept_entries",
        "step/test_step_paths",
        "step/test_nested",
        "sae/test_data_parallel",
    ],
    "step/reduced_scan": ["step/test_reduced_scan"],
    "step/products": ["step/test_sparse_codes", "step/test_step_paths"],
    "sae/path_choice": ["sae/test_path_choice"],
    "step/auxiliary": ["step/test_auxiliary", "step/test_step_paths"],
    "step/thresholds": ["step/test_thresholds", "sae/test_data_parallel"],
    "sae/calibration": ["sae/test_calibration", "-k", "not million"],
    "sae/export": ["sae/test_export", "step/test_thresholds", "sae/test_transcoder", "sae/test_transcoder_export"],
    "similarity": ["test_dictionary_similarity"],
    "sae/transcoder": ["sae/test_transcoder", "sae/test_transcoder_export"],
    "sae/reconstruction": ["sae/test_transcoder", "sae/test_transcoder_export"],
}
"""Test files of each module, by its path in the package, with pytest options."""


@dataclass(frozen=True)
class Mutant:
    """A module with one change."""

    module: str
    source: str
    """The whole changed module."""
    change: str
    """Diff from the original module, without context lines."""

    @property
    def key(self) -> str:
        """Key in the results, a hash of module name and `_code`; sorting by it gives a random but fixed order."""
        return hashlib.sha256(f"{self.module}\n{_code(self.source)}".encode()).hexdigest()[:16]

    @property
    def line(self) -> str:
        """The module and its new lines: key in `REASONS`, so that a reason stays valid when other lines change."""
        added = [line[1:].strip() for line in self.change.splitlines() if line.startswith("+")]
        return f"{self.module}: {' '.join(added)}"


def mutants(module: str) -> Iterator[Mutant]:
    """All distinct, noticeable mutants of a module in line order, including those of decorated functions."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper
    from mutmut.mutation.file_mutation import MutationVisitor
    from mutmut.mutation.mutators import mutation_operators
    from mutmut.mutation.pragma_handling import get_ignored_lines

    class Visitor(MutationVisitor):
        def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
            return not isinstance(node, cst.FunctionDef) and super()._skip_node_and_children(node)

    code = (ROOT / PACKAGE / f"{module}.py").read_text()
    wrapper = MetadataWrapper(cst.parse_module(code))
    visitor = Visitor(mutation_operators, get_ignored_lines(module, code, wrapper, None))
    tree = wrapper.visit(visitor)
    seen = {_noticeable(code)}
    for mutation in visitor.mutations:
        source = tree.deep_replace(mutation.original_node, mutation.mutated_node).code  # type: ignore[union-attr]
        if (noticeable := _noticeable(source)) not in seen:
            seen.add(noticeable)
            lines = difflib.unified_diff(code.splitlines(), source.splitlines(), lineterm="", n=0)
            yield Mutant(module, source, "\n".join(list(lines)[2:]))


def _code(source: str) -> str:
    """The source without comments, docstrings, types and imports, so that a moved module keeps its results."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for part in ("body", "orelse", "finalbody"):
            statements = getattr(node, part, None)
            if isinstance(statements, list) and statements:
                kept = [each for each in statements if not isinstance(each, (ast.Import, ast.ImportFrom))]
                setattr(node, part, kept or [ast.Pass()])
        for field in ("annotation", "returns"):
            if hasattr(node, field):
                setattr(node, field, ast.Constant(None))
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [each for each in body if not _is_text(each)] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def _is_text(statement: ast.stmt) -> bool:
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_constant and isinstance(statement.value.value, str)  # type: ignore[union-attr]


def _noticeable(source: str) -> str:
    """The source without arguments that change no result on a CPU, such as `device` and `strict`."""
    return re.sub(r"(, )?\b(device|strict|stacklevel|sorted)=[^,()]+(\([^()]*\))?(, (?=\)))?|, (?=\))", "", source)


def run_tests(folder: Path, names: Sequence[str], log: Path) -> None:
    """Run test files and exit the process, with status 0 if all tests pass and 1 otherwise."""
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        sys.dont_write_bytecode = True
        import pytest

        chosen = [f"tests/{name}.py" if "test_" in name else name for name in names]
        status = pytest.main(["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-W", "ignore", *chosen])
    os._exit(int(status != 0))


def work(jobs: Any, results: Any, folder: Path) -> None:
    """Copy the repository to `folder`, and test mutants from the queue `jobs` in it until there are no more."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(folder)}
    # Forks inherit these slow imports; the package itself must be imported anew for every mutant.
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import sae_lens  # noqa: F401
    import scipy.optimize  # noqa: F401
    import torch

    torch.set_num_threads(1)
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", "results", "*.pyc"))
    fork = multiprocessing.get_context("fork")
    while (mutant := jobs.get()) is not None:
        file = folder / PACKAGE / f"{mutant.module}.py"
        whole = file.read_text()
        file.write_text(mutant.source)
        process = fork.Process(target=run_tests, args=(folder, MODULES[mutant.module], folder / "log"))
        start = time.monotonic()
        process.start()
        process.join(TIMEOUT_SECONDS)
        outcome = {0: "survived", None: "timeout"}.get(process.exitcode, "killed")
        process.kill()
        process.join()
        file.write_text(whole)
        seconds = round(time.monotonic() - start, 1)
        results.put({"key": mutant.key, "module": mutant.module, "outcome": outcome, "seconds": seconds})


def run(wanted: Sequence[Mutant], n_workers: int) -> None:
    """Test the mutants in `n_workers` processes, and append each result to the file as soon as it is known."""
    spawn = multiprocessing.get_context("spawn")
    jobs, results = spawn.Queue(), spawn.Queue()
    for mutant in [*wanted, *[None] * n_workers]:
        jobs.put(mutant)
    with TemporaryDirectory() as scratch, RESULTS.open("a") as file:
        folders = [Path(scratch) / str(i) / "repository" for i in range(n_workers)]
        workers = [spawn.Process(target=work, args=(jobs, results, folder)) for folder in folders]
        for worker in workers:
            worker.start()
        for _ in tqdm(wanted, desc="Mutants"):
            file.write(json.dumps(results.get()) + "\n")
            file.flush()
        for worker in workers:
            worker.join()


def outcomes() -> dict[str, dict[str, Any]]:
    """Results so far, by mutant key."""
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {result["key"]: result for result in map(json.loads, lines)}


def table() -> str:
    """Markdown table: how many mutants of each module are killed, and how many survivors have a stated reason."""
    known = outcomes()
    reasons = json.loads(REASONS.read_text())
    lines = []
    for module in MODULES:
        all_of_module = list(mutants(module))
        run = [mutant for mutant in all_of_module if mutant.key in known]
        survivors = [mutant for mutant in run if known[mutant.key]["outcome"] == "survived"]
        named = sum(mutant.line in reasons for mutant in survivors)
        share = f"{1 - len(survivors) / len(run):.1%}" if run else ""
        lines.append([f"`{module}`", f"{len(run):,} of {len(all_of_module):,}", share, str(len(survivors)), str(named)])
    return markdown_table(["module", "mutants run", "killed", "survivors", "with a reason"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--sample", type=int, help="largest number of mutants per module; default: all")
    parser.add_argument("--survivors", action="store_true")
    parser.add_argument("--again", action="store_true", help="rerun the survivors with the current tests")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    if args.report:
        page = ROOT / "eval" / "README.md"
        begin, end = map(re.escape, MARKS)
        text = f"{MARKS[0]}\n{table()}\n{MARKS[1]}"
        page.write_text(re.sub(f"{begin}.*{end}", lambda _: text, page.read_text(), flags=re.DOTALL))
        return
    known = outcomes()
    of_modules = [
        mutant
        for module in args.modules
        for mutant in sorted(mutants(module), key=lambda mutant: mutant.key)[: args.sample]
    ]
    survivors = [mutant for mutant in of_modules if known.get(mutant.key, {}).get("outcome") == "survived"]
    if args.survivors:
        reasons = json.loads(REASONS.read_text())
        for mutant in survivors:
            print(f"{mutant.line}\n{mutant.change}\n{reasons.get(mutant.line, '')}\n")
        return
    run(survivors if args.again else [mutant for mutant in of_modules if mutant.key not in known], args.workers)


if __name__ == "__main__":
    main()
