"""`eval/gpu.sh` without a GPU: its parts, which of them it repeats, and the page made from its results."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import end_to_end, gpu, speed, training_step
from bench.cases import BATCHTOPK, KEPT, gpu_plan

EVAL = Path(__file__).parents[2] / "eval"
PARTS = {"tests": ["tests", "16k", "repeats", "profile"], "bench": ["65k", "131k", "end_to_end", "without_triton"]}
# Replaces python: records its arguments; if a file named after its part exists, exits once with the status in it.
PYTHON = """#!/bin/bash
printf '%q ' "$@" >>"$CALLS/commands" && echo >>"$CALLS/commands"
[ -e "$CALLS/$2" ] || exit 0
status=$(<"$CALLS/$2") && rm "$CALLS/$2" && exit "$status"
"""
# Replaces timeout: records the limit.
TIMEOUT = """#!/bin/bash
echo "$2" >>"$CALLS/limits" && shift 2 && exec "$@"
"""


class Script:
    """`eval/gpu.sh`, with stubs for what it calls."""

    def __init__(self, folder):
        self.calls, self.out = folder / "calls", folder / "out"
        self.calls.mkdir()
        for name, text in {"python": PYTHON, "timeout": TIMEOUT}.items():
            (self.calls / name).write_text(text)
            (self.calls / name).chmod(0o755)

    def __call__(self, *arguments):
        """Exit status, and the commands that were run."""
        (self.calls / "commands").write_text("")
        environment = os.environ | {
            "CALLS": str(self.calls),
            "OUT": str(self.out),
            "PYTHON": str(self.calls / "python"),
        }
        environment["PATH"] = f"{self.calls}:{environment['PATH']}"
        command = ["bash", str(EVAL / "gpu.sh"), *arguments]
        status = subprocess.run(command, env=environment, capture_output=True, check=False).returncode
        return status, [shlex.split(line) for line in (self.calls / "commands").read_text().splitlines()]

    def ended(self):
        """Recorded name and exit status of each part."""
        lines = [line.split() for line in (self.out / "gpu_parts.txt").read_text().splitlines()]
        return [(line[0], int(line[3])) for line in lines]


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


@pytest.mark.parametrize("call", PARTS)
def test_a_call_runs_its_parts_in_four_minutes_and_none_twice(script, call):
    assert script(call)[0] == 0
    assert script.ended() == [(part, 0) for part in PARTS[call]]
    limits = [int(limit) for limit in (script.calls / "limits").read_text().split()]
    assert len(limits) == 4
    assert 200 < sum(limits) <= 245
    assert script(call) == (0, [])


def test_a_part_that_is_ended_costs_the_others_nothing_and_is_done_again(script):
    (script.calls / "repeats").write_text("124")
    assert script("tests")[0] == 1
    assert script.ended() == [("tests", 0), ("16k", 0), ("repeats", 124), ("profile", 0)]
    status, [again] = script("tests")
    assert status == 0
    assert again[:2] == ["eval/bench/gpu.py", "repeats"]


def test_a_part_that_lost_its_gpu_goes_on_in_another_process(script):
    (script.calls / "16k").write_text(str(gpu.DEVICE_LOST))
    status, commands = script("tests")
    assert status == 0
    assert [command[1] for command in commands] == ["pytest", "16k", "16k", "repeats", "profile"]


def test_wheels_are_installed_first(script, tmp_path):
    (tmp_path / "one.whl").touch()
    _, [install, *_] = script("--wheels", str(tmp_path), "bench")
    assert install[:5] == ["-m", "pip", "install", "--quiet", "--no-index"]
    assert install[-1] == str(tmp_path / "one.whl")


def test_tiny_measurements_are_not_taken_for_those_of_a_gpu(script, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    script.out = ""  # as if it were unset
    for call, n_parts in (("tests", 4), ("tests", 4), ("bench", 4)):
        status, commands = script("--device", "cpu", "--tiny", call)
        assert (status, len(commands)) == (0, n_parts)
        outs = [command[command.index("--out") + 1] for command in commands if "--out" in command]
        assert len(outs) >= 3
        assert all(Path(out).is_relative_to(tmp_path) for out in outs)


def test_unknown_arguments_are_refused(script):
    assert script("everything")[0] == script()[0] == 2
    assert not script.out.exists()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """JSON file written by the script's own commands, with tiny sizes on the CPU."""
    script = Script(tmp_path_factory.mktemp("gpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton", sys.modules.get("triton"))  # restored afterwards
        for call in PARTS:
            for name, *arguments in script("--device", "cpu", "--tiny", call)[1]:
                if name == "eval/bench/gpu.py":
                    gpu.main(arguments)
                elif name == "eval/bench/end_to_end.py":
                    args = end_to_end.parse_args(arguments)
                    assert (args.device, args.out) == ("cpu", script.out / "bench_end_to_end_gpu.json")
                    assert args.steps == 3
                else:
                    assert (EVAL.parent / arguments[1]).is_file()
                    assert arguments[:2] == ["pytest", "tests/test_gpu.py"]
    return script.out / "bench_gpu.json"


def test_every_part_writes_what_it_measured(measured):
    results = json.loads(measured.read_text())
    assert not list(measured.parent.glob("*.part"))
    for section, rows in gpu_plan("cpu", tiny=True).items():
        assert [row["case"] for row in results["sections"][section]] == [setting for setting, _ in rows]
        for row, (_, cases) in zip(results["sections"][section], rows, strict=True):
            assert row["failed"] == {}
            here = [case.name for case in cases if not case.package or case.package in results["versions"]]
            assert list(row["step_ms"]) == [*here, "product"]
            assert list(row["memory_mib"]) == here
    assert results["repeats"]["autocast"][KEPT.name] is True
    assert [profile["side"] for profile in results["profile"]] == 2 * [BATCHTOPK.name, KEPT.name]
    for profile in results["profile"]:
        assert 0 < profile["kernels"][0]["ms"] <= profile["kernels_ms"]


def test_measured_rows_are_not_measured_again(measured, monkeypatch):
    before = measured.read_text()
    monkeypatch.setattr(training_step, "own_memory", None)
    monkeypatch.setattr(training_step, "measure", None)
    gpu.main(["16k", "--device", "cpu", "--tiny", "--out", str(measured)])
    assert measured.read_text() == before


def test_results_of_another_machine_are_not_added_to(measured, tmp_path):
    other = tmp_path / "other.json"
    other.write_text(json.dumps(json.loads(measured.read_text()) | {"machine": "another"}))
    with pytest.raises(SystemExit, match="are from another"):
        gpu.main(["16k", "--device", "cpu", "--tiny", "--out", str(other)])


def alone(memory_of, **row):
    """A row after its cases were tried, with `memory_of` in place of the measurement, and all its saved states."""
    row, saved = {"case": {"device": "cpu"}, "memory_mib": {}, "failed": {}} | row, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_step, "own_memory", lambda case, setting: memory_of(case, saved))
        try:
            gpu.try_alone(row, [BATCHTOPK, KEPT], lambda: saved.append(json.loads(json.dumps(row))))
        except SystemExit:
            row["ended"] = True
    return row, saved


