"""A page of the ten most specialised latents of an SAE on the bundled model, made by sae-dashboard.

    python examples/dashboard.py      # needs the `dashboard` extra, in an environment of its own: examples/README.md

trains briefly and writes `dashboard_output/dashboard.html`, offline, in about a minute on two CPU cores; the page
loads D3 and Plotly when opened. Of the latents that fire at least `MIN_FIRINGS` times on held-out text, it shows those
with the highest `entropy` score, the paper's measure of specialisation: most of their activation is on few tokens.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, ActivationsStore, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import OFFICIAL_MODEL_NAMES

from bundled import TINY_LM
from sae_lens_sampled import SampledTopKTrainingSAEConfig
from sae_lens_sampled.step.scores import entropy

HOOK = "blocks.2.hook_resid_post"
BATCH = 1024
N_LATENTS = 10
MIN_FIRINGS = 50


def load_model() -> HookedTransformer:
    """The bundled model. For a model from the Hub its name suffices, which TransformerLens already knows."""
    OFFICIAL_MODEL_NAMES.append(str(TINY_LM))
    return HookedTransformer.from_pretrained_no_processing(str(TINY_LM), device="cpu")


def train(model: HookedTransformer, steps: int, folder: Path) -> SAE:
    """Train briefly, and return the JumpReLU SAE that the run saves in `folder`."""
    cfg = LanguageModelSAERunnerConfig(
        sae=SampledTopKTrainingSAEConfig(d_in=128, d_sae=1024, k=16, pool_factor=10, pool_group_size=16),
        model_name=str(TINY_LM),
        hook_name=HOOK,
        dataset_path=str(TINY_LM / "text"),
        is_dataset_tokenized=False,
        exclude_special_tokens=True,
        training_tokens=steps * BATCH,
        train_batch_size_tokens=BATCH,
        lr=2e-3,
        lr_decay_steps=steps // 5,
        checkpoint_path=None,
        output_path=str(folder),
        logger=LoggingConfig(log_to_wandb=False),
    )
    LanguageModelSAETrainingRunner(cfg, override_model=model).run()
    return SAE.load_from_disk(folder)


def held_out_tokens(model: HookedTransformer, sae: SAE) -> Tensor:
    """Tokens from the data set's validation split, shape (prompts, context size)."""
    dataset = load_dataset(str(TINY_LM / "text"), split="validation", streaming=True)
    store = ActivationsStore.from_sae(model, sae, dataset=dataset, context_size=128, store_batch_size_prompts=32)
    return torch.cat([store.get_batch_tokens() for _ in range(8)])


@torch.no_grad()
def most_telling(sae: SAE, model: HookedTransformer, tokens: Tensor) -> list[int]:
    """The latents with the most concentrated activation, among those that fire often enough to judge."""
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
    acts = sae.encode(cache[HOOK])[:, 1:].flatten(0, 1)  # without <|endoftext|>, on which the SAE is not trained
    firing = ((acts > 0).sum(dim=0) >= MIN_FIRINGS).nonzero()[:, 0]
    score = entropy(acts[:, firing], N_LATENTS)
    return firing[score.topk(min(N_LATENTS, len(firing))).indices].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output-dir", type=Path, default=Path("dashboard_output"))
    args = parser.parse_args()
    model = load_model()
    sae = train(model, args.steps, args.output_dir / "sae")
    tokens = held_out_tokens(model, sae)
    latents = most_telling(sae, model, tokens)
    cfg = SaeVisConfig(hook_point=HOOK, features=latents, ignore_positions=[0])
    page = args.output_dir / "dashboard.html"
    save_feature_centric_vis(SaeVisRunner(cfg).run(encoder=sae, model=model, tokens=tokens), page)
    print(f"Latents {', '.join(map(str, latents))} of {sae.cfg.d_sae}, on {tokens.numel():,} tokens: {page}")


if __name__ == "__main__":
    main()
