"""The scripts that users copy, run as they would run them: by path, from another folder."""

import base64
import json
import re
import sys
from pathlib import Path

import pytest
from process_helpers import run_script

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    return lambda script, *arguments, cwd: run_script(EXAMPLES / script, *arguments, folder=cwd, log=log)


def test_quickstart_prints_its_table_reloads_without_the_plugin_and_draws(tmp_path, run):
    # Contexts so short that 16 prompts would not hold a batch.
    small = ["--steps", "12", "--d-sae", "256", "--batch-size", "256", "--context-size", "12"]
    output = run("quickstart.py", *small, cwd=tmp_path)
    rows = {
        line.split()[0]: line.split()[1:] for line in output.splitlines() if line.startswith(("batchtopk", "pool_"))
    }
    assert list(rows) == [
        "batchtopk",
        "pool_factor_1.5",
        "pool_factor_4",
        "pool_factor_16",
        "pool_factor_10_groups_of_16",
    ]
    for name, (fvu, l0, *_) in rows.items():
        assert 0 < float(fvu) < 1.5, name
        assert float(l0) == 16, name
    assert output.count(": jumprelu, ") == 5
    assert (tmp_path / "quickstart_output" / "quickstart.png").stat().st_size > 20_000


def test_the_buffer_of_the_papers_run_holds_two_batches():
    import train_pythia

    cfg = train_pythia.runner_config("output", log_to_wandb=False)
    assert cfg.n_batches_in_buffer * cfg.context_size == 2 * cfg.train_batch_size_tokens


def test_papers_run_works_on_the_bundled_model(tmp_path, run):
    output = run("train_pythia.py", "--smoke", cwd=tmp_path)
    assert "'pooled_latents': 80" in output
    assert (tmp_path / "pythia_output" / "sae" / "sae_weights.safetensors").exists()


def test_synthetic_example_reports_every_variant(tmp_path, run):
    lines = [line for line in run("synthetic.py", "--steps", "10", cwd=tmp_path).splitlines() if line.strip()]
    assert [line[:30].strip() for line in lines[-5:]] == [
        "BatchTopK",
        "pool_factor 3",
        "pool_factor 5",
        "pool_factor 5, groups of 16",
        "pool_factor 5, perplexity",
    ]


def test_transcoders_stand_beside_an_sae_on_the_output(tmp_path, run):
    # Contexts so short that 16 prompts would not hold a batch.
    small = ["--steps", "6", "--d-sae", "128", "--batch-size", "256", "--context-size", "12", "--eval-batches", "4"]
    output = run("transcoder.py", *small, cwd=tmp_path)
    rows = [line for line in output.splitlines() if line.endswith("%")]
    assert [line[:32].strip() for line in rows] == [
        "transcoder",
        "transcoder, groups of 16",
        "transcoder, skip",
        "transcoder, skip, groups of 16",
        "SAE on the output",
    ]
    for line in rows:
        fvu, l0, kept = line[32:].rstrip("%").split()
        assert 0 < float(fvu) < 1.5
        assert 8 < float(l0) < 32
        assert -100 < float(kept) < 100
    kinds = ["jumprelu_transcoder"] * 2 + ["jumprelu_skip_transcoder"] * 2 + ["jumprelu"]
    assert re.findall(r": (\w+), 128 to 128 dimensions", output) == kinds


