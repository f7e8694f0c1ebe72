"""Transcoders of an MLP, with BatchTopK, pools for groups of 16 tokens and skip connections, and an SAE on its output.

    python examples/transcoder.py

trains on the MLP in the last block of the small language model in `examples/tiny_lm`, offline, in two minutes on two
CPU cores. On another model and data set from the Hugging Face Hub, with a larger dictionary (needs a GPU):

    python examples/transcoder.py --model EleutherAI/pythia-160m-deduped --dataset monology/pile-uncopyrighted \
        --block 6 --d-sae 16384 --k 64 --steps 20000 --device cuda
"""

import argparse
import subprocess
import sys
from contextlib import nullcontext
from math import ceil
from pathlib import Path

import torch
from datasets import load_dataset
from sae_lens import SAE, ActivationsStore, LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens.model_bridge import TransformerBridge

from bundled import TINY_LM
from sae_lens_sampled import (
    DataParallelRunner,
    SampledTopKTrainingSAEConfig,
    SampledTopKTranscoderConfig,
    TranscoderRunner,
    as_sae_on_outputs,
)
from sae_lens_sampled.runners.progress import live_bar


def configs(args: argparse.Namespace, width: int, hook_out: str) -> dict[str, TrainingSAEConfig]:
    """The transcoders read the MLP's input and reconstruct its output; the SAE reads the output itself."""
    shared = {"d_in": width, "d_sae": args.d_sae, "k": args.k, "device": args.device}
    groups = {"pool_factor": 10, "pool_group_size": 16}
    transcoders = {
        "transcoder": {},
        "transcoder, groups of 16": groups,
        "transcoder, skip": {"skip": True},
        "transcoder, skip, groups of 16": {"skip": True, **groups},
    }
    saes: dict[str, TrainingSAEConfig] = {
        name: SampledTopKTranscoderConfig(hook_name_out=hook_out, **shared, **fields)
        for name, fields in transcoders.items()
    }
    # With a pool of all latents, sampled_topk is BatchTopK.
    return saes | {"SAE on the output": SampledTopKTrainingSAEConfig(pool_factor=None, **shared)}


def train(
    args: argparse.Namespace, model: TransformerBridge, sae: TrainingSAEConfig, hook_name: str, folder: Path
) -> None:
    """Train an SAE or a transcoder on the activations at `hook_name`, and export it to the folder."""
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        hook_name=hook_name,
        model_name=args.model,
        dataset_path=args.dataset,
        is_dataset_tokenized=False,
        context_size=args.context_size,
        training_tokens=args.steps * args.batch_size,
        train_batch_size_tokens=args.batch_size,
        store_batch_size_prompts=32,
        n_batches_in_buffer=2 * ceil(args.batch_size / args.context_size),  # in prompts: two batches of tokens
        exclude_special_tokens=True,
        lr=args.lr,
        lr_warm_up_steps=args.steps // 20,
        lr_decay_steps=args.steps // 5,
        dead_feature_window=100,
        device=args.device,
        checkpoint_path=None,
        output_path=str(folder),
        logger=LoggingConfig(log_to_wandb=False),
        verbose=False,
    )
    torch.manual_seed(0)  # so that all train on the same tokens
    runner = TranscoderRunner if isinstance(sae, SampledTopKTranscoderConfig) else DataParallelRunner
    with live_bar():
        runner(cfg, override_model=model).run()


def evaluate(args: argparse.Namespace, model: TransformerBridge, folder: Path) -> dict[str, float]:
    """SAELens' FVU, L0 and share of the loss kept (`ce_loss_score`) when the output is replaced, on held-out text."""
    sae = SAE.load_from_disk(folder, device=args.device)
    text = load_dataset(args.dataset, split="validation", streaming=True)
    store = ActivationsStore.from_sae(model, sae, text, store_batch_size_prompts=16, device=args.device)
    config = EvalConfig(
        n_eval_reconstruction_batches=args.eval_batches,
        n_eval_sparsity_variance_batches=args.eval_batches,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    with nullcontext(sae) if sae.cfg.metadata.hook_name_out is None else as_sae_on_outputs(sae, model) as view:
        metrics, _ = run_evals(view, store, model, ActivationScaler(), config)
    return {
        "FVU": 1 - metrics["reconstruction_quality"]["explained_variance"],
        "L0": metrics["sparsity"]["l0"],
        "loss kept": metrics["model_performance_preservation"]["ce_loss_score"],
    }


RELOAD = """
import sys, torch
from sae_lens import SAE
for folder in sys.argv[1:]:
    sae = SAE.load_from_disk(folder)
    out = sae(torch.randn(5, sae.cfg.d_in))
    print(f"  {folder}: {sae.cfg.architecture()}, {sae.cfg.d_in} to {out.shape[1]} dimensions")
assert "sae_lens_sampled" not in sys.modules
"""


def parser(description: str | None, output_dir: Path) -> argparse.ArgumentParser:
    """The argument parser of all scripts that train transcoders."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LM), help="a Hub name or a folder")
    parser.add_argument("--dataset", default=str(TINY_LM / "text"), help="Hub name or folder with a validation split")
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--context-size", type=int, default=128)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=output_dir)
    return parser


def hooks(block: int) -> tuple[str, str]:
    """Hooks at the input of a block's MLP, normalised but before the layer norm's gain, and at its output."""
    return f"blocks.{block}.ln2.hook_normalized", f"blocks.{block}.hook_mlp_out"


def main() -> None:
    arguments = parser(__doc__, Path("transcoder_output"))
    arguments.add_argument("--block", type=int, default=3)
    arguments.add_argument("--eval-batches", type=int, default=10, help="evaluation batches, of 16 contexts each")
    args = arguments.parse_args()
    model = TransformerBridge.boot_transformers(args.model, device=args.device)
    hook_in, hook_out = hooks(args.block)
    folders = {}
    for name, sae in configs(args, model.cfg.d_model, hook_out).items():
        folders[name] = args.output_dir / name.replace(", ", "_").replace(" ", "_")
        train(args, model, sae, hook_in if name.startswith("transcoder") else hook_out, folders[name])
    rows = {name: evaluate(args, model, folder) for name, folder in folders.items()}
    print(f"\n{hook_out} of held-out text, after {args.steps:,} steps of {args.batch_size} tokens:\n")
    print(f"{'':32}{'FVU':>8}{'L0':>8}{'loss kept':>12}")
    for name, row in rows.items():
        print(f"{name:32}{row['FVU']:8.3f}{row['L0']:8.1f}{row['loss kept']:12.1%}")
    print("\nReloaded in plain SAELens, without this package:")
    command = [sys.executable, "-W", "ignore", "-c", RELOAD, *map(str, folders.values())]
    print(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
