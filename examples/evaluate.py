"""From training to the report: two seeds of BatchTopK and of Sampled-SAE through SAEBench, offline, in a few minutes.

    python examples/evaluate.py

Trains on the small language model in `examples/tiny_lm`, runs SAEBench's core, sparse probing and absorption and the
cross-seed MMCS, and writes `evaluate_output/report.html` and `report.md`. Needs the `eval` extra. On other models and
with SAEBench's own data sets: `sae-lens-sampled eval --help`.
"""

import argparse
import shutil
import sys
import warnings
from pathlib import Path

import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
)
from sae_lens.saes.sae import TrainingSAE
from transformer_lens.model_bridge import TransformerBridge

from bundled import HELD_OUT_TEXT, PROBING_DATASETS, TINY_LM
from sae_lens_sampled import SampledTopKTrainingSAEConfig
from sae_lens_sampled.saebench import run_evals, write_report

HOOK = "blocks.2.hook_resid_post"
OVERRIDES = {
    "core": {"n_eval_reconstruction_batches": 4, "n_eval_sparsity_variance_batches": 20},
    # By default absorption needs probes that find 20 first letters, which takes a model of two billion parameters.
    "absorption": {"min_feats_for_eval": 10, "max_k_value": 3, "k_sparse_probe_num_epochs": 20},
}


def train(seed: int, args: argparse.Namespace, model: TransformerBridge) -> dict[str, TrainingSAE]:
    """Both SAEs on the same activations in the same order."""
    torch.manual_seed(seed)
    shared = {"d_in": 128, "d_sae": args.d_sae, "k": args.k, "aux_loss_coefficient": 1 / 32}
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            f"batchtopk_seed{seed}": BatchTopKTrainingSAEConfig(**shared),
            f"sampled_topk_seed{seed}": SampledTopKTrainingSAEConfig(**shared, pool_factor=4, pool_group_size=16),
        },
        hook_names=HOOK,
        model_name=str(TINY_LM),
        dataset_path=str(TINY_LM / "text"),
        context_size=128,
        training_tokens=args.steps * 1024,
        train_batch_size_tokens=1024,
        store_batch_size_prompts=32,
        n_batches_in_buffer=16,
        exclude_special_tokens=True,
        lr=2e-3,
        lr_warm_up_steps=args.steps // 20,
        lr_decay_steps=args.steps // 5,
        dead_feature_window=100,
        seed=seed,
        checkpoint_path=None,
        output_path=str(args.output_dir / "saes"),
        logger=LoggingConfig(log_to_wandb=False),
    )
    return MultiSAETrainingRunner(cfg, override_model=model).run()


def held_out_text(folder: Path) -> Path:
    """The validation split as a data set of its own: core reads the split `train`, which these SAEs were trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(HELD_OUT_TEXT, folder / "train.jsonl")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--output-dir", type=Path, default=Path("evaluate_output"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")  # deprecation warnings from dependencies
    model = TransformerBridge.boot_transformers(str(TINY_LM), device="cpu")
    # Given training SAEs, `run_evals` evaluates their exports and, for comparison, the selection of training.
    saes = [pair for seed in range(args.seeds) for pair in train(seed, args, model).items()]
    try:
        run_evals(
            saes,
            ["core", "sparse_probing", "absorption", "mmcs"],
            TINY_LM,
            args.output_dir,
            text=held_out_text(args.output_dir / "text"),
            probing_datasets=PROBING_DATASETS,
            overrides=OVERRIDES,
        )
    except ValueError as error:  # --output-dir holds results of other settings
        sys.exit(str(error))
    report = write_report(args.output_dir)
    print(report.with_suffix(".md").read_text())
    print(f"Report: {report}")


if __name__ == "__main__":
    main()