def test_circuit_tracer_finds_the_latents_that_saelens_finds(tmp_path, monkeypatch, capsys):
    """Run in this process, to inspect the graph behind the printed table."""
    circuit_tracer = pytest.importorskip("circuit_tracer", reason="see examples/README.md")
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    import torch
    from sae_lens import SAE

    import attribution

    graphs, attribute = [], circuit_tracer.attribute
    monkeypatch.setattr(circuit_tracer, "attribute", lambda *a, **kw: graphs.append(attribute(*a, **kw)) or graphs[-1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attribution.py", "--steps", "6", "--d-sae", "128", "--batch-size", "256"])
    attribution.main()
    output, (graph,) = capsys.readouterr().out, graphs
    rows = [line.split() for line in output.splitlines() if re.match(r" +\d", line)]
    assert len(rows) == 10
    effects = [abs(float(row[-1])) for row in rows]
    assert effects == sorted(effects, reverse=True)
    assert effects[0] > 0
    hooked = attribution.load_model(attribution.parser(None, tmp_path).get_default("model")).hooked
    cache = hooked.run_with_cache(graph.input_tokens[None])[1]
    for block in range(4):
        sae = SAE.load_from_disk(next(tmp_path.glob(f"attribution_output/*/block_{block}")))
        acts = sae.encode(cache[attribution.hooks(block)[0]][0])
        acts[0] = 0  # circuit-tracer omits the first token
        of_block = graph.active_features[:, 0] == block
        assert torch.equal(acts.nonzero(), graph.active_features[of_block, 1:])
        torch.testing.assert_close(acts[acts > 0], graph.activation_values[of_block])


def test_evaluate_takes_two_seeds_through_every_eval_to_the_report(tmp_path, monkeypatch, capsys):
    """Run in this process with smaller evals, because it is the only script that otherwise takes minutes."""
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    from eval_helpers import SMALL

    import evaluate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "OVERRIDES", SMALL)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--steps", "10", "--d-sae", "192"])
    evaluate.main()
    output = re.sub(" +", " ", capsys.readouterr().out)
    assert "- Evals: core (4 SAEs), sparse_probing (4 SAEs), absorption (4 SAEs), mmcs (4 SAEs)" in output
    for kind in ("batchtopk", "sampled_topk"):
        assert output.count(f"| {kind} | {kind} | 2 |") == 5  # means over seeds: one row in each table
    assert (tmp_path / "evaluate_output" / "report.html").stat().st_size > 1_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["evaluate_output"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--steps", "2", "--seeds", "1", "--d-sae", "192"])
    with pytest.raises(SystemExit, match="holds a result that does not match this sae; choose another output_dir"):
        evaluate.main()


def test_what_export_and_upload_shows_first_is_what_it_uploads_however_often(tmp_path, monkeypatch, capsys, server):
    """Run in this process, where the client uses the test server as the Hub."""
    import export_and_upload

    small = "--steps", "4", "--max-tokens", "2048"

    def documented(*arguments):
        monkeypatch.setattr(sys, "argv", ["export_and_upload.py", *small, *arguments])
        export_and_upload.main()

    monkeypatch.chdir(tmp_path)
    documented()
    assert not server.repos
    for _ in range(2):
        documented("--repo-id", "you/my-sae")
        assert server.repos["you/my-sae"].n_commits == 5  # four SAEs and the card; nothing the second time
    staged = tmp_path / "export_output" / "for_the_hub"
    shown = {str(file.relative_to(staged)): file.read_bytes() for file in staged.rglob("*") if file.is_file()}
    assert {path: content for path, content in server.repos["you/my-sae"].files.items() if path in shown} == shown
    assert {path.split("/")[0] for path in shown} == {"README.md", "learnt", "calibrated", "l0_8", "pruned"}
    assert len(list(tmp_path.glob("export_output/checkpoints/*/final_*"))) == 1
    assert "Uploaded to " in capsys.readouterr().out


def test_dashboard_shows_the_ten_latents_whose_activation_is_most_concentrated(tmp_path, run):
    pytest.importorskip("sae_dashboard", reason="needs the extra `dashboard`")
    output = run("dashboard.py", "--steps", "12", cwd=tmp_path)
    latents, n_tokens = re.search(r"Latents ([\d, ]+) of 1024, on ([\d,]+) tokens", output).groups()
    page = (tmp_path / "dashboard_output" / "dashboard.html").read_text()
    data = page[page.index("return {", page.index("function defineData")) + len("return ") :]
    panels = json.JSONDecoder().raw_decode(data)[0]["DASHBOARD_DATA"]
    assert list(panels) == latents.split(", ")
    assert len(panels) == 10
    densities = [float(share) / 100 for share in re.findall(r"DENSITY = ([\d.]+)%", page)]
    assert len(densities) == 10
    assert min(densities) * int(n_tokens.replace(",", "")) > 49.8  # 50 firings; the printed share is rounded


def test_the_tutorial_begins_in_any_folder(tmp_path):
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    notebook = json.loads((EXAMPLES / "tutorial.ipynb").read_text())
    first, second = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"][:2]
    script = tmp_path / "cells.py"
    # Remove the examples folder, which only the tests have on their search path.
    script.write_text(
        f"import sys\nsys.path = [p for p in sys.path if p != {str(EXAMPLES)!r}]\n{first}\nSTEPS = 2\n{second}"
    )
    output = run_script(script, folder=tmp_path, log=tmp_path / "log")
    assert "2,048 tokens to train on, 32,768 held out, d_in 128" in output


SAID = {
    r"BatchTopK +FVU ([\d.]+)": ("0.129", 0.01),
    r"groups of 16 +FVU ([\d.]+)": ("0.130", 0.01),
    r"one pool +FVU ([\d.]+)": ("0.245", 0.02),
    r"sampled pool +FVU ([\d.]+)": ("0.61", 0.05),
    r"one pool +FVU .*latents that fire +(\d+)": ("84", 15),
    r"BatchTopK +the tenth .* has (\d+)%": ("24 %", 4),
    r"groups of 16 +the tenth .* has (\d+)%": ("23 %", 4),
    r"'one pool': ([\d.]+)": ("0.91", 0.02),
    r"'global': 'off by a factor of ([\d.]+)": ("1.35", 0.15),
    r"'per latent': 'off by a factor of ([\d.]+)": ("1.11", 0.05),
    r"groups_of_16_custom_sae +loss recovered ([\d.]+)": ("0.99", 0.005),
    r"BatchTopK +MMCS ([\d.]+)": ("0.50", 0.03),
    r"groups of 16 +MMCS ([\d.]+)": ("0.48", 0.03),
    r"MMCS .*random ([\d.]+)": ("0.28", 0.01),
}
"""By pattern of a printed number: the number as the tutorial's text states it, and the tolerance for other CPUs."""


def test_the_tutorial_was_run_from_top_to_bottom_and_says_what_came_out():
    notebook = json.loads((EXAMPLES / "tutorial.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    printed = "".join("".join(output.get("text", "")) for output in outputs)
    text = " ".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    for pattern, (stated, tolerance) in SAID.items():
        assert stated in text, stated
        found = float(re.search(pattern, printed)[1])
        assert found == pytest.approx(float(stated.removesuffix(" %")), abs=tolerance), pattern


def test_the_tutorial_draws_the_mechanism_as_the_docs_do():
    first = json.loads((EXAMPLES / "tutorial.ipynb").read_text())["cells"][0]
    [svg] = first["attachments"]["mechanism.svg"].values()
    assert base64.b64decode(svg) == (EXAMPLES.parent / "docs" / "mechanism.svg").read_bytes()
