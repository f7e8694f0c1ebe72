"""The command line: `sae-lens-sampled train | calibrate | upload | eval | report | mmcs | info`."""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

import sae_lens_sampled
from sae_lens_sampled.devices import available_devices
from sae_lens_sampled.runners import calibrate_command, train_command
from sae_lens_sampled.runners.parts import parse_part
from sae_lens_sampled.runners.train_command import TrainError
from sae_lens_sampled.sae.calibration import MIN_TOKENS
from sae_lens_sampled.sae.path_choice import MEASURED_DEVICES
from sae_lens_sampled.similarity import similarity_table
from sae_lens_sampled.step.kept_entries import choose_path, possible_paths


def _parse_kwargs(text: str) -> dict[str, Any]:
    """Parse the value of `--model-kwargs`, which must be a JSON object."""
    try:
        kwargs = json.loads(text)
    except json.JSONDecodeError:
        kwargs = None
    if not isinstance(kwargs, dict):
        raise typer.BadParameter(f'{text} is not a JSON object such as \'{{"revision": "step1000"}}\'.')
    return kwargs


ModelKwargs = Annotated[
    dict[str, Any] | None,
    typer.Option(
        parser=_parse_kwargs,
        metavar="JSON",
        help="Arguments of from_pretrained as a JSON object; default: those of the training run.",
    ),
]
Sources = Annotated[
    list[str],
    typer.Argument(help="SAEs: FOLDER of an SAE or a checkpoint, NAME=FOLDER, or RELEASE:SAE_ID for one on the Hub."),
]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("sae-lens-sampled"))
        raise typer.Exit


@app.callback(help=sae_lens_sampled.__doc__)
def main(
    print_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the program itself, given before any command."""


@contextmanager
def exit_on(*errors: type[Exception]) -> Iterator[None]:
    """Exit with status 1 on `errors`, printing only their message, to stderr."""
    try:
        yield
    except errors as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    # All arguments after `train` are passed to SAELens, including `--help`.
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train an SAE with the flags of `python -m sae_lens.llm_sae_training_runner`, including the plugin's own."""
    with exit_on(TrainError):
        status = train_command.train(context.args)
    raise typer.Exit(status)


@app.command()
def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint of sampled_topk or its transcoder, a folder.")],
    dataset: Annotated[str, typer.Option(help="Hub name or folder of the text to calibrate on.")],
    out: Annotated[Path, typer.Option(help="Folder for the calibrated JumpReLU SAE; must not exist yet.")],
    model: Annotated[str | None, typer.Option(help="Hub name or folder; default: that of the training run.")] = None,
    model_kwargs: ModelKwargs = None,
    mode: Annotated[str, typer.Option(help="per_latent, or global: one threshold for all latents.")] = "per_latent",
    target_l0: Annotated[float | None, typer.Option(help="Target L0; default: that of training's selection.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to use, rounded up to batches.", min=MIN_TOKENS)] = 1_000_000,
    batch_size: Annotated[int, typer.Option(help="Tokens per selection batch; use that of training.", min=1)] = 4096,
    device: Annotated[str, typer.Option()] = "cpu",
) -> None:
    """Set a trained SAE's thresholds to quantiles of its activations on a data set, and save it for inference.

    Token settings and, by default, the model are those of the training run, as recorded in the checkpoint.
    """
    if out.exists():
        raise typer.BadParameter(f"{out} already exists; nothing is overwritten. Choose another --out.")
    with exit_on(ValueError, OSError):
        lines = calibrate_command.calibrate(
            checkpoint,
            dataset,
            out,
            model=model,
            model_kwargs=model_kwargs,
            mode=mode,
            target_l0=target_l0,
            max_tokens=max_tokens,
            batch_size=batch_size,
            device=device,
        )
    for line in lines:
        typer.echo(line)
    typer.echo(f"Saved to {out}")


