"""GPU measurements, one part per call; `eval/gpu.sh` runs all parts, each with its own time limit.

    python eval/bench/gpu.py 16k                        # training steps at d_sae 16,384; also 65k and 131k
    python eval/bench/gpu.py without_triton             # steps with torch's own sparse products
    python eval/bench/gpu.py repeats                    # is a step bitwise reproducible?
    python eval/bench/gpu.py profile                    # where a step's time goes, by kernel
    python eval/bench/gpu.py 16k --device cpu --tiny    # to check that it runs

Every result goes at once into one JSON file, from which `speed.py` renders a section of SPEED.md. Training steps that
are in the file are not measured again; `repeats` and `profile` always are. Each case of the training steps first runs
alone, to measure its memory; a case that fails or during which the process was killed is left out, and the reason is
stored.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

EVAL = Path(__file__).resolve().parents[1]
sys.path[0] = str(EVAL)  # instead of this script's folder, so that the packages in eval can be imported

from bench import training_step
from bench.cases import BATCHTOPK, DENSE, GPU_REPEATS, KEPT, OTHER_PACKAGES, Case, Setting, gpu_plan, groups

DEVICE_LOST = 75
"""Exit status after a kernel failure that leaves the GPU unusable for this process; a new process can continue."""
PACKAGES = ("torch", "triton", "sae-lens", *OTHER_PACKAGES)
DID_NOT_RETURN = "It did not return."
N_KERNELS = 25
"""Number of kernels that a profile lists."""
WAITING = ("aten::item", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaLaunchKernel")
"""Operations that make the host wait for the GPU, and kernel launches."""
Results = dict[str, Any]
Save = Callable[[], None]


@contextlib.contextmanager
def precision(setting: Setting) -> Iterator[None]:
    """Allow TF32 products inside the context if the setting asks for them, and forbid them otherwise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if setting["tf32"] else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure_section(results: Results, section: str, args: argparse.Namespace, save: Save) -> None:
    """Measure the missing rows of a section."""
    rows = results.setdefault("sections", {}).setdefault(section, [])
    for setting, cases in gpu_plan(args.device, args.tiny)[section]:
        row = next((row for row in rows if row["case"] == setting), None)
        if row is None:
            rows.append(row := {"case": setting, "memory_mib": {}, "failed": {}})
        if "step_ms" in row:
            continue
        cases = [case for case in cases if not case.package or case.package in results["versions"]]
        with precision(setting):
            try_alone(row, cases, save)
            working = [case for case in cases if case.name in row["memory_mib"]]
            repeats = 1 if args.tiny else GPU_REPEATS.get(section, 6)
            measured, reason = tried(partial(training_step.measure, setting, working, repeats), args.device)
        row |= measured or {"step_ms": {}}
        if reason:
            row["failed"]["all in turns"] = reason
        save()
        print(json.dumps({name: round(ms, 2) for name, ms in row["step_ms"].items()}), flush=True)


def try_alone(row: Results, cases: list[Case], save: Save) -> None:
    """Record in the row the memory of each case's step or why it failed; cases that have either are skipped."""
    memory, failed = row["memory_mib"], row["failed"]
    for case in cases:
        if case.name in memory or case.name in failed:
            continue
        failed[case.name] = DID_NOT_RETURN  # stays if the process is killed
        save()
        try:
            mebibytes, reason = tried(partial(training_step.own_memory, case, row["case"]), row["case"]["device"])
        except SystemExit:  # out of time
            del failed[case.name]
            save()
            raise
        if reason is None:
            del failed[case.name]
            memory[case.name] = mebibytes
        else:
            failed[case.name] = reason
        save()
        leave_if_lost(row["case"]["device"])


def tried(function: Callable[[], Any], device: str) -> tuple[Any, str | None]:
    """The function's result and None or, if it raises an error, None and the error as text."""
    try:
        return function(), None
    except Exception as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return None, f"{type(error).__name__}: {error}"[:300]
    finally:
        free(device)


def free(device: str) -> None:
    """Free the GPU memory of an SAE and its optimiser."""
    if device.startswith("cuda"):
        gc.collect()
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def leave_if_lost(device: str) -> None:
    """Exit with `DEVICE_LOST` if the process can no longer use the GPU."""
    if device.startswith("cuda"):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            sys.exit(DEVICE_LOST)


def measure_repeats(results: Results, args: argparse.Namespace, save: Save) -> None:
    """Test whether steps are bitwise reproducible, by precision and case."""
    for setting, _ in gpu_plan(args.device, args.tiny)["16k"]:
        if setting["trained"] or not setting["dead"]:
            continue
        of_setting = {}
        with precision(setting):
            for case in (BATCHTOPK, DENSE, KEPT, groups(10)):
                of_setting[case.name], reason = tried(partial(repeats_exactly, case, setting), args.device)
                if reason:
                    of_setting[case.name] = reason
        results.setdefault("repeats", {})[precision_name(setting)] = of_setting
        save()
        print(precision_name(setting), of_setting, flush=True)
        leave_if_lost(args.device)


