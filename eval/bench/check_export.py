"""Does an exported SAE do at inference what it did in training? L0 and FVU at each, for many kinds of pools.

    python eval/bench/check_export.py                     # everything: 132 SAEs, about half an hour on two CPU cores
    python eval/bench/check_export.py --quick             # 24 of them, in some minutes
    python eval/bench/check_export.py --report            # only renders the pages from existing results

Trains SAEs with SAELens' trainer on the bundled language model's residual stream and on synthetic data, then compares
on held-out data the selection of training (every batch of 512 tokens has its own pools and cutoff) with the default
export (per-latent thresholds) and with BatchTopK's global threshold. Writes `eval/results/check_export.json` and, from
it (not with `--quick`), `eval/EXPORT.md` and `eval/results/export.md`; existing rows are not recomputed.

If a pool depends on the batch more than on the token, no thresholds can reproduce it. To show that this, and not the
rule that sets the thresholds, causes an export's higher FVU (by more than 2 %, and with pools that are not drawn),
gradient descent then searches for the thresholds with the lowest FVU at the L0 of training ("FVU best"): an excess that
remains over the FVU of training is put down to having no batch.
"""

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig
from torch import Tensor
from tqdm import tqdm

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # instead of this script's folder, so that the packages in eval can be imported
sys.path.append(str(EVAL.parent / "examples"))

from bench.export_page import Setting, table, write_pages
from bundled import TINY_LM
from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig, to_jumprelu
from sae_lens_sampled.files import atomic_path, atomic_write
from sae_lens_sampled.metrics import fraction_of_variance_unexplained

RESULTS = EVAL / "results" / "check_export.json"
SETUP = {"d_sae": 512, "k": 12, "steps": 800, "batch": 512}
"""How every SAE is trained."""
D_SAE, K, STEPS, BATCH = SETUP.values()
N_HELD_OUT = 80
"""Number of held-out batches."""
POOL_FACTORS = (1, 1.5, 3, 5, 10)
SCORES = ("l2_norm", "entropy", "perplexity")
WIDTHS = [D_SAE // 8, D_SAE // 2, D_SAE]


def settings(data: str, quick: bool) -> list[Setting]:
    """All combinations of sampling, groups, score and pool factor, and some with nested levels; fewer if `quick`.

    For the pool of all latents the combinations coincide, so it comes only once without levels and once with them.
    """
    all_latents = {"data": data, "pool_factor": D_SAE / K, "score": "l2_norm"}
    kinds = itertools.product(("top", "proportional"), (None, 16), SCORES, (1, 5) if quick else POOL_FACTORS)
    rows = [
        {"data": data, "pool_factor": factor, "score": score, "pool_sampling": sampling, "pool_group_size": group}
        for sampling, group, score, factor in kinds
        if not quick or score == "l2_norm"
    ]
    nested = [
        {"data": data, "pool_factor": factor, "score": "l2_norm", "pool_group_size": group, "matryoshka_widths": WIDTHS}
        for group in (None, 16)
        for factor in ((10,) if quick else (5, 10))
    ]
    return [all_latents, *rows, all_latents | {"matryoshka_widths": WIDTHS}, *nested]


def is_of(row: Setting, setting: Setting) -> bool:
    """Whether a row is the result of a setting. Without `matryoshka_widths`, a setting has only rows without levels."""
    return all(row.get(name) == value for name, value in ({"matryoshka_widths": None} | setting).items())


def language_model_activations(split: str) -> Tensor:
    """Residual stream after block 2 on `examples/tiny_lm/text/train.jsonl`, shape (tokens, 128), in random order.

    Every tenth row of 128 tokens is held out, so both splits are from the same novels: no threshold can anticipate an
    unseen author.
    """
    from transformer_lens.model_bridge import TransformerBridge

    model = TransformerBridge.boot_transformers(str(TINY_LM), device="cpu")
    lines = (TINY_LM / "text" / "train.jsonl").read_text().splitlines()
    ids = model.tokenizer("".join(json.loads(line)["text"] for line in lines), verbose=False)["input_ids"]
    rows = torch.tensor(ids[: len(ids) // 128 * 128]).view(-1, 128)
    held_out = torch.arange(len(rows)) % 10 == 0
    rows = rows[held_out if split == "validation" else ~held_out]
    hook = "blocks.2.hook_resid_post"
    with torch.no_grad():
        parts = [model.run_with_cache(part, names_filter=[hook])[1][hook] for part in rows.split(64)]
    x = torch.cat(parts).flatten(end_dim=1)
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]


def batches(data: str, split: str) -> Iterator[Tensor]:
    """Endless batches of shape (512, d_in), the same for every SAE."""
    if data == "synthetic":
        model = SyntheticModel(SyntheticModelConfig(num_features=512, hidden_dim=64, seed=0))
        torch.manual_seed(0 if split == "train" else 1)
        while True:
            yield model.sample(BATCH)
    x = torch.load(cache_file(split), mmap=True)
    for epoch in itertools.count():
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        yield from (x[part] for part in order.split(BATCH) if len(part) == BATCH)


def cache_file(split: str) -> Path:
    return RESULTS.parent / f"activations_{split}.pt"


def train(setting: Setting) -> SampledTopKTrainingSAE:
    torch.manual_seed(1)
    fields = {name: value for name, value in setting.items() if name != "data"}
    stream = batches(setting["data"], "train")
    sae = SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(d_in=next(stream).shape[1], d_sae=D_SAE, k=K, **fields))
    cfg = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=2e-3,
        lr_end=2e-4,
        lr_decay_steps=STEPS // 5,
        dead_feature_window=200,
    )
    return SAETrainer(cfg, sae, stream).fit()


