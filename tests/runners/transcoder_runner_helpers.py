"""Config for training runs of transcoders on an MLP of the bundled model."""

from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig

from sae_lens_sampled import SampledTopKTranscoderConfig

IN, OUT = "gpt_neox.layers.2.post_attention_layernorm", "gpt_neox.layers.2.mlp"
BRIDGED_IN, BRIDGED_OUT = "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"


def runner_config(tiny_lm, **fields):
    sae = {
        name: fields.pop(name) for name in ("skip", "pool_factor", "pool_group_size", "d_in", "d_out") if name in fields
    }
    sae = {"d_in": 128, "d_sae": 256, "k": 8, "hook_name_out": fields.pop("hook_name_out", OUT), **sae}
    given = {
        "sae": SampledTopKTranscoderConfig(**sae),
        "model_name": str(tiny_lm),
        "model_class_name": "AutoModelForCausalLM",
        "hook_name": IN,
        "dataset_path": str(tiny_lm / "text"),
        "is_dataset_tokenized": False,
        "prepend_bos": False,
        "context_size": 48,
        "training_tokens": 256 * 8,
        "train_batch_size_tokens": 256,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 16,
        "n_eval_batches": 2,
        "lr": 2e-3,
        "dead_feature_window": 20,
        "checkpoint_path": None,
        "output_path": None,
        "verbose": False,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return LanguageModelSAERunnerConfig(**given | fields)
