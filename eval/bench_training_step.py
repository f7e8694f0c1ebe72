"""What a training step costs: Sampled-SAE beside SAELens' BatchTopK, interleaved in one run, medians of repeats.

    python eval/bench_training_step.py                  # the tables and the picture of the README, about 10 minutes
    python eval/bench_training_step.py --device cuda --tokens 4096 --d-in 768 --d-sae 65536 --k 64 --autocast

Ratios and medians are what counts; absolute times depend on the machine and on what else runs there. `fwd+bwd` is loss
and gradients; `step` is SAELens' whole trainer step, with clipping and Adam; `memory` is what a step takes above
parameters and optimiser, at its peak, in a fresh process. `product` is the floor: the bare product of inputs and
encoder weights. Writes `eval/results/bench_training_step.json` and `bench_training_step.png`; with a device other than
the CPU in the name.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from sae_lens import BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepInput
from tqdm import tqdm

from sae_lens_sampled import SampledTopKTrainingSAEConfig

RESULTS = Path(__file__).parent / "results"
SIDES: dict[str, dict[str, Any]] = {
    "SAELens BatchTopK": {},
    "one pool": {"pool_sampling": "top"},
    "groups of 16": {"pool_group_size": 16},
    "sampled pool": {"pool_sampling": "proportional"},
}
Case = dict[str, Any]


def make_trainer(side: str, case: Case) -> SAETrainer:
    torch.manual_seed(0)
    shared = {name: case[name] for name in ("d_in", "d_sae", "k", "device")} | {"aux_loss_coefficient": 1 / 32}
    if side.startswith("SAELens"):
        config = BatchTopKTrainingSAEConfig(**shared)
    else:
        config = SampledTopKTrainingSAEConfig(**shared, **{"pool_factor": case["pool_factor"], **SIDES[side]})
    sae = get_sae_training_class(config.architecture())[0](config)
    if side.endswith("compiled"):
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)  # as SAELens' compile_sae does
    trainer_config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=case["tokens"],
        lr=1e-6,
        lr_end=1e-6,
        device=case["device"],
        autocast=case["autocast"],
    )
    return SAETrainer(trainer_config, sae, iter(()))


def inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch, and which latents are dead."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case["tokens"], case["d_in"], generator=generator)
    dead = torch.rand(case["d_sae"], generator=generator).argsort() < round(case["dead"] * case["d_sae"])
    return x.to(case["device"]), dead.to(case["device"])


class InSAELens:
    """A side in SAELens' trainer."""

    def __init__(self, side: str, case: Case) -> None:
        self.trainer = make_trainer(side, case)

    def forward_backward(self, x: torch.Tensor, dead: torch.Tensor) -> None:
        given = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
        )
        with self.trainer.autocast_if_enabled:
            loss = self.trainer.sae.training_forward_pass(given).loss
        loss.backward()
        self.trainer.optimizer.zero_grad()

    def step(self, x: torch.Tensor, dead: torch.Tensor) -> None:
        self.trainer.n_forward_passes_since_fired.copy_(torch.where(dead, 10**6, 0))
        self.trainer.step(x)


class InDictionaryLearning:
    """BatchTopK in the trainer of dictionary_learning, where that is installed.

    Without dead latents only: it counts them itself, and forgets those that fire before it looks.
    """

    def __init__(self, case: Case) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

        sizes = {"activation_dim": case["d_in"], "dict_size": case["d_sae"], "k": case["k"]}
        self.trainer = BatchTopKTrainer(10**9, **sizes, layer=0, lm_name="", lr=1e-6, device=case["device"])

    def forward_backward(self, x: torch.Tensor, dead: torch.Tensor) -> None:  # noqa: ARG002
        self.trainer.loss(x, step=2000).backward()
        self.trainer.optimizer.zero_grad()

    def step(self, x: torch.Tensor, dead: torch.Tensor) -> None:  # noqa: ARG002
        self.trainer.update(2000, x)


class InSparsify:
    """TopK, the nearest that sparsify has, with the step of its trainer (Adam instead of its default optimiser)."""

    def __init__(self, case: Case) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=case["d_sae"], k=case["k"])
        self.coder = SparseCoder(case["d_in"], config, device=case["device"])
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=1e-6)

    def forward_backward(self, x: torch.Tensor, dead: torch.Tensor) -> None:
        self._backward(x, dead)
        self.optimizer.zero_grad()

    def step(self, x: torch.Tensor, dead: torch.Tensor) -> None:
        self.coder.set_decoder_norm_to_unit_norm()
        self._backward(x, dead)
        torch.nn.utils.clip_grad_norm_(self.coder.parameters(), 1.0)
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _backward(self, x: torch.Tensor, dead: torch.Tensor) -> None:
        output = self.coder(x, dead_mask=dead)
        (output.fvu + output.auxk_loss / 32).backward()


OTHERS = {"dictionary_learning BatchTopK": InDictionaryLearning, "sparsify TopK": InSparsify}


def is_installed(side: str, case: Case) -> bool:
    try:
        OTHERS[side](case)
    except ImportError as error:
        print(f"{side} is not compared: {error}.")
        return False
    return True


def make_side(side: str, case: Case) -> "InSAELens | InDictionaryLearning | InSparsify":
    return OTHERS[side](case) if side in OTHERS else InSAELens(side, case)


