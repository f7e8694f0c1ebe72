"""The study at test size."""

from pathlib import Path

from study.plan import Unit, arms
from study.storage import Storage
from study.studies import TINY, smoke

EVAL = Path(__file__).parent.parent / "eval"
SMOKE = smoke(TINY)


def storage(folder, study=SMOKE):
    return Storage(study, folder / "results", folder / "work")


def unit_of(name, seed=0, study=SMOKE):
    return Unit({arm.name: arm for arm in arms(study)}[name], seed)
