"""Run SAEBench on SAEs; the same as `sae-lens-sampled eval`.

Usage:
python eval/run_saebench.py saes/* --offline
python eval/run_saebench.py saes/* --model pythia-160m-deduped --evals core,sparse_probing,absorption,mmcs
"""

import typer

from sae_lens_sampled.cli import evaluate

if __name__ == "__main__":
    typer.run(evaluate)
