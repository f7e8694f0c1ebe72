import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

pytest.importorskip("sae_bench")
pytest.importorskip("plotly")

from report_helpers import write_all, write_core, write_mmcs, write_probing
from typer.testing import CliRunner

from sae_lens_sampled.cli import app
from sae_lens_sampled.saebench.report import write_report
from sae_lens_sampled.saebench.report.facts import notes
from sae_lens_sampled.saebench.report.figures import figures
from sae_lens_sampled.saebench.report.metrics import DEAD, FVU, L0, TOP_1, best_mean, estimate, groups_of
from sae_lens_sampled.saebench.report.results import read_results
from sae_lens_sampled.saebench.report.tables import group_tables, sae_tables

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FIGURES = {"fvu-probing", "fvu-absorption", "l0-fvu", "densities", "deciles", "mmcs"}


def report_of(folder):
    return write_report(folder).read_text()


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self._inside = [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data


def rows_of(tables, title):
    """Cells of a table, by row name and header."""
    table = next(table for table in tables if table.title == title)
    header = [name.replace("\N{NO-BREAK SPACE}", " ") for name in table.header]
    return {row[1].text: dict(zip(header, row, strict=True)) for row in table.rows}


@pytest.mark.parametrize(
    ("values", "mean", "error"),
    [([0.20, 0.26], 0.23, 0.03), ([1.0, 2.0, 6.0], 3.0, (14 / 2 / 3) ** 0.5), ([0.4], 0.4, None)],
)
def test_errors_are_of_the_mean_with_one_degree_of_freedom_less(values, mean, error):
    found = estimate(values)
    assert (found.mean, found.n) == (pytest.approx(mean), len(values))
    assert found.error == (error if error is None else pytest.approx(error))


def test_seeds_are_averaged_by_group(tmp_path):
    groups = groups_of(read_results(write_all(tmp_path)))
    cells = rows_of(group_tables(groups), "Reconstruction")
    assert [(group.name, len(group.saes)) for group in groups] == [("topk", 2), ("wide", 2)]
    assert cells["topk"]["FVU ↓"].text == "0.2300 ± 0.3812"
    assert cells["wide"]["FVU ↓"].text == "0.3200 ± 0.1271"
    assert cells["topk"]["Seeds"].text == "2"


def test_the_best_mean_is_marked_in_the_metrics_own_direction(tmp_path):
    tables = group_tables(groups_of(read_results(write_all(tmp_path))))
    fvu, probing = rows_of(tables, "Reconstruction"), rows_of(tables, "Sparse probing")
    assert (fvu["topk"]["FVU ↓"].is_best, fvu["wide"]["FVU ↓"].is_best) == (True, False)
    accuracy = "Top-1 accuracy ↑"
    assert (probing["topk"][accuracy].is_best, probing["wide"][accuracy].is_best) == (False, True)
    assert not any(row["L0"].is_best for row in rows_of(tables, "Sparsity").values())


def test_means_that_look_equal_are_marked_together_and_a_lone_group_not_at_all(tmp_path):
    for name, fvu in (("a", 0.12341), ("b", 0.12339), ("c", 0.2)):
        write_core(tmp_path, name, fvu)
    groups = groups_of(read_results(tmp_path))
    cells = rows_of(group_tables(groups), "Reconstruction")
    assert [cells[name]["FVU ↓"].is_best for name in "abc"] == [True, True, False]
    assert best_mean(FVU, groups[:1]) is None
    assert best_mean(L0, groups) is None


def test_seeds_of_a_pair_share_its_mmcs_so_it_has_no_standard_error(tmp_path):
    cells = rows_of(group_tables(groups_of(read_results(write_all(tmp_path)))), "Similarity of seeds")
    assert cells["topk"]["MMCS of decoders ↑"].text == "0.512"


def test_a_mean_over_fewer_seeds_than_the_group_has_says_so(tmp_path):
    write_all(tmp_path)
    (tmp_path / "eval_results/sparse_probing/topk_seed1_custom_sae_eval_results.json").unlink()
    saes = read_results(tmp_path)
    assert rows_of(group_tables(groups_of(saes)), "Sparse probing")["topk"]["Top-1 accuracy ↑"].text == "0.610 (n=1)"
    assert rows_of(sae_tables(saes), "Sparse probing")["topk_seed1"]["Top-1 accuracy ↑"].text == "-"
    assert notes(saes) == ["sparse_probing is missing for topk_seed1."]


def test_ids_of_one_release_are_groups_of_their_own_unless_they_are_seeds(tmp_path):
    for i, sae_id in enumerate(["k32_seed0", "k32_seed1", "k64_seed0"]):
        write_core(tmp_path, f"release{i}", sae_lens_release_id="me/saes", sae_lens_id=sae_id)
    assert [(group.name, len(group.saes)) for group in groups_of(read_results(tmp_path))] == [
        ("me/saes k32", 2),
        ("me/saes k64", 1),
    ]


def test_equal_names_of_different_classes_are_different_groups(tmp_path):
    write_core(tmp_path, "sae_seed0", architecture="topk")
    write_core(tmp_path, "sae_seed1", architecture="batchtopk")
    assert [(group.sae_class, len(group.saes)) for group in groups_of(read_results(tmp_path))] == [
        ("batchtopk", 1),
        ("topk", 1),
    ]


@pytest.mark.parametrize(
    ("eval_name", "titles", "keys"),
    [
        ("core", ["Sparsity", "Reconstruction"], {"l0-fvu", "densities", "deciles"}),
        ("sparse_probing", ["Sparse probing"], set()),
        ("absorption", ["Absorption"], set()),
        ("mmcs", ["Similarity of seeds"], {"mmcs"}),
    ],
)
def test_a_folder_of_one_eval_gives_its_tables_and_figures_only(tmp_path, eval_name, titles, keys):
    write_all(tmp_path)
    for folder in (tmp_path / "eval_results").iterdir():
        if folder.name != eval_name:
            shutil.rmtree(folder)
    saes = read_results(tmp_path)
    html = report_of(tmp_path)
    assert [table.title for table in group_tables(groups_of(saes))] == titles
    assert {figure.key for figure in figures(saes, groups_of(saes))} == keys
    assert ("Plotly.newPlot" in html) == bool(keys)


def test_results_of_plain_saebench_are_read_from_a_folder_of_any_layout(tmp_path):
    path = write_core(tmp_path / "before", "other", ours=False)
    shutil.move(path, tmp_path / path.name)
    shutil.rmtree(tmp_path / "before")
    saes = read_results(tmp_path)
    assert rows_of(sae_tables(saes), "Sparsity")["other"]["Dead share ↓"].text == "0.250"
    assert "FVU ↓" not in rows_of(sae_tables(saes), "Reconstruction")["other"]
    assert {figure.key for figure in figures(saes, groups_of(saes))} == {"densities"}
    assert "What leading latents fire on" not in report_of(tmp_path)


@pytest.mark.parametrize("fvu", [None, float("nan"), "much"])
def test_non_finite_values_count_as_missing(tmp_path, fvu):
    write_core(tmp_path, "a", fvu)
    write_core(tmp_path, "b", 0.25)
    assert [FVU.of(sae) for sae in read_results(tmp_path)] == [None, 0.25]
    assert "0.2500" in report_of(tmp_path)


def test_missing_results_are_dashes_and_never_the_best(tmp_path):
    for name, all_latents in (("a", -1.0), ("b", 0.8), ("c", 0.9)):  # -1 with `lower_vram_usage`
        write_probing(tmp_path, name, all_latents=all_latents)
    saes = read_results(tmp_path)
    column = "Accuracy with all latents ↑"
    cells = {name: row[column] for name, row in rows_of(group_tables(groups_of(saes)), "Sparse probing").items()}
    assert {name: cell.text for name, cell in cells.items()} == {"a": "-", "b": "0.800", "c": "0.900"}
    assert [name for name, cell in cells.items() if cell.is_best] == ["c"]
    assert column not in rows_of(sae_tables(saes[:1]), "Sparse probing")["a"]


def test_a_mean_is_over_the_seeds_whose_value_was_computed(tmp_path):
    write_core(tmp_path, "a_seed0", ce_loss_score=-1)  # what SAEBench writes for NaN
    write_core(tmp_path, "a_seed1", ce_loss_score=-0.5)  # worse than zeros at the hook
    [row] = rows_of(group_tables(groups_of(read_results(tmp_path))), "Reconstruction").values()
    assert row["CE loss score (loss recovered) ↑"].text == "-0.5000 (n=1)"


def test_a_cosine_of_minus_one_is_a_number(tmp_path):
    path = write_mmcs(tmp_path, "a", ["b"])
    path.write_text(path.read_text().replace("0.512", "-1.0"))
    rows = rows_of(sae_tables(read_results(tmp_path)), "Similarity of seeds")
    assert rows["a"]["MMCS of decoders ↑"].text == "-1.000"


def test_densities_that_were_not_computed_are_not_those_of_dead_latents(tmp_path):
    path = write_core(tmp_path, "a", ours=False)
    result = json.loads(path.read_text())
    result["eval_result_metrics"]["misc_metrics"]["frac_alive"] = 0.0  # what core writes without densities
    result["eval_result_details"] = [{"index": i, "feature_density": -1, "encoder_bias": -1.0} for i in range(4)]
    path.write_text(json.dumps(result))
    [sae] = saes = read_results(tmp_path)
    assert (DEAD.of(sae), figures(saes, groups_of(saes))) == (None, [])
    assert sae.get("core", "eval_result_details")[0] == {"index": 0, "feature_density": None, "encoder_bias": -1.0}


def test_unfinished_files_are_passed_over(tmp_path):
    write_core(tmp_path, "a")
    write_probing(tmp_path, "a").write_text('{"eval_type_id": "spa')
    assert [TOP_1.of(sae) for sae in read_results(tmp_path)] == [None]


def test_a_folder_without_results_is_refused(tmp_path):
    (tmp_path / "eval_results" / "core").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"holds no \*_eval_results\.json; pass the output_dir of a finished run_evals"
    ):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def stamped(**stamp):
    return {"architecture": "topk", "sae_lens_sampled": stamp}


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"sae_cfg_dict": stamped(sae="b", model="x")}, "The evals of one were run on different weights or configs."),
        (
            {"sae_cfg_dict": stamped(sae="a", model="y")},
            "By their fingerprints the results are from 2 different models",
        ),
        ({"eval_config": {"model_name": "small_lm", "k_values": [9]}}, "run with 2 different configurations"),
    ],
)
def test_what_makes_numbers_incomparable_is_noted(tmp_path, fields, note):
    for name, other in (("one", fields), ("two", {})):
        write_core(tmp_path, name, sae_cfg_dict=stamped(sae="a" if name == "one" else "c", model="x"))
        write_probing(tmp_path, name, **other)
    html = report_of(tmp_path)
    assert note in Page(html).text
    write_probing(tmp_path, "one")
    assert notes(read_results(tmp_path)) == []


