"""What a training step costs: Sampled-SAE beside SAELens' BatchTopK and Matryoshka, interleaved in one run.

    python eval/bench/training_step.py                  # the JSON behind eval/SPEED.md, about 40 minutes on two cores
    python eval/bench/training_step.py --device cuda    # the same on a GPU, with every path forced once
    python eval/bench/training_step.py --quick          # one small case, to see that it runs

A step is SAELens' whole trainer step, with clipping and Adam; its time is the median of repeats, in which the sides
take turns, so that whatever else runs on the machine hits all alike. Ratios are what counts. `memory_mib` is what a
step takes above parameters and optimiser at its peak. `product` is the bare product of inputs
and encoder weights, the floor. Steps are timed at initialisation on Gaussian inputs, and after 200 steps of training on
activations of the bundled language model (residual stream of block 2, width 128, turned into d_in dimensions by a fixed
random rotation), with the bound that runs along.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAETrainer,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from tqdm import tqdm

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # a script finds its own folder, not the package that the folder is

from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig
from sae_lens_sampled.step import kept_entries

RESULTS = EVAL / "results"
BASE = "SAELens BatchTopK"
SIZES = {
    "large": {"tokens": 2048, "d_in": 768, "d_sae": 16_384, "k": 64},
    "small": {"tokens": 2048, "d_in": 256, "d_sae": 8192, "k": 32},
    "smollm2": {"tokens": 2048, "d_in": 576, "d_sae": 4096, "k": 32},
}
TRAINING_STEPS = 200
Case = dict[str, Any]


def side_config(side: str, case: Case) -> TrainingSAEConfig:
    """The config of a side, by its name: SAELens' own, or pools such as "nested groups of 16, factor 10 (dense)"."""
    d_sae = case["d_sae"]
    levels = {"matryoshka_widths": case.get("levels") or [d_sae // 64, d_sae // 16, d_sae // 4, d_sae]}
    shared = {name: case[name] for name in ("d_in", "d_sae", "k", "device")} | {"aux_loss_coefficient": 1 / 32}
    if side.startswith(BASE):
        return BatchTopKTrainingSAEConfig(**shared)
    if side == "SAELens TopK":
        return TopKTrainingSAEConfig(**shared)
    if side == "SAELens Matryoshka":
        return MatryoshkaBatchTopKTrainingSAEConfig(**shared, **levels)
    pools, _, step = side.removeprefix("nested ").rstrip(")").partition(" (")
    kind, _, factor = pools.partition(", factor ")
    fields: dict[str, Any] = {"pool_factor": float(factor) if factor else d_sae / case["k"]}
    if side.startswith("nested "):
        fields |= levels
    if kind.startswith("groups of "):
        fields["pool_group_size"] = int(kind.removeprefix("groups of "))
    elif kind == "sampled pool":
        fields["pool_sampling"] = "proportional"
    step = {"": "auto", "entries": "kept", "columns": "kept"}.get(step, step)
    return SampledTopKTrainingSAEConfig(**shared, **fields, step=step)


class InSAELens:
    """A side in SAELens' trainer."""

    def __init__(self, side: str, case: Case) -> None:
        torch.manual_seed(0)
        config = side_config(side, case)
        self.sae = get_sae_training_class(config.architecture())[0](config)
        if case["trained"]:
            pools = "all latents" if side.startswith("SAELens") else side.removeprefix("nested ").partition(" (")[0]
            untrained = case | {"trained": False, "dead": 0.0, "autocast": False}
            self.sae.load_state_dict(trained_weights(pools, json.dumps(untrained)), strict=False)
        if side.endswith("compiled"):
            self.sae.training_forward_pass = torch.compile(self.sae.training_forward_pass)  # as SAELens' compile_sae
        self.trainer = make_trainer(self.sae, case, lr=1e-6)
        # Which of its two ways one pool goes is not for users to choose.
        self.columns_share = {"entries": 0.0, "columns": 1.0}.get(side.rstrip(")").rpartition("(")[2])

    def step(self, x: torch.Tensor, dead: torch.Tensor) -> None:
        self.trainer.n_forward_passes_since_fired.copy_(torch.where(dead, 10**6, 0))
        share = kept_entries.MAX_COLUMNS_SHARE
        kept_entries.MAX_COLUMNS_SHARE = share if self.columns_share is None else self.columns_share
        self.trainer.step(x)
        kept_entries.MAX_COLUMNS_SHARE = share


def make_trainer(sae: Any, case: Case, lr: float) -> SAETrainer:
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=case["tokens"],
        lr=lr,
        lr_end=lr,
        device=case["device"],
        autocast=case["autocast"],
    )
    return SAETrainer(config, sae, iter(()))


@cache
def trained_weights(side: str, case_json: str) -> dict[str, torch.Tensor]:
    """Weights and buffers after some steps on real activations; SAELens' sides start from those of all latents."""
    case = json.loads(case_json)
    torch.manual_seed(0)
    sae = SampledTopKTrainingSAE(side_config(side, case))
    trainer = make_trainer(sae, case, lr=1e-3)
    batches = real_batches(case)
    for _ in tqdm(range(case["training_steps"]), desc=f"Training {side}", leave=False):
        trainer.step(next(batches))
    return sae.state_dict()


def real_batches(case: Case) -> Iterator[torch.Tensor]:
    """Endless batches of the bundled model's activations, in d_in dimensions."""
    activations = language_model_activations()
    generator = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(case["d_in"], activations.shape[1], generator=generator)).Q.T
    while True:
        for rows in torch.randperm(len(activations), generator=generator).split(case["tokens"]):
            if len(rows) == case["tokens"]:
                yield (activations[rows] @ rotation).to(case["device"])