def seconds(function: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: Case, sides: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by side; one after the other in every repeat, so that noise hits all alike."""
    x, dead = inputs(case)
    trainers = {side: make_side(side, case) for side in sides}
    times: dict[str, dict[str, list[float]]] = {side: {"fwd+bwd": [], "step": []} for side in sides}
    product: list[float] = []
    weights = torch.randn(case["d_in"], case["d_sae"], device=case["device"])
    for repeat in range(repeats + 1):
        with torch.autocast(case["device"].split(":")[0], torch.bfloat16, enabled=case["autocast"]):
            product.append(seconds(lambda: (x @ weights, None)[1], case["device"]))
        for side, trainer in trainers.items():
            for kind, function in (("fwd+bwd", trainer.forward_backward), ("step", trainer.step)):
                took = seconds(lambda function=function: function(x, dead), case["device"])
                if repeat:  # the first is for warming up
                    times[side][kind].append(took)
    medians = {
        side: {kind: 1000 * statistics.median(values) for kind, values in kinds.items()}
        for side, kinds in times.items()
    }
    return medians | {"product": {"fwd+bwd": 1000 * statistics.median(product[1:]), "step": float("nan")}}


def peak_memory(side: str, case: Case) -> float:
    """MiB that a step takes above what is there between steps, in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--memory-of", side, "--case", json.dumps(case)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives back larger blocks at once, so none is hidden
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    return float(output.split()[-1])


def print_own_memory(side: str, case: Case) -> None:
    trainer, (x, dead) = make_side(side, case), inputs(case)
    for _ in range(3):  # the optimiser's moments, and whatever is loaded when it is first used
        trainer.step(x, dead)
    if case["device"].startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.step(x, dead)
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew (Linux)
    before = _status("VmRSS")
    trainer.step(x, dead)
    print((_status("VmHWM") - before) / 1024)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| d_sae | pool factor | dead | side | fwd+bwd ms | speed-up | step ms | speed-up | tokens/s | memory MiB |"
    ]
    lines.append("|" + "---|" * 10)
    for row in rows:
        case, base = row["case"], row["times"]["SAELens BatchTopK"]
        for side, one in row["times"].items():
            memory = row["memory"].get(side)
            step = "" if side == "product" else f"{one['step']:.0f}"
            faster = "" if side == "product" else f"{base['step'] / one['step']:.2f}x"
            rate = "" if side == "product" else f"{case['tokens'] / one['step'] * 1000:,.0f}"
            lines.append(
                f"| {case['d_sae']} | {case['pool_factor']:g} | {case['dead']:.0%} | {side} | {one['fwd+bwd']:.0f} | "
                f"{base['fwd+bwd'] / one['fwd+bwd']:.2f}x | {step} | {faster} | {rate} | "
                f"{'' if memory is None else f'{memory:.0f}'} |"
            )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Cost of forward and backward against d_sae, both axes logarithmic."""
    figure, axes = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for side in rows[0]["times"]:
        style = {"color": "0.6", "linestyle": "--"} if side == "product" else {"marker": "o"}
        label = "bare encoder product" if side == "product" else side
        values = [row["times"][side]["fwd+bwd"] for row in rows]
        axes.plot([row["case"]["d_sae"] for row in rows], values, label=label, **style)
    axes.set(xscale="log", yscale="log", xlabel="d_sae", ylabel="forward and backward, ms")
    ticks = [row["case"]["d_sae"] for row in rows]
    axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"tokens": 2048, "d_in": 256, "d_sae": 8192, "k": 32}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--pool-factor", type=float, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", action="store_true", help="bfloat16")
    parser.add_argument(
        "--compiled", action="store_true", help="SAELens' compile_sae beside it; compiling takes minutes"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-d-sae", type=int, default=65536, help="where the sweep over d_sae ends")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print_own_memory(args.memory_of, json.loads(args.case))
        return
    base = {name: getattr(args, name) for name in ("tokens", "d_in", "d_sae", "k", "pool_factor", "device", "autocast")}
    base["dead"] = 0.0
    sides = [*SIDES, *(["SAELens BatchTopK compiled"] if args.compiled else [])]
    others = [side for side in OTHERS if is_installed(side, base)]
    widths = [d_sae for d_sae in (2048, 4096, 8192, 16384, 32768, 65536) if d_sae <= args.max_d_sae]
    factors = [1.5, 4, 16, 64, 128, 200, args.d_sae / args.k]
    sweeps = {
        "dead": [base | {"dead": dead} for dead in (0.0, 0.3, 0.9)],
        "d_sae": [base | {"d_sae": d_sae} for d_sae in widths],
        "pool_factor": [base | {"pool_factor": factor} for factor in factors],
    }
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sweeps}
    with tqdm(total=sum(map(len, sweeps.values())), desc="Cases") as progress:
        for name, cases in sweeps.items():
            for case in cases:
                some = [*sides, *(side for side in others if case == base)]  # beside ours at the main setting
                with contextlib.redirect_stderr(open(os.devnull, "w")):
                    memory = {side: peak_memory(side, case) for side in some} if name == "dead" else {}
                    rows[name].append({"case": case, "times": measure(case, some, args.repeats), "memory": memory})
                progress.update()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "sae-lens", "sae-lens-sampled")}
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, {args.device}"
    RESULTS.mkdir(exist_ok=True)
    name = "bench_training_step" + ("" if args.device == "cpu" else f"_{args.device.replace(':', '_')}")
    file = RESULTS / f"{name}.json"
    file.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1) + "\n")
    draw(rows["d_sae"], file.with_suffix(".png"))
    print(f"{machine}; {versions}; {args.tokens} tokens, d_in {args.d_in}, k {args.k}, medians of {args.repeats}.")
    for name, some in rows.items():
        print(f"\nOver {name}\n\n{table(some)}")


if __name__ == "__main__":
    main()