def test_every_figure_is_there_with_a_caption(tmp_path):
    page = Page(report_of(write_all(tmp_path)))
    assert {attrs["id"] for tag, attrs in page.tags if tag == "figure"} == FIGURES
    assert [tag for tag, _ in page.tags].count("figcaption") == len(FIGURES)
    assert "Random directions reach 0.257." in page.text


def test_pareto_plots_have_a_mark_per_sae_and_the_means_with_their_errors(tmp_path):
    saes = read_results(write_all(tmp_path))
    plot = next(figure.plot for figure in figures(saes, groups_of(saes)) if figure.key == "fvu-probing")
    assert [(list(trace.x), list(trace.y)) for trace in plot.data if trace.showlegend is None] == [
        ([0.20, 0.26], [0.61, 0.64]),
        ([0.31, 0.33], [0.72, 0.79]),
    ]
    means = [trace for trace in plot.data if trace.showlegend is False]
    assert [trace.x[0] for trace in means] == pytest.approx([0.23, 0.32])
    assert [trace.error_x.array[0] for trace in means] == [0, 0]  # an interval from two seeds would fill the plot


def test_means_of_three_seeds_have_their_interval_in_a_plot(tmp_path):
    write_core(write_all(tmp_path), "topk_seed2", fvu=0.29)
    write_probing(tmp_path, "topk_seed2", 0.67)
    saes = read_results(tmp_path)
    plot = next(figure.plot for figure in figures(saes, groups_of(saes)) if figure.key == "fvu-probing")
    of_three, of_two = [trace for trace in plot.data if trace.showlegend is False]
    # FVU 0.20, 0.26, 0.29 and accuracy 0.61, 0.64, 0.67: standard deviations 0.0458 and 0.03, times 4.303 / sqrt(3).
    assert [of_three.error_x.array[0], of_three.error_y.array[0]] == pytest.approx([0.1138, 0.0745], abs=1e-4)
    assert of_two.error_y.array[0] == 0


