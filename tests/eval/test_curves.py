"""Pictures of curves and of the README show the values that they are given."""

import json
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from study_helpers import EVAL, SMOKE, storage

from study.curves import curve_table, draw_metric, measured
from study.first_screen import SIDES, draw_step_times
from study.summary import Summary


def test_a_curve_joins_the_means_in_the_order_of_l0(tmp_path):
    summaries = []
    for k in (32, 8, 16):
        study = storage(tmp_path / str(k), replace(SMOKE, k=k))
        for seed in range(2):
            metrics = {"l0": k + seed, "fvu": 1 / k + seed}
            study.evaluations.append({"arm": "batchtopk", "seed": seed, "metrics": metrics, "pools": {}})
        summaries.append(Summary(study))
    assert measured(summaries) == ["8", "16", "32"]
    assert measured(summaries[:1]) == []
    header, _, row, *_ = curve_table(summaries).splitlines()
    assert re.findall(r"FVU, k (\d+)", header) == ["8", "16", "32"]
    assert "absorption" not in header
    assert row.split(" | ")[1:] == ["0.625 (2)", "0.562 (2)", "0.531 (2) |"]
    axes = plt.figure().subplots()
    draw_metric(axes, summaries, ("batchtopk", "pool_5"), "fvu")
    [line] = axes.lines  # no results of one pool, so no line
    assert line.get_label() == "BatchTopK"
    assert line.get_xdata() == pytest.approx([8.5, 16.5, 32.5])
    assert line.get_ydata() == pytest.approx([1 / 8 + 0.5, 1 / 16 + 0.5, 1 / 32 + 0.5])
    assert list(axes.get_xticks()) == [8, 16, 32]
    assert sorted(len(points.get_offsets()) for points in axes.collections)[-3:] == [2, 2, 2]  # a mark for each SAE
    plt.close("all")


def test_the_times_of_steps_are_those_that_were_measured():
    benchmark = EVAL / "results" / "bench_training_step.json"
    rows = json.loads(benchmark.read_text())["sections"]["d_sae"]
    axes = plt.figure().subplots()
    draw_step_times(axes, benchmark)
    for line, (side, (label, *_)) in zip(axes.lines, SIDES.items(), strict=True):
        assert line.get_label() == label
        assert line.get_xydata().tolist() == [[row["case"]["d_sae"], row["step_ms"][side]] for row in rows]
    plt.close("all")
