"""The benchmark of nested losses: a killed run ends like an undisturbed one, and pages match their results."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from sae_lens.synthetic import OrthogonalizationConfig, SyntheticModel, SyntheticModelConfig

from benchmark import run as script
from benchmark import training
from benchmark.configs import BENCHMARKS, DICTIONARIES, FACTORIAL, SMALL, SYNTH_SAE_BENCH_16K, TUNING
from benchmark.factorial import cells
from benchmark.page import render_pages
from benchmark.plan import BenchmarkUnit, Data, new_sae, streams, units
from benchmark.report import BenchmarkSummary, result_table
from study import known_features
from study import run as study_script
from study.known_features import large_synthetic_model

EVAL = Path(__file__).parents[2] / "eval"
FEATURES = SyntheticModelConfig(num_features=32, hidden_dim=8, seed=0)
TOY = replace(
    SMALL,
    data={"toy": Data("toy", FEATURES, 128)},
    arms={name: SMALL.arms[name] for name in ("matryoshka", "nested_light")},
    ks=(2,),
    n_seeds=1,
    batch_size=32,
    samples=32 * 12,
    eval_samples=256,
)


def test_the_committed_pages_are_those_of_the_committed_results():
    for page, text in render_pages(EVAL / "results").items():
        assert (EVAL / page).read_text() == text


@pytest.mark.parametrize("benchmark", [SMALL, TUNING, DICTIONARIES, FACTORIAL], ids=lambda benchmark: benchmark.name)
def test_committed_results_are_those_of_the_plan(benchmark):
    results = result_table(benchmark, EVAL / "results" / f"benchmark_{benchmark.name}").load()
    assert {unit.key for unit in units(benchmark)} == results.keys()


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=BENCHMARKS)
def test_every_arm_can_be_made(benchmark):
    of_one_seed = replace(benchmark, n_seeds=1, device="cpu")
    for unit in itertools.islice(units(of_one_seed), len(benchmark.arms)):
        sae = new_sae(of_one_seed, unit)
        assert sae.cfg.k == unit.k
        assert sae.cfg.d_sae == benchmark.data[unit.data].d_sae


def test_arms_of_a_stream_start_from_the_same_weights():
    weights = []
    for arm in TOY.arms:
        torch.manual_seed(3)
        weights.append(new_sae(TOY, BenchmarkUnit("toy", 2, 3, arm)).W_dec)
    assert torch.equal(*weights)


def test_samples_depend_on_their_place_alone():
    data = SyntheticModel(FEATURES)
    fresh = [batch["data"] for batch in itertools.islice(training.stream(data.sample, 4, 0), 4)]
    torch.manual_seed(99)
    resumed = [batch["data"] for batch in itertools.islice(training.stream(data.sample, 4, 8), 2)]
    assert all(torch.equal(a, b) for a, b in zip(fresh[2:], resumed, strict=True))
    assert not torch.equal(fresh[0], fresh[1])


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    together = list(units(TOY))
    want = list(training.run(TOY, together, tmp_path / "undisturbed"))
    kept = replace(TOY, n_checkpoints=4)
    stream = training.stream

    def killed(*args):
        yield from itertools.islice(stream(*args), 7)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "stream", killed)
        with pytest.raises(KeyboardInterrupt):
            list(training.run(kept, together, tmp_path / "killed"))
    (checkpoint,) = (tmp_path / "killed" / "toy-2-0").glob("*/*")
    assert 0 < int(checkpoint.name) < TOY.samples
    half = checkpoint.with_name(str(TOY.samples - 32))
    half.mkdir()  # left by a run that was killed while writing a checkpoint
    written = []
    monkeypatch.setattr(
        training, "finish_checkpoint", lambda checkpoint_path: written.append(int(checkpoint_path.name))
    )
    assert list(training.run(kept, together, tmp_path / "killed")) == want
    assert len(written) == 2  # of four checkpoints, those not reached before the kill


def test_arms_may_be_trained_by_several_processes_and_in_other_sets(tmp_path, monkeypatch):
    together = list(units(TOY))
    want = list(training.run(TOY, together, tmp_path / "together"))
    kept = replace(TOY, n_checkpoints=4)
    assert [next(training.run(kept, [unit], tmp_path / "apart")) for unit in together] == want
    assert len(list((tmp_path / "apart" / "toy-2-0").glob("*/*/whole"))) == 2

    list(training.run(kept, together, tmp_path / "resumed"))
    stream = training.stream

    def resumed(sample, batch_size, n_seen):
        assert n_seen == 32 * 10  # resumed from the last checkpoint of another set of arms
        return stream(sample, batch_size, n_seen)

    monkeypatch.setattr(training, "stream", resumed)
    assert list(training.run(kept, together[1:], tmp_path / "resumed")) == want[1:]


def test_arms_say_steps_and_pools_as_shares():
    share = replace(TOY.arms["nested_light"], pool_share=0.25, steps={"inner_loss_steps": 0.75})
    toy = replace(TOY, arms={"share": share}, ks=(2, 40))
    [unit] = units(toy)  # at k=40 the pool would be smaller than k
    sae = new_sae(toy, unit)
    assert (sae.cfg.n_candidates, sae.cfg.inner_loss_steps) == (32, 9)
    half = replace(toy, samples=toy.samples // 2)
    assert new_sae(half, unit).cfg.inner_loss_steps == 4


def test_every_latent_is_a_candidate_for_the_last_tenth_of_any_number_of_samples():
    for benchmark, last in ((SYNTH_SAE_BENCH_16K, 195_312), (BENCHMARKS["synth-sae-bench-16k-cpu"], 4882)):
        assert benchmark.steps == last
        unit = next(unit for unit in units(benchmark) if unit.arm == "winsorised_20_then_all")
        cfg = new_sae(replace(benchmark, device="cpu"), unit).cfg
        assert (cfg.pool_steps, cfg.n_candidates, cfg.score) == (round(0.9 * last), 500, "winsorised")


def test_the_factorial_has_all_sizes_and_shares():
    assert len(list(units(FACTORIAL))) == 3 * (4 * 3 * 9 - 2)  # a tenth of 64 latents is less than 8
    assert len(streams(FACTORIAL)) == 3 * 4 * 3
    unit = BenchmarkUnit("latents_256", 4, 0, "winsorised_30")
    cfg = new_sae(FACTORIAL, unit).cfg
    assert (cfg.n_candidates, cfg.k, cfg.pool_group_size, cfg.score) == (77, 4, 16, "winsorised")
    assert cfg.pool_steps == 900
    seeds = [data.features.seed for benchmark in BENCHMARKS.values() for data in benchmark.data.values()]
    assert (seeds.count(44), seeds.count(45)) == (4, 4)


def test_our_batchtopk_is_the_hosts(tmp_path):
    arms = {"ours": FACTORIAL.arms["batchtopk"], "theirs": SMALL.arms["batchtopk"]}
    # Use only the last step's thresholds: SAELens' running mean starts at 0, which still shows after so few steps.
    fields = {"topk_threshold_lr": 1.0}
    toy = replace(TOY, arms={name: replace(arm, fields=arm.fields | fields) for name, arm in arms.items()})
    toy.arms["ours"].fields["step"] = "kept"
    ours, theirs = (result["metrics"] for result in training.run(toy, list(units(toy)), tmp_path))
    assert ours == pytest.approx(theirs, rel=1e-3)


def test_the_plan_lists_the_cost_of_each_arm(capsys, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "small", replace(TOY, n_seeds=2))
    script.main(["--config", "small", "--time", "64", "--arms", "m*"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[2].strip() for line in lines if "toy" in line] == ["samples", "matryoshka"]
    assert "without evaluation" in lines[-1]


def test_parts_are_all_streams(tmp_path, monkeypatch):
    monkeypatch.setitem(BENCHMARKS, "factorial", replace(TOY, name="factorial", n_seeds=3))
    trained = []
    monkeypatch.setattr(script, "run", lambda benchmark, together, work: trained.append(together) or iter(()))
    for part in ("1/2", "2/2"):
        script.main(["--config", "factorial", "--part", part, "--results-dir", str(tmp_path)])
    assert [units[0].seed for units in trained] == [0, 2, 1]
    with pytest.raises(SystemExit, match="--part 3/2"):
        script.main(["--config", "factorial", "--part", "3/2", "--results-dir", str(tmp_path)])


def test_differences_are_of_the_same_weights_at_the_start():
    metrics = [("batchtopk", 0, 0.5), ("batchtopk", 1, 0.7), ("nested", 0, 0.6), ("nested", 2, 0.9)]
    results = {("features_42", 4, arm, seed): {"metrics": {"f1": value}} for arm, seed, value in metrics}
    summary = BenchmarkSummary(SMALL, results)
    difference = summary.difference("nested", "batchtopk", 4, "f1")
    assert difference is not None
    assert difference.mean == pytest.approx(0.1)
    assert difference.n == 1
    assert summary.mean("topk", 4, "f1") is None
    assert summary.values("batchtopk", 4, "absorbed") == {}  # a metric that older results lack
    assert summary.seeds() == "3 seeds with features of seed 42, 0 seeds with features of seed 43"


def test_a_pool_wins_by_intervals_over_seeds_and_a_bound_on_fvu():
    better, worse, noisy = (0.1, 0.11, 0.12), (-0.1, -0.11, -0.12), (0.1, 0.5, -0.2)
    wins = {}
    for percent, (f1, mcc, fvu) in {10: (better, better, 0.004), 20: (better, better, 0.006), 30: (better, worse, 0.0),
                                    40: (noisy, better, 0.0)}.items():  # fmt: skip
        results = {}
        for seed in range(3):
            results["latents_128", 4, "batchtopk", seed] = {"metrics": {"f1": 0.5, "mcc": 0.5, "fvu": 0.25}}
            metrics = {"f1": 0.5 + f1[seed], "mcc": 0.5 + mcc[seed], "fvu": 0.25 + fvu}
            results["latents_128", 4, f"l2_{percent}", seed] = {"metrics": metrics}
        [cell] = cells(BenchmarkSummary(FACTORIAL, results))
        assert (cell.d_sae, cell.k, cell.score, cell.percent) == (128, 4, "l2", percent)
        assert cell.pool_factor == pytest.approx(percent / 100 * 128 / 4)
        wins[percent] = cell.wins
    assert wins == {10: True, 20: False, 30: False, 40: False}


def test_a_table_of_differences_is_over_dictionaries_and_corrected():
    values = {"batchtopk": (0.5, 0.6, 0.55), "groups": (0.6, 0.7, 0.66), "topk": (0.5, 0.7, 0.5)}
    results = {
        (f"features_{51 + i}", 4, arm, 0): {"metrics": {"f1": value}}
        for arm, of_arm in values.items()
        for i, value in enumerate(of_arm)
    }
    plain, topk, groups = BenchmarkSummary(DICTIONARIES, results).difference_table(4).splitlines()[2:]
    assert plain.startswith("| BatchTopK | 0.550 [0.426, 0.674] | - |")
    assert "| **+0.103 [+0.089, +0.118]** |" in groups
    assert "| +0.017 [-0.173, +0.206] |" in topk


def test_the_benchmark_itself_is_as_published():
    data = SYNTH_SAE_BENCH_16K.data["features_42"]
    assert (data.features.num_features, data.features.hidden_dim, data.d_sae) == (16_384, 768, 4096)
    assert (SYNTH_SAE_BENCH_16K.samples, SYNTH_SAE_BENCH_16K.batch_size, SYNTH_SAE_BENCH_16K.ks) == (
        200_000_000,
        1024,
        (25, 20),
    )
    assert SYNTH_SAE_BENCH_16K.arms["matryoshka"].fields["use_matryoshka_aux_loss"]


def test_features_in_closed_form_are_the_hosts(tmp_path):
    config = replace(FEATURES, orthogonalization=OrthogonalizationConfig(num_steps=30, lr=0.01), bias=0.5)
    theirs, ours = SyntheticModel(config), large_synthetic_model(config, "cpu", tmp_path)
    vectors = theirs.feature_dict.feature_vectors
    assert (vectors - SyntheticModel(FEATURES).feature_dict.feature_vectors).abs().max() > 0.05
    assert torch.allclose(ours.feature_dict.feature_vectors, vectors, atol=1e-5)
    with pytest.MonkeyPatch.context() as patched:
        patched.delattr(known_features, "orthogonalized")  # not needed: the features were saved
        again = large_synthetic_model(config, "cpu", tmp_path)
    assert torch.equal(again.feature_dict.feature_vectors, ours.feature_dict.feature_vectors)
    torch.manual_seed(0)
    want = theirs.sample(64)
    torch.manual_seed(0)
    assert torch.allclose(ours.sample(64), want, atol=1e-4)


def test_many_features_are_sampled_in_parts(tmp_path):
    features = replace(FEATURES, orthogonalization=OrthogonalizationConfig(num_steps=3))
    toy = replace(TOY, data={"toy": Data("toy", features, 128, large=True)})
    model, sample = training.features_of(toy.data["toy"], "cpu", tmp_path)
    torch.manual_seed(5)
    samples = sample(100)
    torch.manual_seed(5)
    assert torch.allclose(samples, torch.cat([model.sample(64), model.sample(36)]), atol=1e-5)
    results = list(training.run(toy, list(units(toy)), tmp_path))
    assert [result["arm"] for result in results] == ["matryoshka", "nested_light"]


@pytest.mark.parametrize(("of", "options"), [(study_script, ["tiny", "--status"]), (script, ["small", "--report"])])
def test_a_misspelt_arm_is_an_error_that_names_those_there_are(of, options, tmp_path):
    with pytest.raises(SystemExit, match=r"^--arms batchtok matches no arm; available: .*batchtopk"):
        of.main(["--config", *options, "--arms", "batchtopk", "batchtok", "--results-dir", str(tmp_path)])
