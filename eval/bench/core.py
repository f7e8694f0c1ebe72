"""How much time do shared passes of the language model save? Core metrics of 8 SAEs against 8 runs of SAEBench's core.

    python eval/bench/core.py

Untrained SAEs on the bundled language model: time does not depend on the weights. Both parts of core get batches in the
proportion that SAEBench's documentation has, 1 to 10. Both sides run in turns in one process; the ratio of the medians
is what counts.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import sae_bench.evals.core.main as core
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # a script finds its own folder, not the package that the folder is
sys.path.append(str(EVAL.parent / "examples"))

from bundled import TINY_LM
from sae_lens_sampled.saebench import run_evals


def jumprelu(seed: int, d_sae: int) -> JumpReLUSAE:
    metadata = SAEMetadata(
        model_name=str(TINY_LM), hook_name="blocks.2.hook_resid_post", context_size=128, prepend_bos=False
    )
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=128, d_sae=d_sae, metadata=metadata))
    generator = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(d_sae, 128, generator=generator), dim=1)
    threshold = torch.full((d_sae,), 8.0)
    sae.load_state_dict(
        {
            "W_enc": w_dec.T,
            "W_dec": w_dec,
            "b_enc": torch.zeros(d_sae),
            "b_dec": torch.zeros(128),
            "threshold": threshold,
        }
    )
    return sae


def by_hand(saes: dict[str, JumpReLUSAE], folder: Path, n_reconstruction: int, n_sparsity: int) -> None:
    """One run of core per SAE, as SAEBench's own command line does it."""
    for name, sae in saes.items():
        core.multiple_evals(
            [(name, sae)],
            n_eval_reconstruction_batches=n_reconstruction,
            n_eval_sparsity_variance_batches=n_sparsity,
            eval_batch_size_prompts=16,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            exclude_special_tokens_from_reconstruction=True,
            dataset=str(TINY_LM / "text"),
            output_folder=str(folder),
            device="cpu",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n-saes", type=int, default=8)
    parser.add_argument("--d-sae", type=int, default=256)
    parser.add_argument("--reconstruction-batches", type=int, default=4)
    parser.add_argument("--sparsity-batches", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    OFFICIAL_MODEL_NAMES.append(str(TINY_LM))
    counts = (args.reconstruction_batches, args.sparsity_batches)
    seconds: dict[str, list[float]] = {"by hand": [], "shared": []}
    for _ in range(args.repeats):
        for way in seconds:
            saes = {f"sae_{i}": jumprelu(i, args.d_sae) for i in range(args.n_saes)}
            with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
                start = time.perf_counter()
                with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                    if way == "by hand":
                        by_hand(saes, Path(folder), *counts)
                    else:
                        run_evals(
                            list(saes.items()),
                            ["core"],
                            TINY_LM,
                            folder,
                            text=TINY_LM / "text",
                            overrides={
                                "core": {
                                    "n_eval_reconstruction_batches": counts[0],
                                    "n_eval_sparsity_variance_batches": counts[1],
                                }
                            },
                            show_progress=False,
                        )
                seconds[way].append(time.perf_counter() - start)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    for way, median in medians.items():
        print(f"{way:8} {median:6.1f} s   ({', '.join(f'{value:.1f}' for value in seconds[way])})")
    print(f"ratio    {medians['shared'] / medians['by hand']:.3f}")


if __name__ == "__main__":
    main()
