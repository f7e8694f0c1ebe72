"""Kernels on a machine without a GPU: under Triton's interpreter, in a separate process, and through its compiler.

The interpreted tests are in `interpreted_kernels.py` and `interpreted_steps.py`, because triton decides when imported
whether to interpret. Triton is for Linux only; without it there are no kernels.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_lens_sampled.step.triton import available

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
HERE = Path(__file__).parent
N_TESTS = {"interpreted_kernels": 80, "interpreted_steps": 40}
"""Minimum number of tests in each file, to show that none is left out."""


@pytest.mark.parametrize("name", N_TESTS)
def test_under_the_interpreter(name):
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(HERE / f"{name}.py"),
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    run = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
    summary = run.stdout.strip().splitlines()[-1]
    counted = re.search(r"(\d+) passed", summary)
    assert counted is not None
    assert int(counted[1]) >= N_TESTS[name]
    assert not re.search("skipped|xfailed|deselected", summary), summary


def test_a_cpu_has_no_kernels_but_in_those_tests():
    assert not available(torch.device("cpu"))


POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip


def compiled(kernel, arguments, capability):
    """The kernel's PTX code as compiled for a launch with these arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    types, constants = {}, {}
    for parameter, value in zip(kernel.params, arguments, strict=True):
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = POINTERS[value.dtype]
        else:
            types[parameter.name] = "i32" if value < 2**31 else "i64"
    return compile_kernel(ASTSource(kernel, types, constants), target=GPUTarget("cuda", capability, 32)).asm["ptx"]


@pytest.fixture
def launches(monkeypatch, tmp_path):
    """Kernels that would be launched on a GPU, with their arguments."""
    from sae_lens_sampled.step.triton import dots, row_sums, scan

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launched = []
    for module in (dots, row_sums, scan):
        monkeypatch.setattr(module, "launch", lambda kernel, _grid, _device, *given: launched.append((kernel, given)))
    return launched


def of_type(dtype, n_tokens, group_size, n_latents, which):
    """Call every kernel; the scan has norms, members and dead latents only if `which` is "shares"."""
    from sae_lens_sampled.step.triton.dots import dots
    from sae_lens_sampled.step.triton.row_sums import row_sums
    from sae_lens_sampled.step.triton.scan import Above, Buffers, Chunk, Dead, TileSums, extract, sum_tiles
    from sae_lens_sampled.step.triton.tiles import Tiles

    tiles, cpu, everything = Tiles(n_tokens, group_size), torch.device("cpu"), which == "shares"
    b_enc, threshold = torch.zeros(n_latents, dtype=dtype), torch.zeros(n_latents)
    norms = threshold if everything else None
    chunk = Chunk(torch.zeros(n_tokens, n_latents, dtype=dtype), 64, b_enc, norms, threshold, torch.zeros(()))
    member = torch.zeros(tiles.n_groups, n_latents, dtype=torch.bool) if everything else None
    above = None if which == "none" else Above(torch.zeros(()), member)
    dead = Dead(threshold.int(), torch.zeros(n_tokens, 3)) if everything else None
    counts = sum_tiles(chunk, tiles, TileSums.empty(tiles, n_latents, which, cpu), above, dead)
    if above is not None:
        extract(chunk, tiles, above, counts, torch.tensor(0), Buffers.empty(100, cpu))
    places, matrix = torch.zeros(9, dtype=torch.int64), torch.zeros(3, n_latents, dtype=dtype)
    row_sums(torch.zeros(9), places, torch.tensor([0, 9]), matrix)
    dots(places, places, matrix.float(), matrix)


@pytest.mark.parametrize(
    ("capability", "arguments"),
    [
        (80, (torch.bfloat16, 70, 70, 37, "shares")),
        (90, (torch.float32, 70, 16, 300, "none")),
        (90, (torch.float32, 1, 1, 1, "counts")),
        (90, (torch.float32, 70, 16, 37, "clipped")),
        (100, (torch.bfloat16, 4096, 1, 64, "shares")),
    ],
    ids=str,
)
def test_kernels_compile_for_gpus(capability, arguments, launches):
    """The interpreter accepts what does not compile: types that change in a loop, shapes that are not powers of 2."""
    of_type(*arguments)
    names = {kernel.__name__ for kernel, _ in launches}
    assert names >= {"_sum_kernel", "_part_kernel", "_segment_kernel", "_dot_kernel"}
    for kernel, given in launches:
        code = compiled(kernel, given, capability)
        assert ".visible .entry" in code
        assert not re.search(r"\b(atom|red)\.", code), "atomic sums are in another order in every run"
