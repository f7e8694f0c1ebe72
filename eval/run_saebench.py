"""Run SAEBench on SAEs; the same as `sae-lens-sampled eval`."""

import typer

from sae_lens_sampled.cli import evaluate

if __name__ == "__main__":
    typer.run(evaluate)
