"""The paper's run: one Sampled-SAE on layer 6 of Pythia-160M, in SAELens' own runner.

    python examples/train_pythia.py                 # one GPU, downloads model and text from the Hugging Face Hub
    python examples/train_pythia.py --smoke         # the same code on the bundled model, offline, in a minute on a CPU

Layer 6, batches of 4096 tokens, learning rate 3e-4, 50 000 steps and an auxiliary coefficient of 1/32 are the paper's
(arXiv 2508.21324). SAELens' auxiliary loss is not divided by the variance of the residual as in other trainers, so 1/32
is not the same quantity everywhere: give a BatchTopK baseline the same coefficient.
"""

import argparse

from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_sampled import SampledTopKTrainingSAEConfig


def runner_config(output_dir: str, log_to_wandb: bool) -> LanguageModelSAERunnerConfig[SampledTopKTrainingSAEConfig]:
    return LanguageModelSAERunnerConfig(
        sae=SampledTopKTrainingSAEConfig(d_in=768, d_sae=16384, k=64, pool_factor=5, aux_loss_coefficient=1 / 32),
        model_name="EleutherAI/pythia-160m-deduped",
        hook_name="blocks.6.hook_resid_post",
        dataset_path="monology/pile-uncopyrighted",
        is_dataset_tokenized=False,
        context_size=128,
        training_tokens=50_000 * 4096,
        train_batch_size_tokens=4096,
        n_batches_in_buffer=64,  # in prompts: two batches of tokens; SAELens' default 20 holds less than one
        lr=3e-4,
        lr_warm_up_steps=1000,
        lr_decay_steps=10_000,
        exclude_special_tokens=True,
        device="cuda",
        n_checkpoints=4,
        checkpoint_path=f"{output_dir}/checkpoints",
        output_path=f"{output_dir}/sae",
        logger=LoggingConfig(log_to_wandb=log_to_wandb, wandb_project="sampled-sae"),
    )


def smoke_config(output_dir: str) -> LanguageModelSAERunnerConfig[SampledTopKTrainingSAEConfig]:
    """The same run, scaled down to be short."""
    from bundled import TINY_LM  # here, so that a copy of this script needs no other file

    cfg = runner_config(output_dir, log_to_wandb=False)
    cfg.sae = SampledTopKTrainingSAEConfig(d_in=128, d_sae=512, k=16, pool_factor=5, aux_loss_coefficient=1 / 32)
    cfg.model_name, cfg.dataset_path, cfg.hook_name = str(TINY_LM), str(TINY_LM / "text"), "blocks.2.hook_resid_post"
    cfg.device = cfg.llm_device = cfg.act_store_device = "cpu"
    cfg.train_batch_size_tokens, cfg.training_tokens = 512, 100 * 512
    cfg.lr_warm_up_steps, cfg.lr_decay_steps = 5, 20
    return cfg


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="the bundled model and 100 small steps, on a CPU")
    parser.add_argument("--output-dir", default="pythia_output")
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases")
    args = parser.parse_args()
    cfg = smoke_config(args.output_dir) if args.smoke else runner_config(args.output_dir, args.wandb)
    # The bridge accepts Hub names and local folders; HookedTransformer rejects folders.
    model = TransformerBridge.boot_transformers(cfg.model_name, device=cfg.device)
    sae = LanguageModelSAETrainingRunner(cfg, override_model=model).run()
    print({name: round(value, 4) for name, value in sae.pool_statistics().items()})
    print(f"Load it anywhere with sae_lens.SAE.load_from_disk({cfg.output_path!r})")


if __name__ == "__main__":
    main()
