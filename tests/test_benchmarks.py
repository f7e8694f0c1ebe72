"""The benchmarks in `eval/` run and report what they measured; how fast is nobody's business here."""

import argparse
import importlib.util
from pathlib import Path

import pytest

EVAL = Path(__file__).parent.parent / "eval"
CASE = {"tokens": 64, "d_in": 12, "d_sae": 256, "k": 4, "pool_factor": 3.0, "device": "cpu", "autocast": False}


def load(name):
    spec = importlib.util.spec_from_file_location(name, EVAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dead", [0.0, 0.5])
def test_a_training_step_is_measured_on_every_side(dead, tmp_path):
    bench = load("bench_training_step")
    case = CASE | {"dead": dead}
    times = bench.measure(case, list(bench.SIDES), repeats=1)
    assert list(times) == [*bench.SIDES, "product"]
    assert all(one["fwd+bwd"] > 0 for one in times.values())
    row = {"case": case, "times": times, "memory": dict.fromkeys(bench.SIDES, 7.0)}
    lines = bench.table([row]).splitlines()
    assert len(lines) == 2 + 5
    assert "| 1.00x |" in lines[2]
    bench.draw([row, row | {"case": case | {"d_sae": 512}}], tmp_path / "cost.png")
    assert (tmp_path / "cost.png").stat().st_size > 5000


def test_the_dead_are_as_many_as_asked_for():
    bench = load("bench_training_step")
    assert bench.inputs(CASE | {"dead": 0.25})[1].sum() == 64


def test_the_memory_of_a_step_is_measured_in_a_process_of_its_own():
    bench = load("bench_training_step")
    case = CASE | {"dead": 0.0, "tokens": 1024, "d_sae": 4096}
    dense, restricted = (bench.peak_memory(side, case) for side in ("SAELens BatchTopK", "one pool"))
    assert dense > 1024 * 4096 * 4 / 2**20  # at least one matrix of all tokens and latents
    assert restricted < dense / 2


def test_a_whole_run_is_measured(tiny_lm):
    from transformer_lens.model_bridge import TransformerBridge

    bench = load("bench_end_to_end")
    args = argparse.Namespace(
        model=str(tiny_lm),
        dataset=str(tiny_lm / "text"),
        hook="blocks.2.hook_resid_post",
        device="cpu",
        d_sae=256,
        k=4,
        batch_size=256,
        steps=3,
        pool_factor=4,
    )
    model = TransformerBridge.boot_transformers(args.model, device="cpu")
    assert bench.tokens_per_second("one pool", args, model) > 0