def test_a_case_that_fails_is_named_and_the_others_are_measured():
    def memory_of(case, saved):
        assert saved[-1]["failed"][case.name] == gpu.DID_NOT_RETURN  # already in the file, in case the process dies
        if case == KEPT:
            raise RuntimeError("an illegal memory access")
        return 2.0

    row, saved = alone(memory_of)
    assert row["memory_mib"] == {BATCHTOPK.name: 2.0}
    assert row["failed"] == {KEPT.name: "RuntimeError: an illegal memory access"}
    assert saved[-1] == row


def test_a_case_in_which_the_process_was_killed_is_not_tried_again():
    row, _ = alone(lambda case, saved: 2.0, failed={KEPT.name: gpu.DID_NOT_RETURN})
    assert row["memory_mib"] == {BATCHTOPK.name: 2.0}
    assert row["failed"] == {KEPT.name: gpu.DID_NOT_RETURN}


def test_a_case_at_which_the_time_was_up_is_tried_again():
    row, saved = alone(lambda case, saved: sys.exit("The time was up."))
    assert row["ended"]
    assert saved[-1]["failed"] == {}


def test_a_failing_row_is_reported_and_the_next_one_measured(measured, tmp_path, monkeypatch):
    file = tmp_path / "gpu.json"
    rows = gpu_plan("cpu", tiny=True)["16k"]
    monkeypatch.setattr(training_step, "own_memory", lambda case, setting: 2.0)

    def measure(setting, cases, repeats):
        if setting == rows[0][0]:
            raise torch.cuda.OutOfMemoryError("all of them")
        return {"step_ms": {case.name: 1.0 for case in cases}, "scans": {}}

    monkeypatch.setattr(training_step, "measure", measure)
    gpu.main(["16k", "--device", "cpu", "--tiny", "--out", str(file)])
    first, second = json.loads(file.read_text())["sections"]["16k"]
    assert (first["step_ms"], first["failed"]) == ({}, {"all in turns": "OutOfMemoryError: all of them"})
    assert second["step_ms"][KEPT.name] == 1.0
    on_page = page_of(json.loads(file.read_text()))
    assert "- all in turns, float32, at initialisation, 0% dead, was not measured: OutOfMemoryError" in on_page
    assert "| autocast, at initialisation | 25% | SAELens BatchTopK | 1.00 ms | 1.0x | 2 MiB |  |" in on_page
    results = json.loads(file.read_text())
    results["sections"]["65k"] = results["sections"].pop("16k")[:1]
    results["profile"] = [{"case": rows[0][0], "side": KEPT.name, "failed": "RuntimeError: no profile"}]
    on_page = page_of(results)
    assert 'Nothing was measured of "65k":\n\n- all in turns, float32, at initialisation, 0% dead, was not' in on_page
    assert "all latents (kept), float32, at initialisation, has no profile: RuntimeError: no profile" in on_page


def page_of(results):
    """The GPU section of SPEED.md."""
    runs = {"bundled": speed.read("bench_end_to_end"), "smollm2": speed.read("bench_end_to_end_smollm2")}
    if results is not None:
        runs["gpu"] = runs["bundled"]
    page = speed.render(speed.read("bench_training_step"), runs, speed.read("bench_data_parallel"), results)["SPEED.md"]
    assert ("nothing has been measured yet" in page[:200]) == (results is None)
    return page[page.index("## On a GPU") : page.index("## Which path")]


def test_the_page_says_what_a_gpu_needs_or_that_none_was_there(measured):
    assert "`bash eval/gpu.sh tests` and" in page_of(None)
    results = json.loads(measured.read_text())
    on_page = page_of(results)
    assert "Not measured" not in on_page
    assert "Without Triton, on torch's own sparse products:" in on_page
    assert "| float32, at initialisation | 0% | all latents (kept) |" in on_page
    assert "| autocast | yes | yes | yes | yes |" in on_page
    assert "| `aten::" in on_page
    assert "| all latents | store |" in on_page
    assert results["machine"] in page_of(
        {name: results[name] for name in ("machine", "versions")}
    )  # after only a first part
