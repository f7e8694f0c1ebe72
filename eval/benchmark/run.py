"""Nested losses inside the pool, on data with known features made by SynthSAEBench's recipe (arXiv 2602.14687).

    python eval/benchmark/run.py --config small                # eval/NESTED.md, on two CPU cores in an hour
    python eval/benchmark/run.py --config small --report       # only renders the page again
    python eval/benchmark/run.py --config tuning               # what its settings were chosen by
    python eval/benchmark/run.py --config synth-sae-bench-16k  # the benchmark itself, 200M samples: for a GPU
    python eval/benchmark/run.py --config synth-sae-bench-16k-cpu  # 5M samples

All arms of a seed start from the same weights; all SAEs of a data set see the same samples. Run it again and it goes on
where it was: a result that is there is never computed again, and a killed run continues from its last checkpoint.
"""

import argparse
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from itertools import count
from pathlib import Path
from typing import Any

import torch
from sae_lens import LoggingConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.synthetic import SyntheticModel
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.util import temporary_seed
from torch import Tensor
from tqdm import tqdm

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # a script finds its own folder, not the package that the folder is
sys.path.append(str(EVAL.parent / "examples"))

from benchmark.configs import BENCHMARKS
from benchmark.plan import Benchmark, BenchmarkUnit, new_sae, units
from benchmark.report import result_table, write_nested_page
from study.known_features import large_synthetic_model
from study.plan import check_patterns
from study.synthetic import evaluate_on_synthetic_data

WHOLE = "whole"
"""Name of the file that a checkpoint has once all of it is there."""


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    benchmark = BENCHMARKS[args.config]
    results = args.results_dir or EVAL / "results" / f"benchmark_{benchmark.name}"
    try:
        check_patterns(args.arms, (unit.arm for unit in units(benchmark)))
    except ValueError as error:
        sys.exit(str(error))
    warnings.filterwarnings("ignore")  # of the hosts, about their own future
    logging.disable(logging.WARNING)
    table = result_table(benchmark, results)
    finished = table.load()
    runs: dict[tuple[Any, ...], list[BenchmarkUnit]] = {}
    for unit in units(benchmark):
        if unit.key not in finished and any(fnmatch(unit.arm, pattern) for pattern in args.arms):
            runs.setdefault(unit.stream, []).append(unit)
    work = args.work_dir or Path("study_output") / f"benchmark_{benchmark.name}"
    for together in [] if args.report else tqdm(runs.values(), desc="Streams of samples"):
        for result in run(benchmark, together, work):
            table.append(result)
    if args.config in ("small", "tuning"):
        print(f"Page: {write_nested_page(EVAL)}")


def run(benchmark: Benchmark, together: Sequence[BenchmarkUnit], work: Path) -> Iterator[dict[str, Any]]:
    """Train the arms that share a stream of samples, and evaluate them."""
    first, saes = together[0], {}
    of_data = benchmark.data[first.data]
    data = (large_synthetic_model if of_data.large else SyntheticModel)(of_data.features, device=benchmark.device)
    for unit in together:
        torch.manual_seed(unit.seed)  # the same weights in every arm
        saes[unit.arm] = new_sae(benchmark, unit)
    trainer = new_trainer(benchmark, saes, work / "-".join(map(str, first.stream)))
    trainer.data_provider = stream(data, benchmark.batch_size, trainer.n_training_samples)
    trainer.fit()
    for unit in together:
        metrics = evaluate_on_synthetic_data(
            trainer.saes[unit.arm], data, benchmark.eval_samples, benchmark.batch_size, benchmark.device
        )
        yield {**asdict(unit), "metrics": metrics}


def new_trainer(benchmark: Benchmark, saes: dict[str, TrainingSAE], folder: Path) -> MultiSAETrainer:
    """A trainer without data, where the last whole checkpoint in `folder` left off."""
    steps = benchmark.samples // benchmark.batch_size
    config = SAETrainerConfig(
        total_training_samples=steps * benchmark.batch_size,
        train_batch_size_samples=benchmark.batch_size,
        lr=benchmark.lr,
        lr_end=benchmark.lr / 10,  # as in SAELens' runners
        lr_warm_up_steps=int(steps * benchmark.warm_up),
        lr_decay_steps=int(steps * benchmark.decay),
        dead_feature_window=benchmark.dead_window,
        n_checkpoints=benchmark.n_checkpoints,
        checkpoint_path=str(folder),
        device=benchmark.device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = MultiSAETrainer(config, saes, dict.fromkeys(saes, "data"), iter(()), save_checkpoint_fn=finish_checkpoint)
    whole = {int(marker.parent.name): marker.parent for marker in folder.glob(f"*/{WHOLE}")}
    if whole and all((whole[max(whole)] / name).exists() for name in saes):
        trainer.load_checkpoint(whole[max(whole)])
    later = [threshold for threshold in trainer.checkpoint_thresholds if threshold > trainer.n_training_samples]
    trainer.checkpoint_thresholds = later
    return trainer


def finish_checkpoint(checkpoint_path: Path | None) -> None:
    """Mark a checkpoint as whole, and delete those before it."""
    assert checkpoint_path is not None
    (checkpoint_path / WHOLE).touch()
    for other in checkpoint_path.parent.iterdir():
        if other != checkpoint_path:
            shutil.rmtree(other)


def stream(data: SyntheticModel, batch_size: int, n_seen: int) -> Iterator[dict[str, Tensor]]:
    """Batches that depend on their place alone: every arm and seed sees the same ones, and a resumed run too."""
    for batch in count(n_seen // batch_size):
        with temporary_seed(batch), torch.no_grad():
            samples = data.sample(batch_size)
        yield {"data": samples}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=BENCHMARKS, required=True)
    parser.add_argument("--arms", nargs="+", default=["*"], help="only arms whose names match, such as 'nested*'")
    parser.add_argument("--report", action="store_true", help="compute nothing, only render the page")
    parser.add_argument("--work-dir", type=Path, help="checkpoints; default: study_output/CONFIG")
    parser.add_argument("--results-dir", type=Path, help="default: eval/results/benchmark_CONFIG")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
