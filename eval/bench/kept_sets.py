"""Does the bfloat16 scan keep the same entries as a float32 step? Counted over a training run.

    python eval/bench/kept_sets.py    # eval/results/kept_sets.json, for eval/SPEED.md; ten minutes on two cores

An SAE with a pool of all latents trains on activations of the bundled language model, at the size "large" of
`cases.py`, and scans in bfloat16. In every step, the kept entries are compared with two selections among all entries by
their float32 values: one uses values from the products that compute the kept values, the other uses values from the
dense product of a step without a scan.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # instead of this script's folder, so that the packages in eval can be imported

from bench.cases import ALL_LATENTS, SIZES, Setting, sae_config
from bench.training_step import RESULTS, make_trainer, real_batches
from sae_lens_sampled import SampledTopKTrainingSAE
from sae_lens_sampled.step.products import products_at

NEAR = 1e-3
"""Relative distance below the cutoff down to which entries are recomputed; far larger than the difference between an
entry's two float32 values, so that no entry further below can be kept."""


def compare_kept_sets(setting: Setting, n_steps: int) -> dict[str, Any]:
    """Count the entries that a training run keeps, and those of them that two float32 selections would not keep."""
    torch.manual_seed(0)
    case = ALL_LATENTS._replace(fields=ALL_LATENTS.fields | {"scan": "reduced", "step": "kept"})
    sae = SampledTopKTrainingSAE(sae_config(case, setting))
    trainer, batches = make_trainer(sae, setting, lr=1e-3), real_batches(setting)
    found: dict[str, Any] = {"case": setting, "steps": n_steps, "kept": 0, "not_in_same_products": 0, "not_in_dense": 0}
    farthest = 0.0
    for _ in tqdm(range(n_steps), leave=False):
        x = next(batches)
        by_products, by_dense, dense = float32_choices(sae, x)
        kept = flat_places(trainer.step(x).feature_acts)
        found["kept"] += len(kept)
        found["not_in_same_products"] += len(difference(kept, by_products))
        others = difference(kept, by_dense)
        found["not_in_dense"] += len(others)
        cutoff = dense[by_dense].min()
        farthest = max(farthest, *((dense[others] - cutoff).abs() / cutoff).tolist(), 0.0)
    return found | {"farthest_from_cutoff": farthest, "extracted_per_kept": sae.scan_record["extracted_per_kept"]}


@torch.no_grad()
def float32_choices(sae: SampledTopKTrainingSAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The batch's largest entries, k per token on average: by the kept entries' products, and by a dense product.

    Returns the flat indices of both selections, and all values of the dense product.
    """
    weights, inputs = sae.weights(), sae.process_sae_in(x)
    dense, n_keep = weights.hidden_pre(inputs).flatten(), int(sae.cfg.k * len(x))
    by_dense = dense.topk(n_keep).indices
    near = (dense > (1 - NEAR) * dense[by_dense].min()).nonzero()[:, 0]
    latents, order = (near % sae.cfg.d_sae).sort(stable=True)
    tokens = near[order] // sae.cfg.d_sae
    values = products_at(weights.W_enc.T.contiguous(), inputs, latents, tokens) + weights.b_enc[latents]
    values = values if weights.norms is None else values * weights.norms[latents]
    return near[order][values >= values.topk(n_keep).values[-1]], by_dense, dense  # with all ties at the cutoff


def flat_places(feature_acts: Tensor) -> Tensor:
    """Flat indices of the entries of a sparse activation matrix, shape (n_tokens, d_sae)."""
    tokens, latents = feature_acts.coalesce().indices()
    return tokens * feature_acts.shape[1] + latents


def difference(some: Tensor, others: Tensor) -> Tensor:
    """Elements of `some`, all different, that are not in `others`."""
    return some[~torch.isin(some, others, assume_unique=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS / "kept_sets.json")
    args = parser.parse_args()
    setting = {"device": "cpu", "autocast": False, "trained": True, "dead": 0.0} | SIZES["large"]
    found = compare_kept_sets(setting, args.steps)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
