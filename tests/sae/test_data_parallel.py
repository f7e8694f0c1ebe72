"""One SAE on several processes: the same numbers as one process on the whole batch, identical on every rank."""

import dataclasses

import pytest
import torch
from helpers import config, sampled_sae, step_input
from hypothesis import given, settings
from hypothesis import strategies as st
from process_helpers import FORKS
from rank_worker import D_IN, D_SAE, TOKENS, K, work
from simulated_ranks import on_ranks

from sae_lens_sampled import SampledTopKTrainingSAE, SampledTopKTrainingSAEConfig, register_score
from sae_lens_sampled.sae.checks import check_groups, read_step
from sae_lens_sampled.step.kept_entries import choose_path
from sae_lens_sampled.step.reduced_scan import reduced_product
from sae_lens_sampled.step.scores import SCORES

ALL = {"pool_factor": D_SAE / K}
GROUPS = {"pool_group_size": 8}
DRAWN = {"pool_sampling": "proportional"}
COLUMNS = {"pool_factor": 2}  # a pool this small is computed by its columns
DYADIC = {"dyadic": True, "n_steps": 1, "rescale_acts_by_decoder_norm": False}
FAMILIES = [
    {},
    GROUPS,
    ALL,
    DRAWN,
    DRAWN | GROUPS,
    {"score": "entropy"},
    {"score": "perplexity"},
    {"score": "frequency"},
    {"score": "winsorised"},
    {"score": "ridge_leverage"},
    {"score": "squared_l2"} | DRAWN,
    {"score": "uniform"} | DRAWN,
    {"matryoshka_widths": [12, 48, 96]} | GROUPS,
    COLUMNS,
    {"matryoshka_widths": [12, 48, 96]} | COLUMNS,
    {"d_out": 6, "skip": True},
    {"pool_steps": 12, "matryoshka_widths": [12, 48, 96]} | GROUPS,
    {"pool_steps": 12} | COLUMNS,
]
DENSE = [{}, GROUPS, ALL, {"score": "ridge_leverage"}, DRAWN | GROUPS, {"pool_steps": 12}]
CASES = [
    *({"step": "kept"} | family for family in FAMILIES),
    *({"step": "dense"} | family for family in DENSE),
    *({"step": step} | DYADIC | family for step in ("kept", "dense") for family in ({}, GROUPS, COLUMNS)),
    {"step": "kept", "window": 1000, "n_steps": 5},
]
ON_FOUR = [CASES[0], CASES[1]]


def run(folder, cases, *counts):
    """Train all cases with each number of processes; returns `results[count][rank][case]`."""
    folder.mkdir()
    ranks = [(rank, count) for count in counts for rank in range(count)]
    processes = [FORKS.Process(target=work, args=(*which, cases, folder)) for which in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0] * len(ranks)
    return {count: [torch.load(folder / f"{count}_{rank}.pt") for rank in range(count)] for count in counts}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return run(folder / "two", CASES, 1, 2), run(folder / "four", ON_FOUR, 4)


def assert_same_training(one, ranks, dyadic=False):
    for name, want in one["state"].items():
        states = [rank["state"][name] for rank in ranks]
        assert all(torch.equal(state, states[0]) for state in states), name
        if dyadic or not want.is_floating_point():
            assert torch.equal(states[0], want), name
        else:
            torch.testing.assert_close(states[0], want, rtol=0, atol=1e-6, msg=name)
    since_fired = torch.stack([rank["since_fired"] for rank in ranks]).amin(dim=0)
    assert torch.equal(since_fired, one["since_fired"])


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index]))
def test_two_ranks_have_the_numbers_of_one_process(trained, index):
    results, _ = trained
    one = results[1][0][index]
    two = [rank[index] for rank in results[2]]
    assert_same_training(one, two, CASES[index].get("dyadic", False))
    assert all(rank["scans"]["dense_steps"] == one["scans"]["dense_steps"] == 0 for rank in two)
    if CASES[index].get("n_steps", 24) == 24:
        assert (one["since_fired"] > 4).any()  # AuxK is active


def test_pools_end_on_all_ranks_at_the_same_step(trained):
    """After `pool_steps`, as with all latents, the last pool is complete; in every other case it leaves latents out."""
    for index, case in enumerate(CASES):
        for rank in (*trained[0][1], *trained[0][2]):
            whole = bool((rank[index]["state"]["pool_record.last_pooled"] == case.get("n_steps", 24)).all())
            assert whole == ("pool_steps" in case or ALL.items() <= case.items()), case


@pytest.mark.parametrize("index", range(len(ON_FOUR)), ids=lambda index: str(ON_FOUR[index]))
def test_four_ranks_train_like_one_process(trained, index):
    results, of_four = trained
    assert_same_training(results[1][0][index], [rank[index] for rank in of_four[4]])


