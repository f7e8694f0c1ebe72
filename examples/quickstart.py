"""Sampled-SAE and BatchTopK on a language model's residual stream: one model pass, one table, one picture.

    python examples/quickstart.py

trains on the small language model in `examples/tiny_lm`, offline, in about a minute on two CPU cores. On block 10 of a
real model, also offline, in about ten minutes (smollm2.py says what to install):

    python examples/quickstart.py --model smollm2

On a model and a data set from the Hugging Face Hub, with the paper's settings (needs a GPU; any setting can be
overridden):

    python examples/quickstart.py --model EleutherAI/pythia-160m-deduped --dataset monology/pile-uncopyrighted \
        --hook blocks.6.hook_resid_post --device cuda
"""

import argparse
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import matplotlib.pyplot as plt
import torch
from datasets import load_dataset
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAETrainer,
)
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from bundled import TINY_LM
from sae_lens_sampled import SampledTopKTrainingSAEConfig, to_jumprelu
from sae_lens_sampled.metrics import fraction_of_variance_unexplained
from sae_lens_sampled.runners.progress import live_bar
from sae_lens_sampled.runners.training_data import store_of_run, token_settings
from smollm2 import smollm2_folder

TINY = {"d_sae": 1024, "k": 16, "batch_size": 1024, "steps": 300, "lr": 2e-3, "dead_window": 100}
SMOLLM2 = {"d_sae": 4096, "k": 32, "batch_size": 2048, "steps": 200, "lr": 1e-3, "dead_window": 50}
# The paper's summary does not give width and k; these are usual for Pythia-160M.
PAPER = {"d_sae": 16384, "k": 64, "batch_size": 4096, "steps": 50_000, "lr": 3e-4, "dead_window": 1000}


def sae_configs(d_in: int, d_sae: int, k: float, device: str) -> dict[str, TrainingSAEConfig]:
    """BatchTopK and four candidate pools; all else is equal, including the auxiliary coefficient."""
    shared = {"d_in": d_in, "d_sae": d_sae, "k": k, "aux_loss_coefficient": 1 / 32, "device": device}
    pools = {
        "pool_factor_1.5": {"pool_factor": 1.5},
        "pool_factor_4": {"pool_factor": 4},
        "pool_factor_16": {"pool_factor": 16},
        "pool_factor_10_groups_of_16": {"pool_factor": 10, "pool_group_size": 16},
    }
    return {
        "batchtopk": BatchTopKTrainingSAEConfig(**shared),
        **{name: SampledTopKTrainingSAEConfig(**shared, **fields) for name, fields in pools.items()},
    }


@contextmanager
def stopwatch(device: str) -> Iterator[dict[int, float]]:
    """Seconds that each SAE's training steps take, by `id(sae)`: loss, gradients, clipping and Adam."""
    seconds: dict[int, float] = defaultdict(float)
    step = SAETrainer.step

    def timed(trainer: SAETrainer, batch: Tensor):
        start = time.perf_counter()
        output = step(trainer, batch)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds[id(trainer.sae)] += time.perf_counter() - start
        return output

    with mock.patch.object(SAETrainer, "step", timed):
        yield seconds


def train(args: argparse.Namespace, model: TransformerBridge) -> tuple[dict[str, TrainingSAE], dict[str, float]]:
    """All SAEs on the same activations in the same order, and the seconds each took."""
    torch.manual_seed(args.seed)
    cfg = MultiSAETrainingRunnerConfig(
        saes=sae_configs(model.cfg.d_model, args.d_sae, args.k, args.device),
        hook_names=args.hook,
        model_name=args.model,
        dataset_path=args.dataset,
        context_size=args.context_size,
        training_tokens=args.steps * args.batch_size,
        train_batch_size_tokens=args.batch_size,
        store_batch_size_prompts=32,
        n_batches_in_buffer=2 * ceil(args.batch_size / args.context_size),  # in prompts: two batches of tokens
        exclude_special_tokens=True,
        lr=args.lr,
        lr_warm_up_steps=args.steps // 20,
        lr_decay_steps=args.steps // 5,
        dead_feature_window=args.dead_window,
        seed=args.seed,
        device=args.device,
        checkpoint_path=None,
        output_path=str(args.output_dir / "saes"),
        logger=LoggingConfig(log_to_wandb=False),
    )
    with stopwatch(args.device) as seconds, live_bar():
        saes = MultiSAETrainingRunner(cfg, override_model=model).run()
    return saes, {name: seconds[id(sae)] for name, sae in saes.items()}


def held_out_activations(args: argparse.Namespace, model: TransformerBridge, sae: TrainingSAE) -> Tensor:
    """Activations on the data set's validation split, shape (tokens, d_in)."""
    dataset = load_dataset(args.dataset, split="validation", streaming=True)
    # The same kinds of tokens as in training, that is, no special ones.
    store = store_of_run(model, sae, token_settings(sae.cfg.metadata), dataset, args.batch_size, args.device)
    return torch.cat([next(store) for _ in range(16)])


@torch.no_grad()
def evaluate(sae: TrainingSAE, batches: list[Tensor]) -> tuple[dict[str, float], Tensor]:
    """FVU and L0 of the selection of training, batch by batch, and of the export; and the export's firing rates."""
    x, row = torch.cat(batches), {}
    for suffix, variant in (("", sae), (" export", to_jumprelu(sae))):
        acts = [variant.encode(batch) for batch in batches]
        density = torch.cat(acts).gt(0).double().mean(dim=0)
        x_hat = torch.cat([variant.decode(part) for part in acts])
        row |= {f"FVU{suffix}": fraction_of_variance_unexplained(x, x_hat).item(), f"L0{suffix}": density.sum().item()}
    row["dead"] = (density == 0).double().mean().item()
    if hasattr(sae, "pool_statistics"):
        statistics = sae.pool_statistics()
        row |= {"starved": statistics["starved_share"], "churn": statistics["pool_churn"]}
    return row, density.cpu()


