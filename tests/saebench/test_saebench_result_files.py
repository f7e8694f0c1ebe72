"""Result files that are truncated or malformed: named in the report, recomputed by `run_evals`."""

import html
import json

import pytest

pytest.importorskip("sae_bench")
pytest.importorskip("plotly")

from eval_helpers import run_small
from report_helpers import write_all, write_core
from typer.testing import CliRunner

from sae_lens_sampled.cli import app
from sae_lens_sampled.saebench.report import write_report
from sae_lens_sampled.saebench.results import STAMP


def report_of(folder):
    return write_report(folder).read_text()


DAMAGES = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "a number": lambda text: "3",
    "null": lambda text: "null",
    "another form": lambda text: '{"accuracy": 0.9}',
    "metrics of another form": lambda text: json.dumps(json.loads(text) | {"eval_result_metrics": [1]}),
    "details of another form": lambda text: json.dumps(json.loads(text) | {"eval_result_details": [1]}),
    "details by name": lambda text: json.dumps(json.loads(text) | {"eval_result_details": {"a": 1}}),
    "a config of another form": lambda text: json.dumps(json.loads(text) | {"sae_cfg_dict": [1]}),
    "fingerprints of another form": lambda text: json.dumps(json.loads(text) | {"sae_cfg_dict": {STAMP: 3}}),
    "a time of another form": lambda text: json.dumps(json.loads(text) | {"datetime_epoch_millis": "now"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_result_that_cannot_be_read_is_named_on_the_page_and_in_markdown(tmp_path, damage):
    write_all(tmp_path)
    file = tmp_path / "eval_results/core/topk_seed1_custom_sae_eval_results.json"
    file.write_text(DAMAGES[damage](file.read_text()))
    note = (
        "core/topk_seed1_custom_sae_eval_results.json is truncated or not a result, so it is left out: run that "
        "eval again, which replaces the file, or delete it."
    )
    assert note in html.unescape(report_of(tmp_path))
    assert f"> - {note}\n" in (tmp_path / "report.md").read_text()
    assert "core is missing for topk_seed1." in (tmp_path / "report.md").read_text()


def test_bytes_that_are_no_text_are_named_too(tmp_path):
    write_all(tmp_path)
    file = tmp_path / "eval_results/mmcs/topk_seed1_custom_sae_eval_results.json"
    file.write_bytes(b"\xff\xfe\x00")
    assert "mmcs/topk_seed1_custom_sae_eval_results.json is truncated" in report_of(tmp_path)


def test_where_there_is_no_result_one_sentence_says_so(tmp_path):
    way_out = "pass the output_dir of a finished run_evals (--output-dir of `eval`)."
    cases = {"nowhere": f"is not a folder; {way_out}", "empty": f"holds no *_eval_results.json; {way_out}"}
    (tmp_path / "empty").mkdir()
    broken = write_core(tmp_path / "broken", "topk")
    broken.write_text("[]")
    cases["broken"] = f"holds no readable *_eval_results.json, only the broken core/{broken.name}; {way_out}"
    for name, said in cases.items():
        result = CliRunner().invoke(app, ["report", str(tmp_path / name)])
        assert result.exit_code == 1
        assert result.stderr == f"output_dir={str(tmp_path / name)!r} {said}\n"


@pytest.mark.parametrize("damage", [lambda text: text[:1000], lambda text: "[]", lambda text: '{"a": 1}'])
def test_a_result_that_cannot_be_read_is_computed_again(saes, tmp_path, damage):
    [first] = run_small(saes[2:3], ["sparse_probing"], tmp_path)["sparse_probing"].values()
    [file] = (tmp_path / "eval_results" / "sparse_probing").iterdir()
    file.write_text(damage(file.read_text()))
    [second] = run_small(saes[2:3], ["sparse_probing"], tmp_path)["sparse_probing"].values()
    assert second["eval_result_metrics"] == first["eval_result_metrics"]
