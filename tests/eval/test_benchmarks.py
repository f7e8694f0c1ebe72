"""The benchmarks in `eval/bench/` run and report their measurements; the speed itself is not tested."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from bench import data_parallel, end_to_end, speed, training_step
from bench.cases import (
    ALL_LATENTS,
    BATCHTOPK,
    OTHER_PACKAGES,
    WAYS_OF_ONE_POOL,
    forced,
    groups,
    libraries,
    matryoshka,
    one_pool,
    plan,
    sae_config,
)
from sae_lens_sampled.step.kept_entries import choose_path

EVAL = Path(__file__).parents[2] / "eval"
SETTING = {"tokens": 64, "d_in": 128, "d_sae": 256, "k": 4, "device": "cpu", "autocast": False, "dead": 0.0}
SETTING |= {"trained": False, "training_steps": 2}
CASES = [BATCHTOPK, matryoshka([64, 256]), forced(ALL_LATENTS, "kept"), groups(3), one_pool(3)]


@pytest.mark.parametrize(("dead", "trained"), [(0.0, False), (0.5, True)])
def test_a_training_step_is_measured_in_every_case(dead, trained, monkeypatch):
    monkeypatch.setattr(training_step, "language_model_activations", lambda: torch.randn(200, 128))
    row = training_step.measure(SETTING | {"dead": dead, "trained": trained}, CASES, repeats=1)
    assert list(row["step_ms"]) == [*(case.name for case in CASES), "product"]
    assert all(milliseconds > 0 for milliseconds in row["step_ms"].values())
    assert {side: scan["path"] for side, scan in row["scans"].items()} == {
        "all latents (kept)": "kept",
        "groups of 16, factor 3": "dense",
        "one pool, factor 3": "columns",
    }
    lines = speed.table([row]).splitlines()
    assert len(lines) == 2 + len(CASES) + 1
    assert "| 1.0x " in lines[2]


@pytest.mark.parametrize("factor", [3, 30], ids=["small", "large"])
def test_one_pool_takes_the_forced_path(factor):
    row = training_step.measure(SETTING, [forced(one_pool(factor), way) for way in WAYS_OF_ONE_POOL], repeats=1)
    columns, entries = row["scans"].values()
    assert (columns["path"], entries["path"]) == ("columns", "kept")
    assert columns["extracted_per_kept"] == 0 < entries["extracted_per_kept"]


def test_the_plan_is_that_of_the_committed_results():
    steps, planned = results("bench_training_step"), plan("cpu")
    sections, versions = steps["sections"], steps["versions"]
    assert sections.keys() == planned.keys()
    for name, rows in sections.items():
        for row, (setting, cases) in zip(rows, planned[name], strict=True):
            here = [case.name for case in cases if not case.package or case.package in versions]
            assert list(row["step_ms"]) == [*here, "product"]
            assert row["case"].items() >= setting.items()


def test_as_many_latents_are_dead_as_asked_for():
    assert training_step.dead_latents(SETTING | {"dead": 0.25}).sum() == 64


def test_the_memory_of_a_step_is_measured_in_a_process_of_its_own():
    setting = SETTING | {"tokens": 1024, "d_sae": 4096}
    dense, kept = (training_step.peak_memory(case, setting) for case in (BATCHTOPK, ALL_LATENTS))
    assert dense > 1024 * 4096 * 4 / 2**20  # at least one matrix of shape (tokens, latents)
    assert kept < dense / 2


def test_auto_takes_what_was_measured_to_be_the_fastest():
    """Up to noise: the path of `choose_path` takes less than 1.2 times as long as the fastest measured one."""
    sections, planned = results("bench_training_step")["sections"], plan("cpu")
    crossing = [name for name in planned if name.startswith("crossing_")]
    rows = [pair for name in crossing for pair in zip(sections[name], planned[name], strict=True)]
    assert len(rows) > 10
    for row, (setting, cases) in rows:
        ways = {case.way: row["step_ms"][case.name] for case in cases}
        path = choose_path(sae_config(cases[0], setting), "auto", setting["tokens"], torch.device("cpu"))
        way = path if path in ways else "entries"  # where one pool may go by columns, the "kept" path has this name
        assert ways[way] < 1.2 * min(ways.values()), (setting, ways, path)


def test_the_page_is_the_one_that_the_results_give():
    assert {page: (EVAL / page).read_text() for page in speed.TEMPLATES} == speed.pages()


def test_a_section_is_measured_alone_and_the_others_stay(tmp_path, monkeypatch):
    file = tmp_path / "steps.json"
    file.write_text(json.dumps({"versions": {"eai-sparsify": "1"}, "sections": {"large": ["as it was"]}}))
    row = {"step_ms": {BATCHTOPK.name: 1.0}}
    monkeypatch.setattr(training_step, "measure", lambda setting, cases, repeats: dict(row, cases=len(cases)))
    monkeypatch.setattr(training_step, "peak_memory", lambda case, setting: 2.0)
    monkeypatch.setattr(training_step, "installed_versions", lambda packages: {"torch": "2"})
    monkeypatch.setattr("sys.argv", ["training_step.py", "--sections", "libraries", "--out", str(file)])
    training_step.main()
    written = json.loads(file.read_text())
    assert written["versions"] == {"eai-sparsify": "1", "torch": "2"}
    assert written["sections"].keys() == {"large", "libraries"}
    assert written["sections"]["large"] == ["as it was"]
    assert [row["cases"] for row in written["sections"]["libraries"]] == [
        4
    ] * 4  # without packages that are not installed
    assert all(len(row["memory_mib"]) == 4 for row in written["sections"]["libraries"])


@pytest.mark.parametrize("package", OTHER_PACKAGES)
def test_a_step_of_another_library_has_gradients_and_an_optimiser(package):
    if not training_step.installed_versions([package]):
        pytest.skip(f"{package} is not installed")
    [case] = [case for case in libraries(256, 0.0) if case.package == package]
    runner = training_step.make_runner(case, SETTING)
    runner.step(torch.randn(64, 128), torch.zeros(256, dtype=torch.bool))
    optimizer = getattr(runner, "trainer", runner).optimizer
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert len(moments) == 4  # weights and biases of encoder and decoder
    assert all(moment.count_nonzero() > 0 for moment in moments)


@pytest.mark.parametrize("dead", [0.0, 0.25])
def test_libraries_are_beside_each_other_and_those_that_are_not_installed_are_named(dead):
    cases = [case.name for case in libraries(256, dead) if case.package != "eai-sparsify"]
    row = {"case": SETTING | {"dead": dead}, "repeats": 1, "step_ms": dict.fromkeys(cases, 20.0), "memory_mib": {}}
    steps = results("bench_training_step")
    steps["sections"]["libraries"], steps["versions"]["dictionary-learning"] = [row], "0.1.0"
    steps["versions"].pop("eai-sparsify", None)
    runs = {"bundled": results("bench_end_to_end"), "smollm2": results("bench_end_to_end_smollm2")}
    page = speed.render(steps, runs, results("bench_data_parallel"), None)["results/speed.md"]
    assert "dictionary-learning 0.1.0, eai-sparsify was not installed." in page
    table = page[page.index("## Other libraries") : page.index("## A whole run")]
    assert "| sparsify TopK |" not in table
    assert table.count("| 20 ms | 1.0x |") == len(cases) == (4 if dead else 5)
    assert ("| dictionary_learning BatchTopK |" in table) == (dead == 0)


def test_what_several_processes_exchange_is_what_the_page_calculates_with():
    """Exact to the byte unless groups or dead latents make it depend on the data."""
    ranks = results("bench_data_parallel")
    exact = [row for row in ranks["rows"] if not {"pool_group_size", "dead"} & row["fields"].keys()]
    assert len(exact) >= 12
    for row in ranks["rows"]:
        n_latents = speed.active_latents(row["fields"], ranks["size"]["d_sae"], ranks["size"]["k"])
        counted, calculated = row["gradient_bytes"], speed.gradient_bytes(n_latents, ranks["size"]["d_in"])
        assert counted == calculated if row in exact else counted <= calculated, row
        assert row["ranks_equal"]
        assert row["other_selections"] < 1e-4 * row["selections"]


def test_several_processes_are_measured_beside_one(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(training_step, "language_model_activations", lambda: torch.randn(2000, 128))
    data_parallel.main(["--quick", "--processes", "2", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "bench_data_parallel.json").read_text())["rows"]
    assert len(rows) == 9
    assert {row["processes"] for row in rows} == {2}
    for row in rows:
        assert row["ranks_equal"]
        assert 0 < row["largest_difference"] < 1e-5
        assert row["selections"] == 4 * 256 * 8
        assert row["other_selections"] == 0
        assert row["one_over_it"] > 0
    by_case = {row["case"]: row["gradient_bytes"] for row in rows}
    assert by_case["one pool, factor 5"] < by_case["one pool, factor 10"] < by_case["all latents"]


def results(name):
    return json.loads((EVAL / "results" / f"{name}.json").read_text())


def test_a_whole_run_is_measured_with_the_store_and_from_a_file(tiny_lm, tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    args = argparse.Namespace(
        model=str(tiny_lm),
        dataset=str(tiny_lm / "text"),
        hook="blocks.2.hook_resid_post",
        device="cpu",
        d_sae=256,
        k=4,
        batch_size=2048,
        steps=4,
    )
    model = TransformerBridge.boot_transformers(args.model, device="cpu")
    cached, per_second = end_to_end.write_file(args, model, tmp_path)
    assert cached.shape == (4 * 2048, 128)
    assert per_second > 0
    with_store = end_to_end.measure(one_pool(5), args, model, None)
    assert 0 < with_store["model"] < with_store["all"]
    assert 0 < with_store["sae"] < with_store["all"]
    from_file = end_to_end.measure(one_pool(5), args, model, cached)
    assert from_file["model"] == 0
    assert 0 < from_file["sae"] < from_file["all"]