@cache
def language_model_activations() -> torch.Tensor:
    from bench import check_export

    return check_export.language_model_activations("train")[:100_000]


def gaussian_batches(case: Case) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(case["tokens"], case["d_in"], generator=generator).to(case["device"])


def dead_latents(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    dead = torch.rand(case["d_sae"], generator=generator).argsort() < round(case["dead"] * case["d_sae"])
    return dead.to(case["device"])


class InDictionaryLearning:
    """BatchTopK in the trainer of dictionary_learning, where that is installed.

    Without dead latents only: it counts them itself, and forgets those that fire before it looks.
    """

    def __init__(self, case: Case) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

        sizes = {"activation_dim": case["d_in"], "dict_size": case["d_sae"], "k": case["k"]}
        self.trainer = BatchTopKTrainer(10**9, **sizes, layer=0, lm_name="", lr=1e-6, device=case["device"])

    def step(self, x: torch.Tensor, dead: torch.Tensor) -> None:  # noqa: ARG002
        self.trainer.update(2000, x)


class InSparsify:
    """TopK, the nearest that sparsify has, with the step of its trainer (Adam instead of its default optimiser)."""

    def __init__(self, case: Case) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=case["d_sae"], k=case["k"])
        self.coder = SparseCoder(case["d_in"], config, device=case["device"])
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=1e-6)

    def step(self, x: torch.Tensor, dead: torch.Tensor) -> None:
        self.coder.set_decoder_norm_to_unit_norm()
        output = self.coder(x, dead_mask=dead)
        (output.fvu + output.auxk_loss / 32).backward()
        torch.nn.utils.clip_grad_norm_(self.coder.parameters(), 1.0)
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()


OTHERS = {"dictionary_learning BatchTopK": InDictionaryLearning, "sparsify TopK": InSparsify}


def make_side(side: str, case: Case) -> "InSAELens | InDictionaryLearning | InSparsify":
    return OTHERS[side](case) if side in OTHERS else InSAELens(side, case)


def is_installed(side: str, case: Case) -> bool:
    try:
        OTHERS[side](case)
    except ImportError as error:
        print(f"{side} is not compared: {error}.")
        return False
    return True


def seconds(function: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: Case, sides: list[str], repeats: int) -> dict[str, Any]:
    """Median milliseconds of a step by side, and what extraction cost; one side after the other in every repeat."""
    batches = real_batches(case) if case["trained"] else gaussian_batches(case)
    dead, made = dead_latents(case), {side: make_side(side, case) for side in sides}
    times: dict[str, list[float]] = {side: [] for side in (*sides, "product")}
    weights = torch.randn(case["d_in"], case["d_sae"], device=case["device"])
    for _ in range(repeats + 1):
        x = next(batches)
        with torch.autocast(case["device"].split(":")[0], torch.bfloat16, enabled=case["autocast"]):
            times["product"].append(seconds(lambda x=x: x @ weights, case["device"]))
        for side, runner in made.items():
            times[side].append(seconds(lambda runner=runner, x=x: runner.step(x, dead), case["device"]))
    medians = {side: 1000 * statistics.median(values[1:]) for side, values in times.items()}  # the first warms up
    records = {side: getattr(getattr(runner, "sae", None), "scan_record", None) for side, runner in made.items()}
    paths = {side: getattr(getattr(runner, "sae", None), "_path", None) for side, runner in made.items()}
    return {
        "case": case,
        "repeats": repeats,
        "step_ms": medians,
        "scans": {side: record | {"path": paths[side]} for side, record in records.items() if record is not None},
    }


