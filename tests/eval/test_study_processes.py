"""The study in several processes and after kills: the results are those of one undisturbed process."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

import pandas as pd
from process_helpers import FORKS
from study_helpers import EVAL, SMOKE, storage
from study_worker import work

from sae_lens_sampled.runners.parts import Part, parse_part
from study.plan import compared, units
from study.stages import STAGES, status, to_do
from study.studies import TINY

ARMS = ["pool_5", "pool_5_global"]
STUDY = ["--config", "tiny", "--smoke", "--arms"]
N_PARTS = 3
N_KILLS = int(os.environ.get("STUDY_KILLS", "1"))
"""`STUDY_KILLS=10 pytest tests/eval/test_study_processes.py -k killed` takes a few minutes."""


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_the_parts_of_a_study_are_all_of_it(count):
    parts = [Part(index, count).of(units(TINY)) for index in range(1, count + 1)]
    assert sorted(unit.name for part in parts for unit in part) == sorted(unit.name for unit in units(TINY))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/8", "9/8", "8", "-1/8", "1/x", "1/8/2", ""])
def test_invalid_parts_are_refused(text):
    with pytest.raises(ValueError, match=f"^--part {text}: must be of the form 2/8"):
        parse_part(text)
    assert parse_part("8/8") == Part(8, 8)


def test_the_status_counts_what_is_missing_and_names_the_parts_that_have_work(tmp_path):
    study = storage(tmp_path, replace(SMOKE, arms=("batchtopk", "topk", "pool_5", "pool_5_groups_16")))
    lines = status(study, ["*"], 1).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "train 0 of 2 done",  # one portion per seed
        "evaluate 0 of 8 done",
        "absorption 0 of 0 done",
        "synthetic 0 of 8 done",
        "compare 0 of 10 done",
    ]
    for unit in units(study.study):
        if unit.name != "topk_seed1":
            study.evaluations.append({"arm": unit.arm.name, "seed": unit.seed, "metrics": {}})
    for arm, other in compared(study.study):
        study.comparisons.append({"arm": arm.name, "other_arm": other.name, "pairs": []})
    position = [unit.name for unit in units(study.study)].index("topk_seed1")
    lines = [" ".join(line.split()) for line in status(study, ["*"], 3).splitlines()]
    assert lines[0] == "train 1 of 2 done; parts with work: 2 of 3"  # those of the second seed
    assert lines[1] == f"evaluate 7 of 8 done; parts with work: {position % 3 + 1} of 3"
    assert lines[4] == "compare 10 of 10 done"
    assert [unit.name for unit in to_do(STAGES["evaluate"], study, ["*"], Part())] == ["topk_seed1"]
    [run] = to_do(STAGES["train"], study, ["t*"], Part())
    assert [unit.name for unit in run] == ["topk_seed1"]
    assert not to_do(STAGES["train"], study, ["pool*"], Part())


SBATCH = """#!/bin/bash
# Slurm on one machine: records its arguments, runs the tasks of an array at once, and prints the number of the job.
echo "$@" >> "$LOG"
while [[ $1 == -* ]]; do [[ $1 == --array=* ]] && range=${1#--array=}; shift; done
last=${range#1-}
for i in $(seq "$last"); do
SLURM_ARRAY_TASK_ID=$i SLURM_ARRAY_TASK_COUNT=$last bash "$@" > "$LOG.$i" 2>&1 &
done
wait
wc -l < "$LOG"
"""


@pytest.mark.parametrize("n_bytes", [0, 1, 30])
def test_a_torn_last_line_is_ignored_and_replaced(tmp_path, n_bytes):
    table = storage(tmp_path).evaluations
    results = [{"arm": "topk", "seed": seed, "metrics": {"fvu": 0.1 + seed}} for seed in range(3)]
    for result in results[:2]:
        table.append(result)
    whole = table.file.read_bytes()
    line = whole.splitlines(keepends=True)[1]
    table.file.write_bytes(whole + line.replace(b'"seed": 1', b'"seed": 2')[:n_bytes])  # killed while writing it
    assert table.load() == {("topk", seed): results[seed] for seed in range(2)}
    table.append(results[2])
    assert table.load() == {("topk", seed): results[seed] for seed in range(3)}
    assert table.file.read_bytes().startswith(whole)
    assert len(pd.read_json(table.file, lines=True)) == 3


def test_processes_that_add_results_at_the_same_time_lose_none(tmp_path):
    table = storage(tmp_path).evaluations
    results = [{"arm": "topk", "seed": seed, "metrics": {"text": "x" * 10_000}} for seed in range(40)]
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("fork")) as pool:
        list(pool.map(table.append, results))
    assert sorted(table.load()) == [("topk", seed) for seed in range(40)]
    assert all(result in results for result in table.load().values())


def started(folder, *options):
    """Start a process that runs the study, or some of its stages or a part of it, with results in `folder`."""
    argv = [*STUDY, *ARMS, "--work-dir", str(folder), *options]
    process = FORKS.Process(target=work, args=(argv, folder.with_suffix(".log")))
    process.start()
    return process


def assert_ended(processes, folder):
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0, folder.with_suffix(".log").read_text()[-2000:]


def killed(process, seconds):
    """Kill the process after `seconds`; whether that was before it ended by itself."""
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def results_of(folder):
    """Lines of each table, sorted because a resumed run divides the missing work into other portions."""
    return {file.name: sorted(file.read_bytes().splitlines()) for file in (folder / "results").glob("*.jsonl")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a single process that did everything."""
    folder = tmp_path_factory.mktemp("study") / "whole"
    assert_ended([started(folder, "--stages", "prepare", *STAGES, "report")], folder)
    assert {name: len(lines) for name, lines in results_of(folder).items()} == {
        "evaluate.jsonl": 4,  # two arms, two seeds
        "synthetic.jsonl": 2,  # each SAE, not each export
        "compare.jsonl": 1,  # one trained arm
    }
    return folder


def assert_same_study(folder, whole):
    assert results_of(folder) == results_of(whole)
    pages = [(each / "results" / "RESULTS.md").read_text() for each in (folder, whole)]
    assert pages[0] == pages[1]
    assert "pool 5, one pool" in pages[0]
    assert (folder / "results" / "similarity.png").exists()


def copy_probes(whole, folder):
    """Copy absorption's probes, which are slow to train. Another test covers their training by several processes."""
    artifacts = next(whole.rglob("sae_bench/artifacts"))
    shutil.copytree(artifacts, folder / artifacts.relative_to(whole))


def test_an_export_is_compared_with_the_selection_of_training_on_the_same_tokens(whole):
    results = {(r["arm"], r["seed"]): r["metrics"] for r in map(json.loads, results_of(whole)["evaluate.jsonl"])}
    for (arm, _), measured in results.items():
        if arm == "pool_5":
            assert measured["l0_of_selection"] == pytest.approx(SMOKE.k)  # the threshold's L0 only comes near
            assert measured["fvu_of_selection"] != measured["fvu"]
        else:  # exported with a threshold of its own, so there is no training SAE beside it
            assert "l0_of_selection" not in measured


def test_a_study_that_was_killed_ends_with_the_same_results(whole, tmp_path):
    folder, moments = tmp_path / "killed", random.Random(0)
    copy_probes(whole, folder)
    for _ in range(N_KILLS):
        killed(started(folder), moments.uniform(0, 15))
    assert_ended([started(folder)], folder)
    assert_same_study(folder, whole)


def test_parts_at_the_same_time_have_the_results_of_one_process(whole, tmp_path):
    """Three parts, one of them started twice, and one killed midway and run again."""
    folder, moments = tmp_path / "parts", random.Random(1)
    copy_probes(whole, folder)
    for stage in ("train", "evaluate", "synthetic", "compare"):
        parts = [started(folder, "--stages", stage, "--part", f"{i}/{N_PARTS}") for i in (1, 2, 3, 3)]
        if stage == "evaluate":
            assert killed(parts[0], moments.uniform(0.5, 3))
            parts[0] = started(folder, "--stages", stage, "--part", f"1/{N_PARTS}")
        assert_ended(parts, folder)
    assert_ended([started(folder, "--stages", "report")], folder)
    assert_same_study(folder, whole)


def test_an_array_of_processes_has_the_results_of_one(whole, tmp_path):
    """`slurm.sh` starts simultaneous Slurm tasks on one folder, and a stage that begins after another."""
    (tmp_path / "bin").mkdir()
    # Absorption has no work here; it stands for a later stage.
    python = f'#!/bin/bash\n[[ "$*" == *absorption* ]] && exit\nexec {sys.executable} -W ignore "$@"\n'
    for name, text in {"sbatch": SBATCH, "python": python}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path, folder = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", tmp_path / "array"
    stages = {"PARTS": "2", "STAGES": "synthetic absorption"}
    array = subprocess.run(
        ["bash", EVAL / "study" / "slurm.sh", "tiny", "--smoke", "--arms", *ARMS, "--work-dir", folder],
        env=os.environ | {"PATH": path, "LOG": str(tmp_path / "log"), "OMP_NUM_THREADS": "1"} | stages,
        check=True,
        capture_output=True,
        text=True,
    )
    assert array.stdout.splitlines() == ["synthetic: job 1", "absorption: job 2"]
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first.startswith("--parsable --array=1-2 --job-name=tiny-synthetic ")
    assert second.startswith("--parsable --array=1-2 --job-name=tiny-absorption --dependency=afterany:1 ")
    assert results_of(folder) == {"synthetic.jsonl": results_of(whole)["synthetic.jsonl"]}
