"""The command line: `sae-lens-sampled train | info`."""

import platform
from importlib.metadata import version

import sae_lens.llm_sae_training_runner
import torch
import typer
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

import sae_lens_sampled

app = typer.Typer(no_args_is_help=True, add_completion=False, help=sae_lens_sampled.__doc__)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    # Everything behind `train` is SAELens', `--help` included.
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train an SAE: the flags of `python -m sae_lens.llm_sae_training_runner`, with `sampled_topk` registered."""
    sae_lens.llm_sae_training_runner._run_cli(context.args)


@app.command()
def info() -> None:
    """Print versions, registered architectures, scores and devices."""
    packages = ["sae-lens-sampled", "sae-lens", "transformer-lens", "torch"]
    devices = ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    rows = {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "training architectures": ", ".join(SAE_TRAINING_CLASS_REGISTRY),
        "inference architectures": ", ".join(SAE_CLASS_REGISTRY),
        "scores": ", ".join(sae_lens_sampled.SCORES),
        "devices": ", ".join(devices),
    }
    for name, value in rows.items():
        typer.echo(f"{name:24} {value}")
