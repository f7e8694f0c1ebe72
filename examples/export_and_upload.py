"""From a training checkpoint to an SAE that anyone can load: thresholds, calibration, pruning, the Hub.

    python examples/export_and_upload.py                       # trains briefly, writes what would be uploaded
    python examples/export_and_upload.py --repo-id you/my-sae  # and uploads it (needs `hf auth login`)

Offline by default, in about a minute on two CPU cores. A later call reuses the checkpoint, and skips files that are
already on the Hub.
"""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import torch
from sae_lens import ActivationsStore, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.constants import RUNNER_CFG_FILENAME
from transformer_lens.model_bridge import TransformerBridge

from bundled import TINY_LM
from sae_lens_sampled import (
    HubError,
    SampledTopKTrainingSAEConfig,
    calibrate_thresholds,
    load_checkpoint,
    to_jumprelu,
    upload_to_hub,
)

BATCH = 1024


def runner_config(folder: Path, steps: int) -> LanguageModelSAERunnerConfig[SampledTopKTrainingSAEConfig]:
    """A short run that leaves a training checkpoint, as any SAELens run does with `save_final_checkpoint`."""
    return LanguageModelSAERunnerConfig(
        sae=SampledTopKTrainingSAEConfig(d_in=128, d_sae=512, k=16, pool_factor=4, pool_group_size=16),
        model_name=str(TINY_LM),
        hook_name="blocks.2.hook_resid_post",
        dataset_path=str(TINY_LM / "text"),
        is_dataset_tokenized=False,
        exclude_special_tokens=True,
        training_tokens=steps * BATCH,
        train_batch_size_tokens=BATCH,
        lr=2e-3,
        checkpoint_path=str(folder),
        save_final_checkpoint=True,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )


def final_checkpoints(folder: Path, steps: int) -> list[Path]:
    """The finished training checkpoints of runs with this many steps."""
    return [file.parent for file in folder.glob(f"*/final_{steps * BATCH}/{RUNNER_CFG_FILENAME}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo-id", help="Hub repository to upload to; without it, nothing leaves this machine")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--max-tokens", type=int, default=30_000, help="tokens to calibrate on")
    parser.add_argument("--output-dir", type=Path, default=Path("export_output"))
    args = parser.parse_args()
    model = TransformerBridge.boot_transformers(str(TINY_LM), device="cpu")
    folder = args.output_dir / "checkpoints"
    cfg = runner_config(folder, args.steps)
    if not final_checkpoints(folder, args.steps):
        LanguageModelSAETrainingRunner(cfg, override_model=model).run()

    sae = load_checkpoint(final_checkpoints(folder, args.steps)[0])
    learnt = to_jumprelu(sae)  # with the thresholds found in training, as the runners save it
    batches = ActivationsStore.from_config(model, cfg)
    torch.manual_seed(0)  # the seed for mixing the batches
    # Thresholds from quantiles over the given tokens; then for a target L0, to compare SAEs at equal L0.
    calibrated, report = calibrate_thresholds(sae, batches, max_tokens=args.max_tokens)
    sparser, _ = calibrate_thresholds(sae, batches, target_l0=8, max_tokens=args.max_tokens)
    pruned = to_jumprelu(sae, prune=True)  # without the latents that never fire
    for name, value in dataclasses.asdict(report).items():
        print(f"{name:22} " + ("unknown" if value is None else f"{value:,.4g}"))

    saes = {"learnt": learnt, "calibrated": calibrated, "l0_8": sparser, "pruned": pruned}
    evaluation = {
        "learnt": {"l0": report.l0_before, "fvu": report.fvu_before},
        "calibrated": {"l0": report.l0_after, "fvu": report.fvu_after},
    }
    staged = args.output_dir / "for_the_hub"
    shutil.rmtree(staged, ignore_errors=True)  # of an earlier call
    try:
        upload_to_hub(saes, args.repo_id or "you/my-sae", evaluation=evaluation, dry_run_folder=staged)
        print(f"Model card and folders as they would be uploaded: {staged}")
        if args.repo_id:
            print(f"Uploaded to {upload_to_hub(saes, args.repo_id, evaluation=evaluation)}")
    except (ValueError, HubError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
