"""Tokens per second of a whole training run: language model, activation store, SAE, Adam; BatchTopK and Sampled-SAE.

    python eval/bench_end_to_end.py                     # the bundled model, some minutes on two CPU cores
    python eval/bench_end_to_end.py --model EleutherAI/pythia-160m-deduped --dataset monology/pile-uncopyrighted \
        --hook blocks.6.hook_resid_post --d-sae 65536 --k 64 --device cuda

Each side is a `LanguageModelSAETrainingRunner` of its own, in turns. The first step of a run fills the store and is not
counted, nor is saving.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    SAETrainer,
)
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_sampled import SampledTopKTrainingSAEConfig

sys.path.append(str(Path(__file__).parent.parent / "examples"))

from bundled import TINY_LM

RESULTS = Path(__file__).parent / "results"
SIDES: dict[str, dict[str, Any] | None] = {
    "SAELens BatchTopK": None,
    "all latents": {"pool_factor": 1e9},
    "groups of 16, factor 10": {"pool_factor": 10, "pool_group_size": 16},
    "one pool, factor 5": {"pool_factor": 5},
}


def tokens_per_second(side: str, args: argparse.Namespace, model: TransformerBridge) -> float:
    shared = {"d_in": model.cfg.d_model, "d_sae": args.d_sae, "k": args.k, "aux_loss_coefficient": 1 / 32}
    fields = SIDES[side]
    sae = (
        BatchTopKTrainingSAEConfig(**shared, device=args.device)
        if fields is None
        else SampledTopKTrainingSAEConfig(**shared, device=args.device, **fields)
    )
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        model_name=args.model,
        hook_name=args.hook,
        dataset_path=args.dataset,
        context_size=128,
        training_tokens=args.steps * args.batch_size,
        train_batch_size_tokens=args.batch_size,
        store_batch_size_prompts=32,
        n_batches_in_buffer=16,
        is_dataset_tokenized=False,
        lr=3e-4,
        device=args.device,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    ends: list[float] = []
    step = SAETrainer.step

    def timed(trainer: SAETrainer, batch: torch.Tensor):
        output = step(trainer, batch)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return output

    with mock.patch.object(SAETrainer, "step", timed), open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
        LanguageModelSAETrainingRunner(cfg, override_model=model).run()
    return (len(ends) - 1) * args.batch_size / (ends[-1] - ends[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LM))
    parser.add_argument("--dataset", default=str(TINY_LM / "text"))
    parser.add_argument("--hook", default="blocks.2.hook_resid_post")
    parser.add_argument("--device", default="cpu")
    for name, value in {"d_sae": 8192, "k": 32, "batch_size": 2048, "steps": 40, "repeats": 3}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    model = TransformerBridge.boot_transformers(args.model, device=args.device)
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(args.repeats):
        for side, values in rates.items():
            values.append(tokens_per_second(side, args, model))
    medians = {side: statistics.median(values) for side, values in rates.items()}
    name = "bench_end_to_end" + ("" if args.device == "cpu" else f"_{args.device.replace(':', '_')}")
    settings = {field: value for field, value in vars(args).items() if isinstance(value, int)}
    results = {"settings": settings, "tokens_per_second": medians}
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    for side, median in medians.items():
        print(f"{side:24} {median:10,.0f} tokens/s   {median / medians['SAELens BatchTopK']:.2f}x")


if __name__ == "__main__":
    main()