def train_and_compare(setting: Setting) -> Setting:
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()):  # one progress bar is enough
        sae = train(setting)
    with torch.no_grad():
        return setting | compare(sae, setting["data"])


def compare(sae: SampledTopKTrainingSAE, data: str) -> dict[str, float]:
    held_out = list(itertools.islice(batches(data, "validation"), N_HELD_OUT))
    x = torch.cat(held_out)
    acts = torch.cat([sae.select(batch, draw=i) for i, batch in enumerate(held_out)])
    row = {"L0": l0(acts), "FVU": fraction_of_variance_unexplained(x, sae.decode(acts)).item()}
    for mode in ("per_latent", "global"):
        sae.cfg.inference_threshold = mode
        exported = to_jumprelu(sae)
        acts = exported.encode(x)
        fvu = fraction_of_variance_unexplained(x, exported.decode(acts)).item()
        row |= {f"{mode}_L0": l0(acts), f"{mode}_FVU": fvu}
    if row["per_latent_FVU"] > 1.02 * row["FVU"] and sae.cfg.pool_sampling == "top":
        row["best_FVU"] = lowest_fvu(sae, torch.cat(list(itertools.islice(batches(data, "train"), 100))), x, row["L0"])
    return row


def lowest_fvu(sae: SampledTopKTrainingSAE, train: Tensor, held_out: Tensor, target_l0: float) -> float:
    """FVU on `held_out` with the best thresholds that gradient descent on `train` finds, at the given L0.

    Gradients are straight-through estimates for a JumpReLU. A Lagrange multiplier steers L0 to the target on `train`;
    at the end, all thresholds are scaled by the factor that gives exactly this L0 on `held_out`.
    """
    sae.cfg.inference_threshold = "per_latent"
    exported = to_jumprelu(sae, prune=True)
    w_enc, b_enc, w_dec, b_dec = (w.detach() for w in (exported.W_enc, exported.b_enc, exported.W_dec, exported.b_dec))
    inputs = [exported.process_sae_in(part) @ w_enc + b_enc for part in (train, held_out)]
    log_threshold = torch.nn.Parameter(exported.threshold.detach().clamp(min=1e-3).log())
    optimizer = torch.optim.Adam([log_threshold], lr=0.02)
    variance, multiplier = train.var(dim=0).sum(), 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        for _ in range(600):
            rows = torch.randint(len(train), (BATCH,), generator=generator)
            z, threshold = inputs[0][rows], log_threshold.exp()
            gate = (z > threshold).float()
            soft = torch.sigmoid((z - threshold) / (0.1 * threshold.detach() + 1e-3))
            gate = gate + soft - soft.detach()
            error = (train[rows] - (z.relu() * gate @ w_dec + b_dec)).square().sum(dim=1).mean() / variance
            excess = gate.sum(dim=1).mean() / target_l0 - 1
            multiplier += 0.01 * excess.item()
            optimizer.zero_grad()
            (error + multiplier * excess).backward()
            optimizer.step()
    low, high, z = 0.05, 20.0, inputs[1]
    for _ in range(40):
        factor = (low * high) ** 0.5
        acts = z.relu() * (z > log_threshold.exp() * factor)
        low, high = (factor, high) if l0(acts) > target_l0 else (low, factor)
    return fraction_of_variance_unexplained(held_out, acts @ w_dec + b_dec).item()


def l0(acts: Tensor) -> float:
    return (acts > 0).sum(dim=1).double().mean().item()


def train_missing(wanted: list[Setting], n_processes: int) -> None:
    """Train the SAEs of `wanted` that the results lack, and add their rows."""
    RESULTS.parent.mkdir(exist_ok=True)
    for split in ("train", "validation"):
        if not cache_file(split).exists():
            with atomic_path(cache_file(split)) as file:
                torch.save(language_model_activations(split), file)
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    missing = [setting for setting in wanted if not any(is_of(row, setting) for row in rows)]
    with multiprocessing.get_context("spawn").Pool(n_processes) as pool:
        for row in tqdm(pool.imap_unordered(train_and_compare, missing), total=len(missing), desc="SAEs"):
            rows.append(row)
            atomic_write(RESULTS, json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only 24 SAEs; print a table and leave the pages alone")
    parser.add_argument("--report", action="store_true", help="only render the pages")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    wanted = settings("tiny_lm", args.quick) + settings("synthetic", args.quick)
    if not args.report:
        train_missing(wanted, args.processes)
    results = json.loads(RESULTS.read_text())
    rows = [row for setting in wanted for row in results if is_of(row, setting)]
    if args.quick:
        print(table(rows))
    else:
        print(f"Page: {write_pages(rows, SETUP, EVAL)}")


if __name__ == "__main__":
    main()