RELOAD = """
import sys, torch
from sae_lens import SAE
activations, *folders = sys.argv[1:]
for folder in folders:
    sae = SAE.load_from_disk(folder)
    acts = sae.encode(torch.load(activations))
    assert acts.isfinite().all() and (acts > 0).any(), folder
    print(f"  {folder}: {sae.cfg.architecture()}, {(acts > 0).sum(dim=1).float().mean():.1f} active latents per token")
assert "sae_lens_sampled" not in sys.modules
"""


def reload_without_plugin(folders: list[Path], activations: Tensor) -> str:
    """Load each saved SAE and encode with it, in a process that never imports this package."""
    with TemporaryDirectory() as scratch:
        file = Path(scratch) / "activations.pt"
        torch.save(activations.cpu(), file)
        command = [sys.executable, "-W", "ignore", "-c", RELOAD, str(file), *map(str, folders)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def format_table(rows: dict[str, dict[str, float]]) -> str:
    columns = {"FVU": ".3f", "L0": ".1f", "FVU export": ".3f", "L0 export": ".1f"} | {
        "dead": ".0%",
        "starved": ".0%",
        "churn": ".1%",
        "seconds": ".0f",
    }
    lines = [f"{'':28}" + "".join(f"{column:>11}" for column in columns)]
    for name, row in rows.items():
        cells = [format(row[column], spec) if column in row else "-" for column, spec in columns.items()]
        lines.append(f"{name:28}" + "".join(f"{cell:>11}" for cell in cells))
    return "\n".join(lines)


def draw(rows: dict[str, dict[str, float]], densities: dict[str, Tensor], saes: dict[str, TrainingSAE], file: Path):
    """FVU against pool factor, and histograms of how often latents fire."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colours = dict(zip(rows, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    one_pool = [name for name in rows if name != "batchtopk" and saes[name].cfg.pool_group_size is None]
    left.plot([saes[n].cfg.pool_factor for n in one_pool], [rows[n]["FVU"] for n in one_pool], color="0.7", zorder=1)
    for name, row in rows.items():
        if name == "batchtopk":
            left.axhline(row["FVU"], color=colours[name], linestyle="--", label=name)
        else:
            marker = "o" if name in one_pool else "D"
            left.scatter(saes[name].cfg.pool_factor, row["FVU"], color=colours[name], marker=marker, label=name, s=50)
    left.set(xscale="log", xlabel="pool factor", ylabel="FVU on held-out text", ylim=(0, None))
    left.set_xticks([1.5, 4, 16], ["1.5", "4", "16"])
    left.minorticks_off()
    left.legend(fontsize=8, frameon=False)

    bins = torch.linspace(-4.25, 0, 18).tolist()
    for name, density in densities.items():
        firing = density[density > 0].log10()
        label = f"{name}: {len(firing)} of {len(density)}"
        right.hist(firing.numpy(), bins=bins, histtype="step", linewidth=1.5, color=colours[name], label=label)
    right.set(xlabel="log10 of the share of tokens a latent fires on", ylabel="latents that fire")
    right.set_ylim(0, 1.45 * right.get_ylim()[1])  # room for the legend
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LM), help="smollm2, a Hub name or a folder; sets other defaults")
    parser.add_argument("--dataset", default=str(TINY_LM / "text"), help="Hub name or folder with a validation split")
    parser.add_argument(
        "--hook", help="default: hook_resid_post of block 2 (bundled model), 10 (smollm2) or 6 (others)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--context-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("quickstart_output"))
    for name, value in TINY.items():
        text = f"default: {value} for the bundled model, {SMOLLM2[name]} for smollm2, else {PAPER[name]}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help=text)
    args = parser.parse_args()
    settings, block = {str(TINY_LM): (TINY, 2), "smollm2": (SMOLLM2, 10)}.get(args.model, (PAPER, 6))
    for name, value in (settings | {"hook": f"blocks.{block}.hook_resid_post"}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    args = parse_args()
    args.dtype = torch.float32
    if args.model == "smollm2":
        try:
            args.model, args.dtype = str(smollm2_folder()), torch.bfloat16  # also faster on a CPU
        except ValueError as error:
            sys.exit(str(error))
    model = TransformerBridge.boot_transformers(args.model, device=args.device, dtype=args.dtype)
    saes, seconds = train(args, model)
    batches = list(held_out_activations(args, model, saes["batchtopk"]).split(args.batch_size))
    rows, densities = {}, {}
    for name, sae in saes.items():
        row, densities[name] = evaluate(sae, batches)
        rows[name] = row | {"seconds": seconds[name]}
    n_tokens = sum(map(len, batches))
    print(f"\n{n_tokens:,} tokens of held-out text, after {args.steps:,} steps of {args.batch_size} tokens.")
    print("FVU and L0: the selection of training, over a whole batch; export: the saved SAE, token by token.\n")
    print(format_table(rows))
    print("\nReloaded in plain SAELens, without this package:")
    print(reload_without_plugin([args.output_dir / "saes" / name for name in saes], batches[0]))
    picture = args.output_dir / "quickstart.png"
    draw(rows, densities, saes, picture)
    print(f"Picture: {picture}")


if __name__ == "__main__":
    main()
