"""How long a benchmark will take on this machine: seconds for its samples and for each arm."""

from collections.abc import Collection
from itertools import islice
from pathlib import Path
from time import perf_counter

import torch

from benchmark.plan import Benchmark, BenchmarkUnit, streams
from benchmark.training import features_of, new_trainer, stream, untrained
from pages import markdown_table


def time_plan(benchmark: Benchmark, arms: Collection[str], n_samples: int, work: Path) -> str:
    """Table of the time that sampling and arms take for `n_samples`, and for the whole benchmark.

    Every stream of the first seed is timed. Evaluation is not included, nor, in the first `dead_window` steps, is the
    auxiliary loss, because no latent counts as dead yet.
    """
    rows, total = [], 0.0
    n_steps = max(n_samples // benchmark.batch_size, 1)
    of_all = benchmark.steps / n_steps * benchmark.n_seeds / 3600
    for together in streams(benchmark):
        chosen = [unit for unit in together if unit.arm in arms]
        if chosen and chosen[0].seed == 0:
            seconds = time_stream(benchmark, chosen, n_steps, work)
            total += sum(seconds.values()) * of_all
            name = f"{chosen[0].data}, k {chosen[0].k}"
            rows += [[name, part, f"{taken:.1f}", f"{taken * of_all:.2f}"] for part, taken in seconds.items()]
    columns = ["", "", f"s for {n_steps * benchmark.batch_size:,} samples", "h for all samples and seeds"]
    threads = f"{torch.get_num_threads()} threads"
    return f"{markdown_table(columns, rows)}\n\n{total:.2f} h in one process, {threads}, without evaluation"


def time_stream(benchmark: Benchmark, together: list[BenchmarkUnit], n_steps: int, work: Path) -> dict[str, float]:
    """Seconds for the samples of a stream and for each of its arms, after an untimed first step."""
    _, sample = features_of(benchmark.data[together[0].data], benchmark.device, work)
    seconds: dict[str, float] = {}
    generator = stream(sample, benchmark.batch_size, 0)
    next(generator)
    start = now(benchmark.device)
    batches = [batch["data"] for batch in islice(generator, n_steps)]
    seconds["samples"] = now(benchmark.device) - start
    for arm, sae in untrained(benchmark, together).items():
        trainer = new_trainer(benchmark, {arm: sae}, work / "timing").trainers[arm]
        trainer.step(batches[0])
        start = now(benchmark.device)
        for batch in batches:
            trainer.step(batch)
            trainer.n_training_steps += 1
        seconds[arm] = now(benchmark.device) - start
    return seconds


def now(device: str) -> float:
    """Time in seconds, after the device has finished all its work."""
    if device == "cuda":
        torch.cuda.synchronize()
    return perf_counter()
