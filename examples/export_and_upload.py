"""From a training checkpoint to an SAE that anyone can load: thresholds, calibration, pruning, the Hub.

    python examples/export_and_upload.py                       # trains briefly, writes what would be uploaded
    python examples/export_and_upload.py --repo-id you/my-sae  # and uploads it (needs `hf auth login`)

Offline by default, in about a minute on two CPU cores.
"""

import argparse
import dataclasses
from pathlib import Path

from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from transformer_lens.model_bridge import TransformerBridge

from bundled import TINY_LM
from sae_lens_sampled import (
    SampledTopKTrainingSAEConfig,
    calibrate_thresholds,
    load_checkpoint,
    to_jumprelu,
    upload_to_hub,
)

BATCH = 1024


def train(folder: Path) -> LanguageModelSAETrainingRunner:
    """A short run that leaves a training checkpoint, as any run of SAELens does."""
    cfg = LanguageModelSAERunnerConfig(
        sae=SampledTopKTrainingSAEConfig(d_in=128, d_sae=512, k=16, pool_factor=4, pool_group_size=16),
        model_name=str(TINY_LM),
        hook_name="blocks.2.hook_resid_post",
        dataset_path=str(TINY_LM / "text"),
        is_dataset_tokenized=False,
        exclude_special_tokens=True,
        training_tokens=150 * BATCH,
        train_batch_size_tokens=BATCH,
        lr=2e-3,
        checkpoint_path=str(folder / "checkpoints"),
        save_final_checkpoint=True,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    runner = LanguageModelSAETrainingRunner(cfg, override_model=TransformerBridge.boot_transformers(str(TINY_LM)))
    runner.run()
    return runner


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo-id", help="Hub repository to upload to; without it, nothing leaves this machine")
    parser.add_argument("--output-dir", type=Path, default=Path("export_output"))
    args = parser.parse_args()
    runner = train(args.output_dir)
    (checkpoint,) = Path(runner.cfg.checkpoint_path).glob("final_*")

    sae = load_checkpoint(checkpoint)
    learnt = to_jumprelu(sae)  # the thresholds found in training; what the runners save
    batches = runner.activations_store
    calibrated, report = calibrate_thresholds(sae, batches, max_tokens=30_000)  # quantiles over given tokens
    sparser, _ = calibrate_thresholds(sae, batches, target_l0=8, max_tokens=30_000)  # another L0, to compare SAEs at
    pruned = to_jumprelu(sae, prune=True)  # without the latents that never fire
    for name, value in dataclasses.asdict(report).items():
        print(f"{name:18} {value:,.4g}")

    saes = {"learnt": learnt, "calibrated": calibrated, "l0_8": sparser, "pruned": pruned}
    evaluation = {
        "learnt": {"l0": report.l0_before, "fvu": report.fvu_before},
        "calibrated": {"l0": report.l0_after, "fvu": report.fvu_after},
    }
    staged = args.output_dir / "for_the_hub"
    upload_to_hub(saes, args.repo_id or "you/my-sae", evaluation=evaluation, dry_run_folder=staged)
    print(f"Model card and folders as they would be uploaded: {staged}")
    if args.repo_id:
        upload_to_hub(saes, args.repo_id, evaluation=evaluation)


if __name__ == "__main__":
    main()
