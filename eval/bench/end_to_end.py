"""Tokens per second of a whole training run, and the shares of its time spent in the SAE and the language model.

    python eval/bench/end_to_end.py                     # the bundled model, some minutes on two CPU cores
    python eval/bench/end_to_end.py --model smollm2     # a real model, in bfloat16
    python eval/bench/end_to_end.py --model EleutherAI/pythia-160m-deduped --dataset monology/pile-uncopyrighted \
        --hook blocks.6.hook_resid_post --d-sae 65536 --k 64 --device cuda

The cases take turns, each in its own `LanguageModelSAETrainingRunner`: with SAELens' activation store, and with
activations from a file (`activation_cache`), for which the language model ran once. The first step of a run, which
fills the store, is not counted, nor is saving.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, SAETrainer
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # instead of this script's folder, so that the packages in eval can be imported
sys.path.append(str(EVAL.parent / "examples"))

from bench.cases import ALL_LATENTS, BATCHTOPK, Case, groups, one_pool, sae_config
from bundled import TINY_LM
from sae_lens_sampled.runners.activation_cache import cache_activations, shuffled_batches, text_store
from smollm2 import smollm2_folder

RESULTS = EVAL / "results"
CASES = (BATCHTOPK, ALL_LATENTS, groups(10), one_pool(5))
DEFAULTS = {
    str(TINY_LM): {"hook": "blocks.2.hook_resid_post", "d_sae": 8192, "k": 32, "steps": 40},
    "smollm2": {"hook": "blocks.10.hook_resid_post", "d_sae": 4096, "k": 32, "steps": 20},
}


def measure(case: Case, args: argparse.Namespace, model: TransformerBridge, cached: Tensor | None) -> dict[str, float]:
    """Seconds for all steps except the first: in total, in the SAE's training steps and in the language model."""
    setting = {"d_in": model.cfg.d_model, "d_sae": args.d_sae, "k": args.k, "device": args.device}
    cfg = LanguageModelSAERunnerConfig(
        sae=sae_config(case, setting),
        model_name=args.model,
        hook_name=args.hook,
        dataset_path=args.dataset,
        context_size=128,
        training_tokens=args.steps * args.batch_size,
        train_batch_size_tokens=args.batch_size,
        store_batch_size_prompts=32,
        n_batches_in_buffer=2 * ceil(args.batch_size / 128),  # in prompts: two batches of tokens
        is_dataset_tokenized=False,
        lr=3e-4,
        device=args.device,
        checkpoint_path=None,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    seconds = {"all": 0.0, "sae": 0.0, "model": 0.0}
    ends: list[float] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*run_args: Any) -> Any:
            start = time.perf_counter()
            result = function(*run_args)
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            if ends:  # the first step is over
                seconds[name] += time.perf_counter() - start
            if name == "sae":
                ends.append(time.perf_counter())
            return result

        return run

    runner = LanguageModelSAETrainingRunner(cfg, override_model=model)
    if cached is not None:
        batches = shuffled_batches(cached, args.batch_size, seed=0)
        runner.activations_store.get_data_loader = lambda: batches  # type: ignore[method-assign]
    with (
        mock.patch.object(SAETrainer, "step", timed("sae", SAETrainer.step)),
        mock.patch.object(ActivationsStore, "get_activations", timed("model", ActivationsStore.get_activations)),
        open(os.devnull, "w") as null,
        contextlib.redirect_stderr(null),
    ):
        runner.run()
    return seconds | {"all": ends[-1] - ends[0]}


def write_file(args: argparse.Namespace, model: TransformerBridge, folder: Path) -> tuple[Tensor, float]:
    """Write activations to a file; returns them, and the tokens per second at which they were written."""
    store = text_store(model, args.dataset, args.hook, model.cfg.d_model, device=args.device)
    n_tokens, start = args.steps * args.batch_size, time.perf_counter()
    activations = cache_activations(store, n_tokens, folder, settings={})
    return activations, n_tokens / (time.perf_counter() - start)


def main() -> None:
    args = parse_args()
    path, dtype = (smollm2_folder(), torch.bfloat16) if args.model == "smollm2" else (args.model, torch.float32)
    model = TransformerBridge.boot_transformers(str(path), device=args.device, dtype=dtype)
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    with TemporaryDirectory() as scratch:
        cached, written_per_second = write_file(args, model, Path(scratch))
        for _ in range(args.repeats):
            for case in CASES:
                for source, activations in (("store", None), ("file", cached)):
                    runs.setdefault((case.name, source), []).append(measure(case, args, model, activations))
    n_tokens = (args.steps - 1) * args.batch_size
    rows = []
    for (side, source), seconds in runs.items():
        median = {part: statistics.median(run[part] for run in seconds) for part in seconds[0]}
        rows.append(
            {
                "side": side,
                "source": source,
                "tokens_per_second": n_tokens / median["all"],
                "sae_share": median["sae"] / median["all"],
                "model_share": median["model"] / median["all"],
            }
        )
    name = args.model if args.model in DEFAULTS and args.model != str(TINY_LM) else ""
    name = "_".join(filter(None, ("bench_end_to_end", name, "" if args.device == "cpu" else args.device)))
    settings = {field: value for field, value in vars(args).items() if isinstance(value, int)}
    results = {"settings": settings, "written_per_second": written_per_second, "runs": rows}
    file = args.out or RESULTS / f"{name.replace(':', '_')}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['side']:24} {row['source']:6} {row['tokens_per_second']:10,.0f} tokens/s; share of time: SAE "
            f"{row['sae_share']:.0%}, model {row['model_share']:.0%}"
        )


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(TINY_LM), help="smollm2, a Hub name or a folder")
    parser.add_argument("--dataset", default=str(TINY_LM / "text"))
    parser.add_argument("--hook")
    parser.add_argument("--device", default="cpu")
    for name, value in {"d_sae": None, "k": None, "steps": None, "batch_size": 2048, "repeats": 3}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--out", type=Path, help="JSON file; default: in eval/results")
    args = parser.parse_args(arguments)
    for name, value in DEFAULTS.get(args.model, DEFAULTS[str(TINY_LM)]).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    main()