def test_a_small_pool_goes_by_its_columns():
    for fields in CASES:
        names = {field.name for field in dataclasses.fields(SampledTopKTrainingSAEConfig)}
        own = {name: value for name, value in fields.items() if name in names}
        cfg = SampledTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, **{"pool_factor": 5} | own)
        path = choose_path(cfg, cfg.step, TOKENS, torch.device("cpu"))
        assert (path == "columns") == (fields["step"] == "kept" and COLUMNS.items() <= fields.items())


def test_what_one_pool_exchanges_is_small(trained):
    n_bytes = trained[0][2][0][-1]["n_bytes"]
    pool = 2 * 5 * K * D_IN
    assert 0 < n_bytes <= (pool + 6 * D_SAE) * 4 + 64 * 1024


VALUES = st.one_of(
    st.floats(0, 2.0**100, width=32), st.sampled_from([0.0, 1.0, 1.5, 2.0**-140, 3e38]), st.integers(0, 3).map(float)
)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.lists(VALUES, max_size=12), min_size=1, max_size=4), n_keep=st.integers(0, 50))
def test_the_largest_of_all_ranks_are_those_of_the_whole(parts, n_keep):
    """As in a stable sort of the whole, for uneven and empty parts with ties, zeros and every scale."""
    tensors = [torch.tensor(part, dtype=torch.float32) for part in parts]
    kept = on_ranks(lambda values, ranks: ranks.topk_indices(values, n_keep), tensors)
    starts = [sum(map(len, tensors[:rank])) for rank in range(len(tensors))]
    places = torch.cat([start + indices for start, indices in zip(starts, kept, strict=True)])
    want = torch.cat(tensors).argsort(descending=True, stable=True)[:n_keep]
    assert torch.equal(places, want.sort().values)


def test_whether_to_scan_again_is_decided_by_all():
    """A single rank that decided differently would hang the others."""
    assert on_ranks(lambda flag, ranks: ranks.any(flag), [False, True]) == [True, True]
    assert on_ranks(lambda flag, ranks: ranks.any(flag), [False, False]) == [False, False]
    assert on_ranks(lambda n, ranks: ranks.total(n), [2, 5]) == [7, 7]


def test_no_rank_scans_in_bfloat16_if_one_cannot():
    x, sae = torch.randn(8, 12), sampled_sae()

    def product(scan, ranks):
        return reduced_product(x, sae.weights(), torch.tensor(0.0), scan, ranks)

    assert on_ranks(product, ["full", "reduced"]) == [None, None]
    assert None not in on_ranks(product, ["reduced", "reduced"])


def test_ranks_that_would_take_different_paths_all_take_the_dense_one():
    def path_of(hooked, ranks):
        sae = sampled_sae(step="kept")
        sae.ranks = ranks
        if hooked:
            sae.hook_sae_acts_pre.add_hook(lambda tensor, hook: tensor)
        return sae._path_of_all(torch.randn(64, 12), sae.cfg)

    assert on_ranks(path_of, [False, True]) == ["dense", "dense"]
    assert on_ranks(path_of, [False, False]) == ["kept", "kept"]


def read_rows(rows, ranks):
    return read_step(step_input(rows), config(), torch.tensor(0), ranks)


def test_a_row_that_is_not_finite_on_one_rank_stops_all_with_the_same_words():
    x = torch.randn(3, 8, 12)
    x[1, 2, 3] = torch.nan
    errors = on_ranks(read_rows, list(x))
    assert len({str(error) for error in errors}) == 1
    assert str(errors[0]).startswith("1 of 24 rows of sae_in are not finite at training step 0;")


def test_ranks_with_different_numbers_of_tokens_all_stop():
    x = torch.randn(18, 12)
    errors = on_ranks(read_rows, [x[:5], x[5:10], x[10:]])
    assert {str(error) for error in errors} == {
        "the ranks have between 5 and 8 tokens at training step 0, but each must have the same number."
    }


def test_settings_that_cannot_be_exact_are_refused():
    register_score("of_ones_own", lambda acts, _: acts.sum(dim=-2), by_columns=True)
    try:
        sae = sampled_sae(score="of_ones_own")
        with pytest.raises(ValueError, match=r"registered score 'of_ones_own' cannot be .*; set pool_"):
            sae.data_parallel()
    finally:
        SCORES.pop("of_ones_own")
    with pytest.raises(ValueError, match="dtype='float64' trains on one"):
        SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(d_in=8, d_sae=32, k=2, dtype="float64")).data_parallel()


def test_a_group_may_not_lie_on_two_ranks():
    assert TOKENS % (2 * GROUPS["pool_group_size"]) == 0
    check_groups(8, 5, 1)
    with pytest.raises(ValueError, match="each rank has 8 tokens per batch, not a multiple of pool_group_size=5"):
        check_groups(8, 5, 2)
