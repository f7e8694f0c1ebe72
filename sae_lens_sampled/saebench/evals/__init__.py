"""The evals that `run_evals` knows. To add one, add a file here and a line to the table."""

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
"""Eval classes by name, in the order in which they run: MMCS reads latent densities from core's results."""

__all__ = ["EVALS", "Eval"]
