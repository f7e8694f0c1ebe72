"""How much time shared model passes save: core metrics of 8 SAEs at once against 8 runs of SAEBench's core.

    python eval/bench/core.py

The SAEs are untrained, on the bundled language model: time does not depend on the weights. The two parts of core get
batches in the ratio of SAEBench's documentation, 1 to 10. Both ways alternate in one process; only the ratio of the
medians counts.
"""

import contextlib
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import sae_bench.evals.core.main as core
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # instead of this script's folder, so that the packages in eval can be imported
sys.path.append(str(EVAL.parent / "examples"))

from bundled import TINY_LM
from sae_lens_sampled.saebench import run_evals

N_SAES, D_SAE, REPEATS = 8, 256, 3
BATCHES: dict[str, Any] = {"n_eval_reconstruction_batches": 4, "n_eval_sparsity_variance_batches": 40}


def jumprelu(seed: int) -> JumpReLUSAE:
    metadata = SAEMetadata(
        model_name=str(TINY_LM), hook_name="blocks.2.hook_resid_post", context_size=128, prepend_bos=False
    )
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=128, d_sae=D_SAE, metadata=metadata))
    generator = torch.Generator().manual_seed(seed)
    w_dec = torch.nn.functional.normalize(torch.randn(D_SAE, 128, generator=generator), dim=1)
    biases = {"b_enc": torch.zeros(D_SAE), "b_dec": torch.zeros(128)}
    sae.load_state_dict({"W_enc": w_dec.T, "W_dec": w_dec, "threshold": torch.full((D_SAE,), 8.0), **biases})
    return sae


def by_hand(saes: dict[str, JumpReLUSAE], folder: Path) -> None:
    """One run of core per SAE, as from SAEBench's own command line."""
    for name, sae in saes.items():
        core.multiple_evals(
            [(name, sae)],
            **BATCHES,
            eval_batch_size_prompts=16,
            compute_featurewise_density_statistics=True,
            compute_featurewise_weight_based_metrics=True,
            exclude_special_tokens_from_reconstruction=True,
            dataset=str(TINY_LM / "text"),
            output_folder=str(folder),
            device="cpu",
        )


def main() -> None:
    warnings.filterwarnings("ignore")
    OFFICIAL_MODEL_NAMES.append(str(TINY_LM))
    seconds: dict[str, list[float]] = {"by hand": [], "shared": []}
    for _ in range(REPEATS):
        for way in seconds:
            saes = {f"sae_{i}": jumprelu(i) for i in range(N_SAES)}
            with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
                start = time.perf_counter()
                with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                    if way == "by hand":
                        by_hand(saes, Path(folder))
                    else:
                        run_evals(
                            list(saes.items()),
                            ["core"],
                            TINY_LM,
                            folder,
                            text=TINY_LM / "text",
                            overrides={"core": BATCHES},
                            show_progress=False,
                        )
                seconds[way].append(time.perf_counter() - start)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    for way, median in medians.items():
        print(f"{way:8} {median:6.1f} s   ({', '.join(f'{value:.1f}' for value in seconds[way])})")
    print(f"ratio    {medians['shared'] / medians['by hand']:.3f}")


if __name__ == "__main__":
    main()
