"""Cost of a training step: Sampled-SAE compared with SAELens' BatchTopK and Matryoshka, interleaved in one run.

    python eval/bench/training_step.py                  # the JSON behind eval/SPEED.md, about 40 minutes on two cores
    python eval/bench/training_step.py --device cuda    # the same on a GPU, where most pools are forced to step="kept"
    python eval/bench/training_step.py --quick --out F    # one small size, to check that it runs (into F)
    python eval/bench/training_step.py --sections libraries    # only those rows, into the same JSON

Steps of other libraries are measured if they are installed (`pip install dictionary-learning eai-sparsify`).

A step is a whole trainer step of SAELens (or the other library), with clipping and Adam. Its time is the median of
repeats in which the cases take turns, so that other load on the machine affects all cases alike; only ratios count.
`memory_mib` is a step's peak memory above parameters and optimiser. `product` is the bare product of inputs and encoder
weights, for comparison. Steps are timed at initialisation on Gaussian inputs, and after 200 steps of training on
activations of the bundled language model (residual stream of block 2, width 128, mapped to d_in dimensions by a fixed
random rotation).
"""

import argparse
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from tqdm import tqdm
from typing_extensions import override

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # instead of this script's folder, so that the packages in eval can be imported

from bench.cases import ALL_LATENTS, OTHER_PACKAGES, WAYS_OF_ONE_POOL, Case, Setting, plan, sae_config
from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig
from sae_lens_sampled.step.kept_entries import StepPath
from sae_lens_sampled.step.selection import PoolFields

RESULTS = EVAL / "results"


class OnPath(SampledTopKTrainingSAE):
    """An SAE that takes the same path in every step."""

    def __init__(self, cfg: SampledTopKTrainingSAEConfig, path: StepPath) -> None:
        super().__init__(cfg)
        self.path: StepPath = path

    @override
    def choose_path(self, x: torch.Tensor, fields: PoolFields) -> StepPath:
        return self.path


class InSAELens:
    """A case in SAELens' trainer."""

    def __init__(self, case: Case, setting: Setting) -> None:
        torch.manual_seed(0)
        config = sae_config(case, setting)
        self.path: StepPath | None = None
        """Path of the last step; None for SAELens' own SAEs."""
        if isinstance(config, SampledTopKTrainingSAEConfig):
            path = WAYS_OF_ONE_POOL.get(case.way)
            self.sae = OnPath(config, path) if path else SampledTopKTrainingSAE(config)
        else:
            self.sae = get_sae_training_class(config.architecture())[0](config)
        if setting["trained"]:
            untrained = setting | {"trained": False, "dead": 0.0, "autocast": False}
            self.sae.load_state_dict(trained_weights(json.dumps(pools(case)), json.dumps(untrained)), strict=False)
        self.trainer = make_trainer(self.sae, setting, lr=1e-6)

    def step(self, x: torch.Tensor, dead: torch.Tensor) -> None:
        self.trainer.n_forward_passes_since_fired.copy_(torch.where(dead, 10**6, 0))
        self.path = getattr(self.trainer.step(x), "path", None)


def pools(case: Case) -> dict[str, Any]:
    """The config fields that determine the candidates; for SAELens' own SAEs, all latents."""
    names = ("pool_factor", "pool_group_size", "pool_sampling")
    return ALL_LATENTS.fields | {name: case.fields[name] for name in names if name in case.fields}


def make_trainer(sae: Any, setting: Setting, lr: float) -> SAETrainer:
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=setting["tokens"],
        lr=lr,
        lr_end=lr,
        device=setting["device"],
        autocast=setting["autocast"],
    )
    return SAETrainer(config, sae, iter(()))


@cache
def trained_weights(pools_json: str, setting_json: str) -> dict[str, torch.Tensor]:
    """Weights and buffers after some steps on real activations."""
    setting, case = json.loads(setting_json), Case("", json.loads(pools_json))
    torch.manual_seed(0)
    sae = SampledTopKTrainingSAE(sae_config(case, setting))
    trainer = make_trainer(sae, setting, lr=1e-3)
    batches = real_batches(setting)
    for _ in tqdm(range(setting["training_steps"]), desc=f"Training {pools_json}", leave=False):
        trainer.step(next(batches))
    return sae.state_dict()


def real_batches(setting: Setting) -> Iterator[torch.Tensor]:
    """Endless batches of the bundled model's activations, in d_in dimensions."""
    activations = language_model_activations()
    generator = torch.Generator().manual_seed(2)
    rotation = torch.linalg.qr(torch.randn(setting["d_in"], activations.shape[1], generator=generator)).Q.T
    while True:
        for rows in torch.randperm(len(activations), generator=generator).split(setting["tokens"]):
            if len(rows) == setting["tokens"]:
                yield (activations[rows] @ rotation).to(setting["device"])


@cache
def language_model_activations() -> torch.Tensor:
    from bench import check_export

    return check_export.language_model_activations("train")[:100_000]


def gaussian_batches(setting: Setting) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    while True:
        yield torch.randn(setting["tokens"], setting["d_in"], generator=generator).to(setting["device"])


def dead_latents(setting: Setting) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    dead = torch.rand(setting["d_sae"], generator=generator).argsort() < round(setting["dead"] * setting["d_sae"])
    return dead.to(setting["device"])


