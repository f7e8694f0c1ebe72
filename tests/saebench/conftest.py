import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def output_dir(tmp_path_factory):
    """Output folder of `results`, shared by all test processes: later ones find the results of the first."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "results"


@pytest.fixture
def copy_probes(results, output_dir):
    """Function that copies absorption's probes of the bundled model, which are slow to train, to another folder."""
    return lambda folder: shutil.copytree(output_dir / "artifacts", folder / "artifacts", dirs_exist_ok=True)


@pytest.fixture(scope="session")
def run_of_all(saes, output_dir, tmp_path_factory):
    """All evals on all `saes`: results, and the files in read-only folders before and after."""
    import sae_bench
    from eval_helpers import ALL, GIVEN, PROBING, SMALL, files_in
    from filelock import FileLock

    from sae_lens_sampled.saebench import run_evals

    read_only = Path(sae_bench.__file__).parent, GIVEN["model"], PROBING, tmp_path_factory.mktemp("cwd")
    before = list(map(files_in, read_only))
    with pytest.MonkeyPatch.context() as patch, FileLock(f"{output_dir}.lock"):
        patch.chdir(read_only[-1])
        results = run_evals(saes, ALL, output_dir=output_dir, overrides=SMALL, **GIVEN)
    return SimpleNamespace(results=results, before=before, after=list(map(files_in, read_only)))


@pytest.fixture(scope="session")
def results(run_of_all):
    """Results of all evals on all `saes`."""
    return run_of_all.results
