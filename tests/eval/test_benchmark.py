"""The benchmark of nested losses: a killed run ends as an undisturbed one; the page is of the results."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from sae_lens.synthetic import OrthogonalizationConfig, SyntheticModel, SyntheticModelConfig

from benchmark import run as script
from benchmark.configs import BENCHMARKS, SMALL, SYNTH_SAE_BENCH_16K, TUNING
from benchmark.plan import BenchmarkUnit, Data, new_sae, units
from benchmark.report import BenchmarkSummary, render_nested_page, result_table
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


def test_the_committed_page_is_that_of_the_committed_results():
    assert render_nested_page(EVAL / "results") == (EVAL / "NESTED.md").read_text()


@pytest.mark.parametrize("benchmark", [SMALL, TUNING], ids=lambda benchmark: benchmark.name)
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
    fresh = [batch["data"] for batch in itertools.islice(script.stream(data, 4, 0), 4)]
    torch.manual_seed(99)
    resumed = [batch["data"] for batch in itertools.islice(script.stream(data, 4, 8), 2)]
    assert all(torch.equal(a, b) for a, b in zip(fresh[2:], resumed, strict=True))
    assert not torch.equal(fresh[0], fresh[1])


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, monkeypatch):
    together = list(units(TOY))
    want = list(script.run(TOY, together, tmp_path / "undisturbed"))
    kept = replace(TOY, n_checkpoints=4)
    stream = script.stream

    def killed(*args):
        yield from itertools.islice(stream(*args), 7)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(script, "stream", killed)
        with pytest.raises(KeyboardInterrupt):
            list(script.run(kept, together, tmp_path / "killed"))
    (checkpoint,) = (tmp_path / "killed" / "toy-2-0").iterdir()
    assert 0 < int(checkpoint.name) < TOY.samples
    half = checkpoint.with_name(str(TOY.samples - 32))
    half.mkdir()  # of a run that was killed while it was writing one
    written = []
    monkeypatch.setattr(script, "finish_checkpoint", lambda checkpoint_path: written.append(int(checkpoint_path.name)))
    assert list(script.run(kept, together, tmp_path / "killed")) == want
    assert len(written) == 2  # of the four, those that were not passed before


def test_differences_are_of_the_same_weights_at_the_start():
    metrics = [("batchtopk", 0, 0.5), ("batchtopk", 1, 0.7), ("nested", 0, 0.6), ("nested", 2, 0.9)]
    results = {("features_42", 4, arm, seed): {"metrics": {"f1": value}} for arm, seed, value in metrics}
    summary = BenchmarkSummary(SMALL, results)
    difference = summary.difference("nested", "batchtopk", 4, "f1")
    assert difference is not None
    assert difference.mean == pytest.approx(0.1)
    assert difference.n == 1
    assert summary.mean("topk", 4, "f1") is None
    assert summary.seeds() == "3 seeds with features of seed 42, 0 seeds with features of seed 43"


def test_the_benchmark_itself_is_as_published():
    data = SYNTH_SAE_BENCH_16K.data["features_42"]
    assert (data.features.num_features, data.features.hidden_dim, data.d_sae) == (16_384, 768, 4096)
    assert (SYNTH_SAE_BENCH_16K.samples, SYNTH_SAE_BENCH_16K.batch_size, SYNTH_SAE_BENCH_16K.ks) == (
        200_000_000,
        1024,
        (25, 20),
    )
    assert SYNTH_SAE_BENCH_16K.arms["matryoshka"].fields["use_matryoshka_aux_loss"]


def test_features_in_closed_form_are_the_hosts():
    config = replace(FEATURES, orthogonalization=OrthogonalizationConfig(num_steps=30, lr=0.01), bias=0.5)
    theirs, ours = SyntheticModel(config), large_synthetic_model(config, "cpu")
    vectors = theirs.feature_dict.feature_vectors
    assert (vectors - SyntheticModel(FEATURES).feature_dict.feature_vectors).abs().max() > 0.05
    assert torch.allclose(ours.feature_dict.feature_vectors, vectors, atol=1e-5)
    torch.manual_seed(0)
    want = theirs.sample(64)
    torch.manual_seed(0)
    assert torch.allclose(ours.sample(64), want, atol=1e-4)


@pytest.mark.parametrize(("of", "options"), [(study_script, ["tiny", "--status"]), (script, ["small", "--report"])])
def test_a_misspelt_arm_is_an_error_that_names_those_there_are(of, options, tmp_path):
    with pytest.raises(SystemExit, match=r"^--arms batchtok matches no arm; there are .*batchtopk"):
        of.main(["--config", *options, "--arms", "batchtopk", "batchtok", "--results-dir", str(tmp_path)])
