"""The README is short, its links lead somewhere, and measured numbers are kept elsewhere."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(README.splitlines()) <= 140
    assert len(README.split()) <= 1200


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)", README)
    assert len(links) > 15
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []


def test_the_first_run_on_ones_own_model_comes_early():
    assert README[: README.index("LanguageModelSAETrainingRunner(cfg)")].count("\n") < 50


def test_what_it_says_of_speed_is_what_was_measured():
    rows = json.loads((ROOT / "eval" / "results" / "bench_training_step.json").read_text())["sections"]["large"]
    steps = [row["step_ms"] for row in rows if row["case"]["trained"]]
    pools = [side for side in steps[0] if side not in ("SAELens BatchTopK", "SAELens Matryoshka", "product")]
    ratios = [step["SAELens BatchTopK"] / step[side] for step in steps for side in pools]
    assert (int(min(ratios)), int(max(ratios))) == (4, 10)
    claim = "On CPUs, at d_sae 16k after 200 steps, a step is four to ten times as fast as SAELens' BatchTopK step."
    assert claim in " ".join(README.split())
    runs = json.loads((ROOT / "eval" / "results" / "bench_end_to_end_smollm2.json").read_text())["runs"]
    speed = {run["side"]: run["tokens_per_second"] for run in runs if run["source"] == "store"}
    assert round(speed["all latents"] / speed["SAELens BatchTopK"]) == 2
    assert "A whole run with SmolLM2-135M in the loop is about twice as fast." in " ".join(README.split())


def test_the_buffer_of_the_first_run_holds_two_batches():
    """With SAELens' defaults, 20 prompts of 128 tokens for batches of 4096, training does not start."""
    snippet = README[README.index("from sae_lens import LanguageModelSAERunnerConfig") : README.index("sae = Language")]
    names = {}
    exec(snippet, names)
    cfg = names["cfg"]
    assert cfg.n_batches_in_buffer * cfg.context_size == 2 * cfg.train_batch_size_tokens
    assert f"--n_batches_in_buffer {cfg.n_batches_in_buffer} --n_checkpoints 10 ..." in " ".join(README.split())


def test_no_measured_number_is_typed():
    """Numbers with a decimal point, percent or times sign count as measured, except those listed in `settings`."""
    settings = {"2508.21324", "6.54.9", "3.10", "3.13"}
    numbers = set(re.findall(r"\d+(?:\.\d+)+|\d+ ?[%\u00d7]|\d+x\b", README))
    assert numbers - settings == set()
    assert numbers >= {"2508.21324", "6.54.9"}  # the pattern does find numbers
