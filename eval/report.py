"""Make a page of an output folder of SAEBench results; the same as `sae-lens-sampled report`."""

import typer

from sae_lens_sampled.cli import report

if __name__ == "__main__":
    typer.run(report)
