import numpy as np
import pytest
import torch

from sae_lens_sampled.metrics import QUANTILES, ActivationStatistics, fraction_of_variance_unexplained


@pytest.fixture
def stream():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(90, 7, generator=generator) * torch.linspace(0.2, 3, 7) + 5
    acts = (torch.randn(90, 20, generator=generator) - 1.2).relu() * torch.linspace(0.1, 4, 20)
    acts[:, [3, 11]] = 0
    return x, acts, x + torch.randn(90, 7, generator=generator) * 0.5


def statistics(stream, sizes):
    result = ActivationStatistics(7, 20)
    for parts in zip(*(tensor.split(sizes) for tensor in stream), strict=True):
        result.update(*parts)
    return result


@pytest.mark.parametrize("sizes", [[90], [30, 30, 30], [1, 59, 30]])
def test_numbers_do_not_depend_on_the_batches_and_are_those_of_plain_loops(stream, sizes):
    x, acts, x_hat = stream
    got = statistics(stream, sizes).summary()
    assert got["n_tokens"] == 90
    assert got["fvu"] == pytest.approx(fraction_of_variance_unexplained(x, x_hat).item(), rel=1e-12)
    rows = acts.tolist()
    l0 = [sum(value > 0 for value in row) for row in rows]
    assert got["l0"] == pytest.approx(sum(l0) / 90)
    assert got["l0_quantiles"] == pytest.approx(np.quantile(l0, QUANTILES).tolist())
    counts = [sum(row[j] > 0 for row in rows) for j in range(20)]
    assert got["dead_share"] == counts.count(0) / 20 == 0.1
    pairs = sum(abs(a - b) for a in counts for b in counts)
    assert got["gini"] == pytest.approx(pairs / (2 * 20 * sum(counts)))
    by_density = sorted(range(20), key=lambda j: (counts[j], j))
    mass = [sum(row[j] for row in rows) for j in by_density]
    want = [(mass[i] + mass[i + 1]) / sum(mass) for i in range(0, 20, 2)]
    assert got["mass_by_density_decile"] == pytest.approx(want, rel=1e-5)
    assert statistics(stream, sizes).density.tolist() == [count / 90 for count in counts]


def test_fvu_holds_where_the_mean_is_large_and_the_inputs_are_many(stream):
    x, acts, x_hat = (tensor.clone() for tensor in stream)
    shifted = statistics((x.double() + 1e4, acts, x_hat.double() + 1e4), [90]).summary()
    assert shifted["fvu"] == pytest.approx(statistics(stream, [90]).summary()["fvu"], rel=1e-6)


def test_the_mean_of_tokens_is_the_complement_of_sae_bench_legacy(stream):
    x, _, x_hat = stream
    error, variance = (x - x_hat).square().sum(dim=1), (x - x.mean(dim=0)).square().sum(dim=1)
    assert statistics(stream, [90]).summary()["fvu_mean_of_tokens"] == pytest.approx(
        (error / variance).mean().item(), rel=1e-5
    )


def test_an_sae_that_never_fires_has_no_mass_and_nothing_is_nan(stream):
    x, acts, x_hat = stream
    got = statistics((x, torch.zeros_like(acts), x_hat), [90]).summary()
    assert (got["l0"], got["dead_share"], got["gini"]) == (0, 1, 0)
    assert got["mass_by_density_decile"] == [0] * 10


def test_half_precision_does_not_overflow_and_the_only_token_of_a_batch_has_no_ratio(stream):
    x, acts, x_hat = stream
    large = ActivationStatistics(7, 20)
    large.update(x, (acts * 2000).half(), x_hat)
    assert large.summary()["mass_by_density_decile"] == pytest.approx(
        statistics(stream, [90]).summary()["mass_by_density_decile"], rel=1e-2
    )
    of_most = statistics([tensor[:60] for tensor in stream], [60]).summary()["fvu_mean_of_tokens"]
    with_one_more = statistics([tensor[:61] for tensor in stream], [60, 1]).summary()["fvu_mean_of_tokens"]
    assert with_one_more == pytest.approx(of_most, rel=1e-12)
