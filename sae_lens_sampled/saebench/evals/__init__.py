"""The evals of `run_evals`. A new one needs a file in this folder and a line in the table."""

from sae_lens_sampled.saebench.evals.absorption import Absorption
from sae_lens_sampled.saebench.evals.base import Eval
from sae_lens_sampled.saebench.evals.core import Core
from sae_lens_sampled.saebench.evals.mmcs import Mmcs
from sae_lens_sampled.saebench.evals.sparse_probing import SparseProbing

EVALS: dict[str, type[Eval]] = {
    "core": Core,
    "sparse_probing": SparseProbing,
    "absorption": Absorption,
    "mmcs": Mmcs,
}
"""Eval classes by name, in the order in which they run: MMCS comes after core because it reads core's densities."""

__all__ = ["EVALS", "Eval"]