def test_a_mean_in_a_plot_is_that_of_the_marks_around_it(tmp_path):
    write_core(write_all(tmp_path), "topk_seed2", fvu=0.9)  # without an accuracy
    saes = read_results(tmp_path)
    plot = next(figure.plot for figure in figures(saes, groups_of(saes)) if figure.key == "fvu-probing")
    assert [list(trace.x) for trace in plot.data if trace.showlegend is None] == [[0.20, 0.26], [0.31, 0.33]]
    assert [trace.x[0] for trace in plot.data if trace.showlegend is False] == pytest.approx([0.23, 0.32])


def test_density_shares_and_the_dead_add_up_to_all_latents(tmp_path):
    write_core(tmp_path, "a")
    saes = read_results(tmp_path)
    plot = next(figure.plot for figure in figures(saes, groups_of(saes)) if figure.key == "densities")
    assert (plot.data[0].name, plot.data[0].line.shape) == ("a: 1 of 4 dead", "hv")
    assert sum(plot.data[0].y) == pytest.approx(3 / 4)
    # log10 of 0.003, 0.02 and 0.4 is -2.52, -1.70 and -0.40: each is in the step that starts at or below it.
    filled = [x for x, y in zip(plot.data[0].x, plot.data[0].y, strict=True) if y]
    assert filled == pytest.approx([-2.6, -1.8, -0.4])


