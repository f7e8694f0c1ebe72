"""What several processes that train one SAE exchange per step, and whether they match a single process.

    python eval/bench/data_parallel.py                                      # for a section of eval/results/speed.md
    python eval/bench/data_parallel.py --device cuda --processes 1 2 4 8    # on a machine with as many GPUs
    python eval/bench/data_parallel.py --quick                              # a small SAE, to check that it runs

One process trains on whole batches, and several on parts of the same batches, in SAELens' trainer. Bytes are counted
as they are handed to torch.distributed, gradients separately. Every process has one CPU thread, and no time is given
for more processes than cores. Inputs are activations of the bundled language model, mapped to d_in dimensions as in
`training_step.py`. Sums over ranks round differently from those of one process, so at a near tie another entry may be
kept, after which Adam moves other weights: such entries are counted.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # instead of this script's folder, so that the packages in eval can be imported

from bench.training_step import make_trainer, real_batches
from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig
from sae_lens_sampled.step.ranks import GroupRanks

RESULTS = EVAL / "results"
SIZE = {"tokens": 2048, "d_in": 768, "d_sae": 16_384, "k": 64, "steps": 8}
QUICK = {"tokens": 256, "d_in": 128, "d_sae": 1024, "k": 8, "steps": 4}
BATCHES = "batches.pt"
Fields = dict[str, Any]


def cases(size: dict[str, int]) -> dict[str, Fields]:
    """Config fields of the SAE, and the share of dead latents, by case name."""
    one_pool: Fields = {"pool_factor": 5}
    return {
        "one pool, factor 5": one_pool,
        "one pool, factor 10": {"pool_factor": 10},
        "one pool, factor 5, entropy": one_pool | {"score": "entropy"},
        "one pool, factor 5, frequency": one_pool | {"score": "frequency"},
        "one pool, factor 5, ridge_leverage": one_pool | {"score": "ridge_leverage"},
        "sampled pool, factor 5": one_pool | {"pool_sampling": "proportional"},
        "one pool, factor 5, 90% dead": one_pool | {"dead": 0.9},
        "groups of 16, factor 10": {"pool_factor": 10, "pool_group_size": 16},
        "all latents": {"pool_factor": size["d_sae"] / size["k"]},
    }


def train(
    case: Fields, size: dict[str, int], batches: torch.Tensor, rank: int, count: int, device: str
) -> dict[str, Any]:
    """Train on this process's part of every batch; returns the seconds of each step, weights and buffers.

    With several processes, also the bytes exchanged per step.
    """
    torch.manual_seed(0)
    dims = {name: size[name] for name in ("d_in", "d_sae", "k")}
    fields = {name: value for name, value in case.items() if name != "dead"}
    sae = SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(**dims, **fields, device=device))
    n_own, of_gradients = size["tokens"] // count, None
    if count > 1:
        sae.data_parallel()
        assert sae._gradient_sum is not None
        of_gradients = sae._gradient_sum.ranks = GroupRanks()  # has its own byte count
    trainer = make_trainer(sae, {"tokens": n_own, "device": device, "autocast": False}, lr=1e-3)
    dead = torch.arange(size["d_sae"], device=device) < case.get("dead", 0) * size["d_sae"]
    seconds = []
    for step in range(size["steps"]):
        trainer.n_forward_passes_since_fired.copy_(torch.where(dead, 10**6, 0))
        own = batches[step, rank * n_own :][:n_own].to(device)
        _synchronise(device)
        start = time.perf_counter()
        trainer.step(own)
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    exchanged = {} if of_gradients is None else _bytes_of(sae, of_gradients, size["steps"])
    record = {name: buffer.cpu() for name, buffer in sae.named_buffers()}
    return {
        "seconds": seconds,
        "weights": {n: p.detach().cpu() for n, p in sae.named_parameters()},
        "record": record,
    } | exchanged


def _bytes_of(sae: SampledTopKTrainingSAE, of_gradients: GroupRanks, n_steps: int) -> dict[str, float]:
    of_rest = sae.ranks
    assert isinstance(of_rest, GroupRanks)
    return {"gradient_bytes": of_gradients.n_bytes / n_steps, "other_bytes": of_rest.n_bytes / n_steps}


def _synchronise(device: str) -> None:
    if dist.is_initialized():
        dist.barrier()
    if device != "cpu":
        torch.cuda.synchronize()


def work(rank: int, count: int, size: dict[str, int], kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    device = kind if kind == "cpu" else f"cuda:{rank}"
    if kind != "cpu":
        torch.cuda.set_device(device)
    if count > 1:
        backend = "gloo" if kind == "cpu" else "nccl"
        dist.init_process_group(backend, init_method=f"file://{folder}/init_{count}", rank=rank, world_size=count)
    batches = torch.load(folder / BATCHES)
    for name, case in cases(size).items():
        torch.save(train(case, size, batches, rank, count, device), folder / f"{name}_{count}_{rank}.pt")
        if rank == 0:
            print(f"{count} process{'es' * (count > 1)}: {name}", flush=True)
    if count > 1:
        dist.destroy_process_group()


def compare(name: str, fields: Fields, count: int, folder: Path) -> dict[str, Any]:
    """Compare `count` processes with a single one, and with each other: time, bytes, weights and kept entries."""
    one = torch.load(folder / f"{name}_1_0.pt")
    ranks = [torch.load(folder / f"{name}_{count}_{rank}.pt") for rank in range(count)]
    weights = [rank["weights"] for rank in ranks]
    selections = [result["record"]["pool_record.selection_counts"] for result in (one, ranks[0])]
    row: dict[str, Any] = {
        "case": name,
        "fields": fields,
        "processes": count,
        "ranks_equal": all(torch.equal(own[part], weights[0][part]) for own in weights for part in own),
        "largest_difference": max(
            (weights[0][part] - one["weights"][part]).abs().max().item() for part in one["weights"]
        ),
        "selections": int(selections[0].sum()),
        "other_selections": int((selections[0] - selections[1]).clamp(min=0).sum()),
        "gradient_bytes": ranks[0]["gradient_bytes"],
        "other_bytes": ranks[0]["other_bytes"],
    }
    if count <= (os.cpu_count() or 1):
        after_first = [statistics.median(result["seconds"][1:]) for result in (one, ranks[0])]
        row |= {"one_over_it": after_first[0] / after_first[1]}
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    size = QUICK if args.quick else SIZE
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["sae_lens_sampled"])  # slow to import
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        inputs = real_batches(size | {"device": "cpu"})
        torch.save(torch.stack(list(islice(inputs, size["steps"]))), folder / BATCHES)
        for count in sorted({1, *args.processes}):
            processes = [
                forks.Process(target=work, args=(rank, count, size, args.device, folder)) for rank in range(count)
            ]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            if any(process.exitcode for process in processes):
                raise SystemExit(f"the run on {count} process(es) failed; the error is in the output above")
        rows = [
            compare(name, fields, count, folder)
            for name, fields in cases(size).items()
            for count in args.processes
            if count > 1
        ]
    device = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    machine = f"{device}, {os.cpu_count()} cores, {platform.system()}"
    results = {"machine": machine, "torch": torch.__version__, "size": size, "rows": rows}
    name = "bench_data_parallel" + ("" if args.device == "cpu" else "_cuda")
    (args.output / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