class InDictionaryLearning:
    """BatchTopK in the trainer of dictionary_learning, if that is installed.

    Only without dead latents: the trainer counts them itself, and a latent that fires in a step no longer counts as
    dead in that step.
    """

    def __init__(self, setting: Setting) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

        sizes = {"activation_dim": setting["d_in"], "dict_size": setting["d_sae"], "k": setting["k"]}
        self.trainer = BatchTopKTrainer(10**9, **sizes, layer=0, lm_name="", lr=1e-6, device=setting["device"])

    def step(self, x: torch.Tensor, dead: torch.Tensor) -> None:  # noqa: ARG002
        self.trainer.update(2000, x)


class InSparsify:
    """sparsify's TopK, its closest to BatchTopK, in its trainer's step, except that clipping and Adam are torch's."""

    def __init__(self, setting: Setting) -> None:
        if setting["device"] == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # an installed triton would be used on a CPU too
        from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=setting["d_sae"], k=setting["k"])
        self.coder = SparseCoder(setting["d_in"], config, device=setting["device"])
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=1e-6)

    def step(self, x: torch.Tensor, dead: torch.Tensor) -> None:
        self.coder.set_decoder_norm_to_unit_norm()
        output = self.coder(x, dead_mask=dead)
        (output.fvu + output.auxk_loss / 32).backward()
        torch.nn.utils.clip_grad_norm_(self.coder.parameters(), 1.0)
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()


OTHERS = dict(zip(OTHER_PACKAGES, (InDictionaryLearning, InSparsify), strict=True))


def make_runner(case: Case, setting: Setting) -> "InSAELens | InDictionaryLearning | InSparsify":
    return OTHERS[case.package](setting) if case.package else InSAELens(case, setting)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that are installed, by name."""
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def seconds(function: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(setting: Setting, cases: list[Case], repeats: int) -> dict[str, Any]:
    """Median milliseconds of a step, and the scan record, by case; the cases take turns in every repeat."""
    batches = real_batches(setting) if setting["trained"] else gaussian_batches(setting)
    dead, runners = dead_latents(setting), {case.name: make_runner(case, setting) for case in cases}
    times: dict[str, list[float]] = {name: [] for name in (*runners, "product")}
    weights = torch.randn(setting["d_in"], setting["d_sae"], device=setting["device"])
    for _ in range(repeats + 1):
        x = next(batches)
        with torch.autocast(setting["device"].split(":")[0], torch.bfloat16, enabled=setting["autocast"]):
            times["product"].append(seconds(lambda x=x: x @ weights, setting["device"]))
        for name, runner in runners.items():
            times[name].append(seconds(lambda runner=runner, x=x: runner.step(x, dead), setting["device"]))
    sampled = {name: runner for name, runner in runners.items() if isinstance(runner, InSAELens) and runner.path}
    return {
        "case": setting,
        "repeats": repeats,
        # The first step warms up.
        "step_ms": {name: 1000 * statistics.median(values[1:]) for name, values in times.items()},
        "scans": {name: runner.sae.scan_record | {"path": runner.path} for name, runner in sampled.items()},
    }


def peak_memory(case: Case, setting: Setting) -> float:
    """Peak MiB of a step above the memory held between steps; on a CPU in a separate process."""
    if setting["device"].startswith("cuda"):
        return own_memory(case, setting)
    # So that glibc returns freed blocks to the system at once: kept and reused, they would hide part of the peak.
    environment = mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536")
    with environment, multiprocessing.get_context("spawn").Pool(1) as process:
        return process.apply(own_memory, (case, setting))


def own_memory(case: Case, setting: Setting) -> float:
    """Peak MiB of the fourth step above the memory held before it."""
    runner, batches, dead = make_runner(case, setting), gaussian_batches(setting), dead_latents(setting)
    for _ in range(3):  # for the optimiser's moments, and whatever is loaded on first use
        runner.step(next(batches), dead)
    x = next(batches)
    if setting["device"].startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        runner.step(x, dead)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    before = _status("VmRSS")
    runner.step(x, dead)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="only one small size")
    parser.add_argument("--sections", help="measure only these, such as large,small; others keep their results")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file; default: in eval/results")
    args = parser.parse_args()
    if args.quick and not args.out:
        parser.error("--quick needs --out, since it would replace the results in eval/results")
    name = "bench_training_step" + ("" if args.device == "cpu" else f"_{args.device.replace(':', '_')}")
    file = args.out or RESULTS / f"{name}.json"
    sections = plan(args.device, args.quick)
    wanted = args.sections.split(",") if args.sections else list(sections)
    results = json.loads(file.read_text()) if file.exists() and args.sections else {}
    versions = installed_versions(("torch", "sae-lens", "sae-lens-sampled", *OTHER_PACKAGES))
    results["versions"] = results.get("versions", {}) | versions
    processor = platform.processor() or platform.machine()
    results["machine"] = f"{processor}, {torch.get_num_threads()} threads, {args.device}"
    for section in wanted:
        rows = []
        for setting, cases in tqdm(sections[section], desc=section):
            cases = [case for case in cases if not case.package or case.package in versions]
            with contextlib.redirect_stderr(open(os.devnull, "w")):
                row = measure(setting, cases, args.repeats)
                small = section == "small" and not setting["dead"]
                if not setting["trained"] and (section in ("large", "libraries") or small):
                    row["memory_mib"] = {case.name: peak_memory(case, setting) for case in cases}
            rows.append(row)
            tqdm.write(json.dumps({name: round(ms) for name, ms in row["step_ms"].items()}))
        results.setdefault("sections", {})[section] = rows
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