@app.command()
def upload(
    folders: Annotated[
        list[str], typer.Argument(help="Folders of exported SAEs or of training checkpoints, or NAME=FOLDER.")
    ],
    repo_id: Annotated[str, typer.Option(help="Hub repository, as user/name.")],
    dry_run: Annotated[Path | None, typer.Option(help="Write card and folders here, upload nothing.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace these SAEs' files and the card on the Hub.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
) -> None:
    """Upload SAEs to the Hugging Face Hub with a model card; NAME, or the folder's name, becomes the sae_id."""
    named = [_named_folder(argument) for argument in folders]
    saes = dict(named)
    if len(saes) < len(named):
        raise typer.BadParameter("two folders have the same name, which would be both SAEs' sae_id; pass NAME=FOLDER.")
    with exit_on(ValueError, OSError, sae_lens_sampled.HubError):
        where = sae_lens_sampled.upload_to_hub(saes, repo_id, dry_run_folder=dry_run, force=force, private=private)
    typer.echo(f"Written to {where}" if dry_run else f"Uploaded to {where}")


def _named_folder(argument: str) -> tuple[str, Path]:
    """Split an argument, FOLDER or NAME=FOLDER as for `eval`, into the sae_id and the folder."""
    name, equals, folder = argument.partition("=")
    if equals and not Path(argument).exists():
        return name, Path(folder)
    return Path(argument).resolve().name, Path(argument)


@app.command("eval")
def evaluate(
    saes: Sources,
    evals: Annotated[str, typer.Option(help="Some of core,sparse_probing,absorption,mmcs.")] = "core,sparse_probing",
    model: Annotated[str | None, typer.Option(help="TransformerLens name or folder; default: as in training.")] = None,
    model_kwargs: ModelKwargs = None,
    output_dir: Annotated[Path, typer.Option(help="Folder for results and caches.")] = Path("sae_bench_results"),
    text: Annotated[str | None, typer.Option(help="Data set for core; default: SAEBench's openwebtext.")] = None,
    probing_data: Annotated[
        list[Path] | None, typer.Option(help="Labelled texts for probing instead of SAEBench's eight sets; repeatable.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set a field of an eval's configuration, such as core.context_size=64; repeatable."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if available, else cpu.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of model and SAEs; default: that in the model's arguments, else float32.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 42,
    offline: Annotated[
        bool, typer.Option("--offline", help="Use no network; model and data default to those bundled in examples/.")
    ] = False,
    force_rerun: Annotated[bool, typer.Option("--force-rerun", help="Replace existing results.")] = False,
    part: Annotated[
        str, typer.Option(help="Such as 2/8: every eighth SAE from the second on, for processes that share a folder.")
    ] = "1/1",
) -> None:
    """Evaluate SAEs of any architecture but Temporal with SAEBench, and compare seeds by MMCS."""
    with exit_on(ModuleNotFoundError):
        from sae_lens_sampled.saebench import EvalError, parse_source, run_evals
    with exit_on(ValueError, OSError, EvalError):
        mine, wanted = parse_part(part).of(saes), [name.strip() for name in evals.split(",") if name.strip()]
        if len(mine) < len(saes) and "mmcs" in wanted:
            raise typer.BadParameter("mmcs compares all SAEs; run it without --part once all parts have finished.")
        if not mine:
            raise typer.BadParameter(f"--part {part} of {len(saes)} SAEs selects none; use fewer parts.")
        run_evals(
            [parse_source(sae) for sae in mine],
            wanted,
            model,
            output_dir,
            probing_datasets=probing_data or (),
            text=text,
            overrides=_overrides(setting or []),
            model_kwargs=model_kwargs,
            device=device,
            dtype=dtype,
            seed=seed,
            offline=offline,
            force_rerun=force_rerun,
        )
    typer.echo(f"Results are in {output_dir / 'eval_results'}")


def _overrides(settings: list[str]) -> dict[str, dict[str, Any]]:
    """Parse `["core.context_size=64"]` to `{"core": {"context_size": 64}}`; values that are not JSON are strings."""
    overrides: dict[str, dict[str, Any]] = {}
    for setting in settings:
        where, equals, value = setting.partition("=")
        eval_name, dot, name = where.partition(".")
        if not equals or not dot:
            raise typer.BadParameter(
                f"--set {setting} is not of the form EVAL.FIELD=VALUE, such as core.context_size=64."
            )
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = value
        overrides.setdefault(eval_name, {})[name] = parsed
    return overrides


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="--output-dir of `eval`, or a folder of SAEBench's own results.")],
) -> None:
    """Write a report of results: tables over seeds, Pareto plots, firing densities, MMCS, top contexts.

    It is written into the folder as `report.html`, a self-contained file, and `report.md`.
    """
    with exit_on(ModuleNotFoundError):
        from sae_lens_sampled.saebench import write_report
    with exit_on(ValueError, OSError):
        path = write_report(folder)
    typer.echo(f"Written to {path} and {path.with_suffix('.md')}")


@app.command()
def mmcs(
    saes: Sources,
    device: Annotated[str, typer.Option()] = "cpu",
) -> None:
    """Print how similar the dictionaries of several seeds are (mean max cosine similarity); loads no language model.

    For every ordered pair: the mean over the first SAE's latents of the largest cosine with a latent of the second, for
    decoder and encoder vectors; from decoders alone, the same with |cosine|, the shares of latents whose largest cosine
    is above 0.7 and 0.9, the one-to-one matched mean of |cosine| (left out above 8,192 latents), and the mean
    expected with random directions.
    """
    with exit_on(ModuleNotFoundError):
        from sae_lens_sampled.saebench import load_saes, parse_source
        from sae_lens_sampled.saebench.evals.mmcs import check_alike
        from sae_lens_sampled.saebench.models import check_one_model
    if len(saes) < 2:
        raise typer.BadParameter("pass at least two SAEs to compare.")
    with exit_on(ValueError, OSError):
        loaded = load_saes([parse_source(sae) for sae in saes], device)
        check_alike(loaded)
        check_one_model(loaded)
        typer.echo(similarity_table({sae.name: sae.sae for sae in loaded}))


@app.command()
def info() -> None:
    """Print versions, registered architectures, scores, devices, and how training steps are computed on each."""
    packages = ["sae-lens-sampled", "sae-lens", "transformer-lens", "torch"]
    gpu_name = torch.cuda.get_device_name
    devices = [f"{name} ({gpu_name(name)})" if "cuda" in name else name for name in available_devices()]
    rows = {
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "training architectures": ", ".join(SAE_TRAINING_CLASS_REGISTRY),
        "inference architectures": ", ".join(SAE_CLASS_REGISTRY),
        "scores": ", ".join(sae_lens_sampled.SCORES),
        "devices": ", ".join(devices),
        **{f"training step, {device}": _training_step(torch.device(device.partition(" ")[0])) for device in devices},
    }
    for name, value in rows.items():
        typer.echo(f"{name:24} {value}")


def _training_step(device: torch.device) -> str:
    """How a training step of usual size is computed on `device`, in words."""
    config = sae_lens_sampled.SampledTopKTrainingSAEConfig
    single = config(d_in=768, d_sae=16_384, k=64, pool_factor=10)
    grouped = config(d_in=768, d_sae=16_384, k=64, pool_factor=10, pool_group_size=16)
    if device.type in MEASURED_DEVICES and len(possible_paths(grouped, device)) > 1:
        return "the fastest path, timed at the first step and a few times later"
    if choose_path(grouped, "auto", 4096, device) == "kept":
        return "on the kept entries"
    small = "on the columns of one small pool, else " if choose_path(single, "auto", 4096, device) == "columns" else ""
    return f"{small}dense: torch has no sparse kernels for this device"
