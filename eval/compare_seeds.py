"""How alike are the dictionaries of several seeds? The same as `sae-lens-sampled mmcs`."""

import typer

from sae_lens_sampled.cli import mmcs

if __name__ == "__main__":
    typer.run(mmcs)