def peak_memory(side: str, case: Case) -> float:
    """MiB that a step takes above what is there between steps; on the CPU in a process of its own."""
    if case["device"].startswith("cuda"):
        return own_memory(side, case)
    command = [sys.executable, "-W", "ignore", __file__, "--memory-of", side, "--case", json.dumps(case)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back larger blocks at once, so none is hidden
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    return float(output.split()[-1])


def own_memory(side: str, case: Case) -> float:
    """MiB that the third step takes, at its peak."""
    runner, batches, dead = make_side(side, case), gaussian_batches(case), dead_latents(case)
    for _ in range(3):  # the optimiser's moments, and whatever is loaded when it is first used
        runner.step(next(batches), dead)
    x = next(batches)
    if case["device"].startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runner.step(x, dead)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew (Linux)
    before = _status("VmRSS")
    runner.step(x, dead)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def plan(device: str, quick: bool) -> dict[str, list[tuple[Case, list[str]]]]:
    """What is measured: sections of cases with their sides. `choose_path` goes by the sections named crossing_*."""
    base = {"device": device, "autocast": False, "trained": False, "dead": 0.0, "training_steps": TRAINING_STEPS}
    forced = " (kept)" if device.startswith("cuda") else ""  # "auto" runs most pools dense there
    groups, one, every = f"groups of 16, factor 10{forced}", "one pool, factor 5", f"all latents{forced}"
    sides = [BASE, "SAELens Matryoshka", every, groups, one]
    if quick:
        tiny = base | {"tokens": 256, "d_in": 128, "d_sae": 2048, "k": 8, "training_steps": 5}
        return {"large": [(tiny | {"trained": trained}, sides) for trained in (False, True)]}
    large, small = base | SIZES["large"], base | SIZES["small"]
    smollm2 = base | SIZES["smollm2"] | {"trained": True, "levels": [256, 1024, 4096]}
    study_pools = [f"groups of 16, factor {factor}{forced}" for factor in (5, 10, 20)]
    study_pools += [f"nested groups of 16, factor {factor}{forced}" for factor in (10, 20)]
    earlier = ["groups of 16, factor 4" + forced, "one pool, factor 4", "sampled pool, factor 4"]
    dead = (0.0, 0.25, 0.9)
    fast = [BASE, every, groups, one]
    ways = ("columns", "entries", "dense")
    return {
        "large": [(large | {"dead": d, "trained": t}, sides if d == 0 else fast) for t in (False, True) for d in dead],
        "small": [(small | {"dead": d, "trained": t}, [*sides, *earlier]) for t in (False, True) for d in dead],
        # Each with the four levels of SAELens' Matryoshka, and without.
        "nested": [
            (large | {"dead": d, "trained": True}, [*sides, *(f"nested {side}" for side in (every, groups, one))])
            for d in (0.0, 0.25)
        ],
        # The arms of the study on SmolLM2, with about as many dead latents as they have.
        "smollm2": [
            (smollm2 | {"dead": 0.1}, [BASE, "SAELens TopK", "SAELens Matryoshka", every, *study_pools]),
            (smollm2 | {"dead": 0.9}, [BASE, one]),
        ],
        "autocast": [(small | {"autocast": True, "dead": d}, fast) for d in dead],
        "d_sae": [(small | {"d_sae": n}, [BASE, every, groups, one]) for n in (2048, 4096, 8192, 16_384, 32_768)],
        "crossing_density": [
            (small | {"d_sae": 4096, "k": k}, ["all latents (kept)", "all latents (dense)"])
            for k in (16, 64, 256, 512, 1024)
        ],
        "crossing_size": [
            (small | {"d_in": 64, "d_sae": n, "k": 8, "tokens": 512}, ["all latents (kept)", "all latents (dense)"])
            for n in (128, 256, 512, 1024, 2048)
        ],
        "crossing_columns": [
            (small, [f"one pool, factor {factor} ({way})" for way in ways]) for factor in (4, 16, 32, 64, 128, 200)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="one small case")
    parser.add_argument("--sections", help="some of large,small,autocast,...; the others stay as they are")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file; default: in eval/results")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(own_memory(args.memory_of, json.loads(args.case)))
        return
    name = "bench_training_step" + ("" if args.device == "cpu" else f"_{args.device.replace(':', '_')}")
    file = args.out or RESULTS / f"{name}.json"
    sections = plan(args.device, args.quick)
    wanted = args.sections.split(",") if args.sections else list(sections)
    results = json.loads(file.read_text()) if file.exists() and args.sections else {}
    packages, processor = ("torch", "sae-lens", "sae-lens-sampled"), platform.processor() or platform.machine()
    results["versions"] = {package: importlib.metadata.version(package) for package in packages}
    results["machine"] = f"{processor}, {torch.get_num_threads()} threads, {args.device}"
    for section in wanted:
        rows = []
        for case, sides in tqdm(sections[section], desc=section):
            others = [side for side in OTHERS if section == "small" and not case["dead"] and is_installed(side, case)]
            with contextlib.redirect_stderr(open(os.devnull, "w")):
                row = measure(case, [*sides, *others], args.repeats)
                if not case["trained"] and (section == "large" or (section == "small" and not case["dead"])):
                    row["memory_mib"] = {side: peak_memory(side, case) for side in [*sides, *others]}
            rows.append(row)
            tqdm.write(json.dumps({side: round(ms) for side, ms in row["step_ms"].items()}))
        results.setdefault("sections", {})[section] = rows
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