def repeats_exactly(case: Case, setting: Setting) -> bool:
    first, second = (state_after(case, setting) for _ in range(2))
    return all(map(torch.equal, first, second))


def state_after(case: Case, setting: Setting, n_steps: int = 3) -> list[torch.Tensor]:
    """Weights, buffers and Adam's moments, which sum up gradients and so show differences in a gradient's last bit."""
    runner = training_step.InSAELens(case, setting)
    batches, dead = training_step.gaussian_batches(setting), training_step.dead_latents(setting)
    for _ in range(n_steps):
        runner.step(next(batches), dead)
    moments = [moment for state in runner.trainer.optimizer.state.values() for moment in state.values()]
    return [*runner.sae.state_dict().values(), *moments]


def precision_name(setting: Setting) -> str:
    return "autocast" if setting["autocast"] else "TF32" if setting.get("tf32") else "float32"


def measure_profiles(results: Results, args: argparse.Namespace, save: Save) -> None:
    """Profile one step by kernel, in float32 and under autocast, with and without dead latents."""
    for setting, _ in gpu_plan(args.device, args.tiny)["16k"]:
        if setting["trained"] or setting["tf32"]:
            continue
        for case in (BATCHTOPK, KEPT):
            with precision(setting):
                profile, reason = tried(partial(profile_step, case, setting), args.device)
            profile = {"case": setting, "side": case.name} | (profile or {"failed": reason})
            profiles = results.setdefault("profile", [])
            profiles[:] = [old for old in profiles if (old["case"], old["side"]) != (setting, case.name)] + [profile]
            save()
            print(precision_name(setting), setting["dead"], case.name, profile.get("step_ms"), flush=True)
            leave_if_lost(args.device)


def profile_step(case: Case, setting: Setting) -> Results:
    """Milliseconds of a step without the profiler and of a step's kernels with it, and counts of `WAITING`."""
    runner = training_step.InSAELens(case, setting)
    batches, dead = training_step.gaussian_batches(setting), training_step.dead_latents(setting)
    times = []
    for _ in range(8):
        x = next(batches)
        times.append(training_step.seconds(lambda x=x: runner.step(x, dead), setting["device"]))
    x = next(batches)
    with torch.profiler.profile() as profiler:  # of the CPU, and of the GPU if there is one
        training_step.seconds(lambda: runner.step(x, dead), setting["device"])
    events = profiler.key_averages()
    on_gpu = setting["device"].startswith("cuda")
    kernels = [
        {"kernel": event.key[:120], "calls": event.count, "ms": time / 1000}
        for event in events
        if event.device_type.name == ("CUDA" if on_gpu else "CPU")
        and (time := event.self_device_time_total if on_gpu else event.self_cpu_time_total)
    ]
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {
        "step_ms": 1000 * statistics.median(times[3:]),
        "kernels_ms": sum(kernel["ms"] for kernel in kernels),
        "kernels": kernels[:N_KERNELS],
        "host": {event.key: event.count for event in events if event.key in WAITING},
    }


def read_results(file: Path, device: str) -> Results:
    """Results so far, or a new record of versions and machine if there is no file.

    Raises:
        SystemExit: if the results were measured on another machine or with other versions.
    """
    here = {"versions": training_step.installed_versions(PACKAGES), "machine": machine(device)}
    results = json.loads(file.read_text()) if file.exists() else here
    if {name: results[name] for name in here} != here:
        raise SystemExit(
            f"The results in {file} are from {results['machine']} with {results['versions']}, but this is "
            f"{here['machine']} with {here['versions']}; move that file away first. With gpu.sh, move bench_gpu.json, "
            "bench_end_to_end_gpu.json and gpu_parts.txt out of both eval/results and $OUT: it copies them from the "
            "first to the second."
        )
    return results


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{torch.get_num_threads()} threads, {device}"


def write_results(results: Results, file: Path) -> None:
    """Write the file atomically."""
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(unfinished, file)


PARTS = {"repeats": measure_repeats, "profile": measure_profiles}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*gpu_plan("cuda"), *PARTS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=training_step.RESULTS / "bench_gpu.json")
    args = parser.parse_args(arguments)
    if args.part == "without_triton":
        sys.modules["triton"] = None  # type: ignore[assignment]  # makes importing it fail
    results = read_results(args.out, args.device)

    def save() -> None:
        write_results(results, args.out)

    if args.part in PARTS:
        PARTS[args.part](results, args, save)
    else:
        measure_section(results, args.part, args, save)


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit("Stopped by SIGTERM, as at a time limit; finished results are saved.")
    )
    main()