def test_heat_map_rows_are_the_saes_whose_latents_are_looked_for(tmp_path):
    write_mmcs(tmp_path, "a", ["b"])
    path = write_mmcs(tmp_path, "b", ["a"])
    path.write_text(path.read_text().replace("0.512", "0.634"))
    saes = read_results(tmp_path)
    heat_map = figures(saes, groups_of(saes))[0].plot.data[0]
    assert [list(row) for row in heat_map.z] == [[None, 0.512], [0.634, None]]
    assert (list(heat_map.y), heat_map.zmin, heat_map.zmax) == (["a", "b"], 0.2571, 0.634)


@pytest.mark.parametrize(("n_saes", "wide"), [(6, set()), (7, {"densities", "deciles", "mmcs"})])
def test_figures_with_a_line_per_sae_take_the_whole_width_for_many(tmp_path, n_saes, wide):
    page = Page(report_of(write_all(tmp_path, [f"topk_seed{i}" for i in range(n_saes)])))
    assert {attrs["id"] for tag, attrs in page.tags if tag == "figure" and attrs.get("class") == "wide"} == wide


HOSTILE = '</script><script>alert("x")</script><img src=http://a.b/c>&amp;'


def test_names_and_texts_are_escaped(tmp_path):
    context = {"activation": 3.14, "before": f"one\n{HOSTILE}", "token": " ", "after": "\ttwo"}
    contexts = [{"latent": 7, "density": 0.02, "mass_share": 0.01, "contexts": [context]}]
    write_core(tmp_path, "a", contexts=contexts, sae_lens_release_id=HOSTILE, architecture=HOSTILE)
    html = report_of(tmp_path)
    page = Page(html)
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert "<script>alert" not in html
    assert f"one⏎{HOSTILE}␣⇥two" in page.text
    assert "<script>" not in (tmp_path / "report.md").read_text()


def test_page_loads_nothing_and_has_plotly_once(tmp_path):
    html = report_of(write_all(tmp_path))
    page = Page(html)
    loaded = [attrs.get(name) for _, attrs in page.tags for name in ("src", "href") if name in attrs]
    assert loaded == ["data:,"]
    assert not [
        rule for rule in re.findall(r"<style>(.*?)</style>", html, re.DOTALL) if re.search(r"url\(|@import", rule)
    ]
    assert html.count("Plotly.newPlot(") == len(FIGURES)
    assert len(re.findall(r"<script[^>]*>\s*/\*\*\s*\* plotly.js", html)) == 1


def test_markdown_has_the_same_tables_with_the_best_in_bold(tmp_path):
    write_report(write_all(tmp_path))
    markdown = re.sub(" +", " ", (tmp_path / "report.md").read_text())
    assert "- Model: small_lm\n- Hook: blocks.3.hook_resid_post\n- SAEs: 4 in 2 groups" in markdown
    assert "- Date: 2023-11-14" in markdown
    assert "**0.2300 ± 0.3812**" in markdown
    assert "| 0.3200 ± 0.1271 |" in markdown
    assert markdown.count("### Reconstruction") == 2
    assert not list(tmp_path.glob("*.unfinished"))


def test_the_command_refuses_in_one_sentence(tmp_path):
    """That it prints the path of the page is tested in `test_saebench_cli.py`."""
    refused = CliRunner().invoke(app, ["report", str(tmp_path / "nothing")])
    assert refused.exit_code == 1
    assert "is not a folder; pass the output_dir of" in refused.stderr
    assert refused.stderr.count("\n") == 1


LIST_LOADED = """<script>addEventListener("load", () => setTimeout(() => {
    const loaded = performance.getEntriesByType("resource").map(entry => entry.name)
    document.title = `loaded: ${JSON.stringify(loaded)}`
}, 1000))</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_loads_nothing_draws_every_figure_and_reports_no_error(tmp_path):
    contexts = [{"latent": 7, "density": 0.02, "mass_share": 0.01, "contexts": []}]
    path = write_report(write_all(tmp_path, contexts=contexts))
    with path.open("a") as file:
        file.write(LIST_LOADED)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags += ["--virtual-time-budget=10000", "--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'user'}"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "<title>loaded: []</title>" in done.stdout
    classes = [(attrs.get("class") or "").split() for _, attrs in Page(done.stdout).tags]
    assert sum("js-plotly-plot" in names for names in classes) == len(FIGURES)
    assert sum("main-svg" in names for names in classes) >= len(FIGURES)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
