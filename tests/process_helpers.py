"""Starting processes that need not import everything anew."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
# What takes long; Python 3.11 does not find the tests' own modules, and what is not installed is left out.
FORKS.set_forkserver_preload(["sae_lens_sampled", "sae_lens_sampled.saebench"])
