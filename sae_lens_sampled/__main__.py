"""`python -m sae_lens_sampled`, the same as the command `sae-lens-sampled`."""

from sae_lens_sampled.cli import app

app(prog_name="sae-lens-sampled")
