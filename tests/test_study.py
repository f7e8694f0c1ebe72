"""The study in eval/: its plan, and that what it computes does not depend on when it was stopped."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

EVAL = Path(__file__).parent.parent / "eval"
sys.path.insert(0, str(EVAL))

from sae_lens_sampled import load_checkpoint  # noqa: E402
from sae_lens_sampled.selection import count_candidates  # noqa: E402
from studies.configs import PYTHIA, TINY, smoke  # noqa: E402
from studies.costs import format_plan  # noqa: E402
from studies.dictionaries import overlap  # noqa: E402
from studies.evaluation import batches_of_training, halves, in_training  # noqa: E402
from studies.plan import (  # noqa: E402
    Unit,
    arms,
    compared,
    runs,
    sae_config,
    synthetic_config,
    synthetic_units,
    units,
)
from studies.storage import Storage  # noqa: E402
from studies.summary import Summary, estimate_over_pairs, shown  # noqa: E402
from studies.training import train  # noqa: E402

SMOKE = smoke(TINY)
COMMAND = [sys.executable, "-W", "ignore", str(EVAL / "study.py"), "--config", "tiny", "--smoke", "--arms"]
ARMS = ["batchtopk", "pool_5", "pool_5_global"]
N_KILLS = int(os.environ.get("STUDY_KILLS", "2"))
"""`STUDY_KILLS=10 pytest tests/test_study.py -k killed` takes some minutes."""


def storage(folder, study=SMOKE):
    return Storage(study, folder / "results", folder / "work")


def unit(name, seed=0, study=SMOKE):
    return Unit({arm.name: arm for arm in arms(study)}[name], seed)


@pytest.mark.parametrize("study", [TINY, PYTHIA, smoke(PYTHIA)], ids=lambda study: study.name)
def test_every_export_has_an_sae_that_is_trained_once(study):
    trained = [one.name for run in runs(study) for one in run]
    assert len(trained) == len(set(trained))
    assert {one.trained for one in units(study)} == set(trained)
    assert len({one.name for one in units(study)}) == len(units(study))
    assert all(len({(one.seed, one.arm.shuffled) for one in run}) == 1 for run in runs(study))


def test_the_smoke_run_has_the_plan_of_the_study_it_stands_for():
    def plan(study):
        return [(arm.name, arm.config, arm.fields.get("score")) for arm in arms(study)]

    assert plan(smoke(PYTHIA)) == plan(PYTHIA)
    assert [(a.name, b.name) for a, b in compared(smoke(PYTHIA))] == [(a.name, b.name) for a, b in compared(PYTHIA)]


def test_the_dry_run_says_what_it_would_take():
    text = format_plan(PYTHIA)
    trained = sum(len(run) for run in runs(PYTHIA))
    assert f"{trained} SAEs in {len(runs(PYTHIA))} runs" in text
    assert f"{len(units(PYTHIA))} exports" in text
    assert f"{len(synthetic_units(PYTHIA))} SAEs of 512,000 samples" in text
    assert f"{50_000 * 4096 * trained:,} through SAEs" in text
    assert all(f"\n{arm.name} " in text for arm in arms(PYTHIA))
    assert "GPU hours" in text


def test_an_sae_is_the_same_in_whichever_run_it_is_trained(tmp_path):
    together, alone = storage(tmp_path / "together"), storage(tmp_path / "alone")
    train(together, [unit("batchtopk"), unit("pool_5"), unit("pool_all")])
    train(alone, [unit("pool_5")])
    weights = [(one.sae(unit("pool_5")) / "sae_weights.safetensors").read_bytes() for one in (together, alone)]
    assert weights[0] == weights[1]


def test_a_pool_of_all_latents_is_batchtopk_in_the_study_too(tmp_path):
    one = storage(tmp_path)
    train(one, [unit("batchtopk"), unit("topk"), unit("pool_all")])
    saes = [load_checkpoint(one.sae(unit(name))) for name in ("batchtopk", "pool_all", "topk")]
    torch.testing.assert_close(saes[0].W_dec, saes[1].W_dec, rtol=0, atol=0)
    assert not torch.equal(saes[0].W_dec, saes[2].W_dec)


def test_results_of_other_settings_are_refused(tmp_path):
    one, other = storage(tmp_path), storage(tmp_path, replace(SMOKE, lr=1e-4))
    one.save(one.on_model(unit("topk")), {"metrics": {}})
    assert one.is_done(one.on_model(unit("topk")))
    with pytest.raises(ValueError, match="other settings; move the folder away"):
        other.is_done(one.on_model(unit("topk")))
    more = storage(tmp_path, replace(SMOKE, n_seeds=7, device="cuda"))  # another portion of the same study
    assert more.is_done(one.on_model(unit("topk")))


def test_means_and_paired_differences_have_the_errors_of_their_seeds(tmp_path):
    one = storage(tmp_path, replace(SMOKE, n_stability_seeds=3))
    for name, values in {"batchtopk": [0.1, 0.2, 0.6], "pool_5": [0.2, 0.4]}.items():
        for seed, value in enumerate(values):
            result = {"metrics": {"fvu": value}, "pools": {"starved_share": 0.25}, "thresholds": {"global": {"l0": 8}}}
            one.save(one.on_model(unit(name, seed)), result)
    summary = Summary(one)
    assert shown(summary.mean("batchtopk", "fvu"), "fvu") == "0.300 ± 0.153"  # std 0.2646 over the root of 3
    assert shown(summary.difference("pool_5", "batchtopk", "fvu"), "fvu", signed=True) == "+0.150 ± 0.050"
    assert shown(summary.mean("pool_5", "starved_share")) == "0.250 ± 0.000"
    assert shown(summary.mean("pool_5", "global.l0"), "global.l0") == "8.0 ± 0.0"
    assert shown(summary.mean("topk", "fvu")) == "-"


def test_the_error_over_pairs_leaves_out_a_seed_with_all_its_pairs():
    # Without seed 0, 1 and 2 the means are 0.6, 0.2 and 0.1: squares 0.09 + 0.01 + 0.04, times 2/3, the root is 0.3055.
    found = estimate_over_pairs({(0, 1): 0.1, (0, 2): 0.2, (1, 2): 0.6})
    assert (found.mean, found.error, found.n) == (pytest.approx(0.3), pytest.approx(0.30551, abs=1e-5), 3)
    assert estimate_over_pairs({(0, 1): 0.1, (1, 0): 0.3}).error is None


def test_dictionaries_too_large_to_be_matched_leave_a_dash(tmp_path):
    one = storage(tmp_path)
    arm = unit("topk").arm
    one.save(one.comparison(arm, arm), {"pairs": [{"matched": None, "seeds": [0, 1]}]})
    assert shown(Summary(one).similarity("topk", "topk", "matched")) == "-"


def test_the_overlap_of_two_sets_pairs_as_many_as_it_can():
    a = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 0, 1]])
    b = torch.tensor([[2.0, 0, 0], [3, -0.3, 0]])
    # Both of b are near the first of a; only the first of b is near the second of a too: two pairs, of 3 + 2 - 2.
    assert overlap(a, b) == overlap(b, a) == pytest.approx(2 / 3)
    assert overlap(a, a) == 1
    assert overlap(a[:1], -a[:1]) == 0


def test_the_control_of_a_frozen_pool_is_batchtopk_of_its_size():
    by_name = {arm.name: arm for arm in arms(TINY)}
    for factor in (3, 5):
        sampled = sae_config(TINY, by_name[f"pool_{factor}"], 0)
        narrow = sae_config(TINY, by_name[f"narrow_{factor}"], 0)
        assert (narrow.architecture(), narrow.d_sae) == ("batchtopk", count_candidates(16, sampled.pool_factor, 1024))
        assert synthetic_config(TINY, by_name[f"narrow_{factor}"], 0).d_sae == 5 * factor


def test_sampled_pools_are_drawn_for_every_batch_that_is_judged(tmp_path):
    one = storage(tmp_path)
    some = [unit("batchtopk"), unit("uniform_groups_16")]
    train(one, some)
    x = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0))
    dense, sampled = (in_training(one, each, x) for each in some)
    assert dense["l0_in_training"] == 8
    sae = load_checkpoint(one.sae(some[1]))
    parts = batches_of_training(SMOKE, some[1].arm, x)
    assert sorted(torch.cat(parts).sum(dim=1).tolist()) == sorted(x.sum(dim=1).tolist())
    residuals = [part - sae.decode(sae.select(part, draw=i)) for i, part in enumerate(parts)]
    fvu = sum(r.square().sum() for r in residuals) / (x - x.mean(dim=0)).square().sum()
    assert sampled["fvu_in_training"] == pytest.approx(fvu.item(), rel=1e-4)


def test_the_halves_of_a_text_take_turns():
    first, second = halves(torch.arange(20), n_tokens=4)
    assert (first.tolist(), second.tolist()) == (
        [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19],
        [4, 5, 6, 7, 12, 13, 14, 15],
    )


def test_saes_of_other_settings_are_not_taken_for_these(tmp_path):
    assert storage(tmp_path).sae(unit("topk")) != storage(tmp_path, replace(SMOKE, lr=1e-4)).sae(unit("topk"))
    assert storage(tmp_path).sae(unit("topk")) == storage(tmp_path, replace(SMOKE, n_seeds=9)).sae(unit("topk"))


def results_of(folder):
    return {str(path.relative_to(folder)): json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))}


def run_study(folder, kill_after=math.inf):
    """To the end, or until it is killed after so many seconds; whether it came to the end."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    file = folder.with_suffix(".log")
    with file.open("a") as log:
        process = subprocess.Popen([*COMMAND, *ARMS, "--work-dir", str(folder)], stdout=log, stderr=log, env=env)
        try:
            process.wait(None if kill_after == math.inf else kill_after)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert process.returncode in (0, -signal.SIGKILL), file.read_text()[-2000:]
    return process.returncode == 0


def test_a_study_that_was_killed_ends_with_the_same_results(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    moments = random.Random(0)
    with ThreadPoolExecutor() as beside:
        undisturbed = beside.submit(run_study, whole)
        for _ in range(N_KILLS):
            # From before anything is there (imports take some seconds) to some way into it.
            run_study(killed, kill_after=moments.uniform(5, 20))
        assert run_study(killed)
        assert undisturbed.result()
    want, got = results_of(whole / "results"), results_of(killed / "results")
    assert want == got
    kinds = {Path(name).parent.name for name in want}
    assert kinds == {"language_model", "synthetic", "dictionaries"}
    assert "pool 5, one pool" in (whole / "results" / "RESULTS.md").read_text()
    assert (whole / "results" / "similarity.png").exists()
