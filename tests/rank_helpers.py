"""Starting processes that train together."""

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["sae_lens_sampled"])  # what takes long; Python 3.11 does not find the tests' own modules
