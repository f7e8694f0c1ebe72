import math
import os
import subprocess
import sys

import pytest
import torch

import sae_lens_sampled.similarity
from sae_lens_sampled.similarity import dictionary_similarity, max_cosines, random_baseline

ENOUGH_MEMORY = 4 * 2**30


def dictionary(n_rows, d_in=7, seed=0, dtype=torch.float32):
    """Rows of uneven norm."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 3, n_rows)[:, None]
    return (torch.randn(n_rows, d_in, generator=generator) * scale).to(dtype)


def cosine(x, y):
    norms = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(a * a for a in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / norms if norms else 0.0


def max_cosines_by_hand(a, b):
    return [
        [max(cosine(x, y) for y in b) for x in a],
        [max(abs(cosine(x, y)) for y in b) for x in a],
        [max(cosine(x, y) for x in a) for y in b],
        [max(abs(cosine(x, y)) for x in a) for y in b],
    ]


def free_memory():
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 0


@pytest.mark.parametrize("tile", [1, 4, 5, 4096])
@pytest.mark.parametrize(("n_a", "n_b"), [(13, 13), (13, 6), (3, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_max_cosines_match_loops_whatever_the_tile(monkeypatch, tile, n_a, n_b, dtype):
    monkeypatch.setattr(sae_lens_sampled.similarity, "TILE", tile)
    a, b = dictionary(n_a, seed=1, dtype=dtype), dictionary(n_b, seed=2, dtype=dtype)
    cosines = max_cosines(a, b)
    for got, want in zip(cosines, max_cosines_by_hand(a.tolist(), b.tolist()), strict=True):
        assert got.tolist() == pytest.approx(want, abs=1e-6)
    assert all(values.dtype == torch.promote_types(dtype, torch.float32) for values in cosines)


def test_summary_is_the_mean_and_the_shares_of_the_max_cosines():
    a = dictionary(300, d_in=20, seed=1)
    b = torch.cat([a[:40] * 2 + 0.2 * dictionary(40, d_in=20, seed=2), dictionary(60, d_in=20, seed=3)])
    similarity = dictionary_similarity(a, b)
    of_a, of_a_absolute, of_b, of_b_absolute = max_cosines_by_hand(a.tolist(), b.tolist())
    for one_way, signed, absolute in (
        (similarity.forward, of_a, of_a_absolute),
        (similarity.backward, of_b, of_b_absolute),
    ):
        assert one_way.mmcs == pytest.approx(sum(signed) / len(signed), abs=1e-6)
        assert one_way.mmcs_absolute == pytest.approx(sum(absolute) / len(absolute), abs=1e-6)
        assert one_way.share_above_0_7 == pytest.approx(sum(c > 0.7 for c in signed) / len(signed))
        assert one_way.share_above_0_9 == pytest.approx(sum(c > 0.9 for c in signed) / len(signed))
        assert 0 < one_way.share_above_0_9 < one_way.share_above_0_7 < 1
    assert similarity.forward.baseline == random_baseline(100, 20, absolute=False)
    assert similarity.backward.baseline_absolute == random_baseline(300, 20, absolute=True)
    swapped, reverse = similarity.swapped(), dictionary_similarity(b, a)
    assert swapped.forward == pytest.approx(reverse.forward, abs=1e-6)
    assert swapped.backward == pytest.approx(reverse.backward, abs=1e-6)
    assert swapped.matched == pytest.approx(reverse.matched, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_dictionary_permuted_and_rescaled_is_found_entirely(dtype):
    a = dictionary(30, dtype=dtype)
    # Powers of two, which leave directions unchanged in bfloat16.
    b = a[torch.randperm(30)] * 2.0 ** torch.randint(-3, 4, (30, 1))
    for other in (a, b.to(dtype)):
        similarity = dictionary_similarity(a, other)
        for one_way in (similarity.forward, similarity.backward):
            assert one_way[:4] == pytest.approx((1, 1, 1, 1), abs=1e-6)
        assert similarity.matched == pytest.approx(1, abs=1e-6)


def test_no_cosine_leaves_its_range_by_rounding():
    rows = dictionary(300)
    unit = torch.nn.functional.normalize(rows, dim=1)
    assert (unit * unit).sum(dim=1).max() > 1
    for ours in max_cosines(rows, rows.clone()):
        assert ours.max() <= 1
    for row in rows[:, None]:
        assert max_cosines(row, -row).a >= -1


def test_a_negated_dictionary_is_found_by_absolute_cosine_only():
    similarity = dictionary_similarity(dictionary(30), -dictionary(30))
    assert similarity.forward.mmcs_absolute == pytest.approx(1, abs=1e-6)
    assert similarity.matched == pytest.approx(1, abs=1e-6)
    assert similarity.forward.mmcs < 0.8


def test_copies_of_one_row_are_found_but_neither_find_nor_match():
    b = dictionary(30)
    similarity = dictionary_similarity(b[:1].expand(30, -1) * 1.5, b)
    assert similarity.forward.mmcs == pytest.approx(1, abs=1e-6)
    assert similarity.backward.mmcs < 0.3
    assert similarity.matched is not None
    assert similarity.matched < 0.5


def test_matched_is_the_best_of_all_one_to_one_pairings():
    torch.manual_seed(4)
    a, b = torch.randn(2, 3), torch.randn(4, 3)
    pairings = [(i, j) for i in range(4) for j in range(4) if i != j]
    rows, others = a.tolist(), b.tolist()
    want = max(abs(cosine(rows[0], others[i])) + abs(cosine(rows[1], others[j])) for i, j in pairings) / 2
    assert dictionary_similarity(a, b).matched == pytest.approx(want, abs=1e-6)
    assert dictionary_similarity(a, b, match_max_latents=4).matched is not None
    assert dictionary_similarity(a, b, match_max_latents=3).matched is None


def test_rows_of_zeros_have_cosine_zero():
    a, b = dictionary(10, seed=1), dictionary(8, seed=2)
    a[3] = 0
    cosines = max_cosines(a, b)
    assert cosines.a[3] == cosines.a_absolute[3] == 0
    for got, want in zip(cosines, max_cosines_by_hand(a.tolist(), b.tolist()), strict=True):
        assert got.tolist() == pytest.approx(want, abs=1e-6)
    assert dictionary_similarity(a.zero_(), b).forward[:4] == (0, 0, 0, 0)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize(("n", "d_in"), [(1, 2), (3, 5), (40, 12), (500, 64)])
def test_baseline_is_that_of_simulated_directions(n, d_in, absolute):
    generator = torch.Generator().manual_seed(n)
    largest = []
    for _ in range(400):
        others = torch.nn.functional.normalize(torch.randn(n, d_in, generator=generator, dtype=torch.double), dim=1)
        cosines = others[:, 0]  # with the first axis: all directions are equivalent
        largest.append((cosines.abs() if absolute else cosines).max())
    largest = torch.stack(largest)
    standard_error = largest.std().item() / math.sqrt(len(largest))
    assert random_baseline(n, d_in, absolute) == pytest.approx(largest.mean().item(), abs=3.5 * standard_error)


def test_baseline_is_exact_where_the_integral_is_known():
    # In three dimensions a cosine is uniform; in two it is the cosine of a uniform angle.
    for n in (1, 2, 9, 1000):
        assert random_baseline(n, 3, absolute=False) == pytest.approx((n - 1) / (n + 1), abs=1e-7)
        assert random_baseline(n, 3, absolute=True) == pytest.approx(n / (n + 1), abs=1e-7)
    assert random_baseline(1, 2, absolute=True) == pytest.approx(2 / math.pi, abs=1e-7)


def test_baseline_of_a_large_dictionary_is_what_random_rows_reach():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(200, 768, generator=generator), torch.randn(65_536, 768, generator=generator)
    cosines = max_cosines(a, b)
    for got, absolute in ((cosines.a, False), (cosines.a_absolute, True)):
        # All rows of a share the rows of b, which adds little error: they are nearly orthogonal.
        standard_error = got.std().item() / math.sqrt(len(got))
        assert random_baseline(65_536, 768, absolute) == pytest.approx(got.mean().item(), abs=4 * standard_error)


@pytest.mark.usefixtures("unchecked_types")
def test_incomparable_saes_are_reported_in_one_sentence():
    a = dictionary(5)
    with pytest.raises(
        ValueError, match=r"^dictionaries of shapes \(5, 7\) and \(5, 6\) cannot be compared; each must"
    ):
        dictionary_similarity(a, dictionary(5, d_in=6))
    with pytest.raises(
        ValueError, match=r"^dictionaries of shapes \(0, 7\) and \(5, 7\) cannot be compared; each must"
    ):
        dictionary_similarity(a[:0], a)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"^a dictionary has non-finite entries"):
            dictionary_similarity(a, torch.full_like(a, value))
    with pytest.raises(ValueError, match=r"^n=0, d_in=3: a baseline needs at least 1 direction in at least 2 dim"):
        random_baseline(0, 3, absolute=True)
    with pytest.raises(ValueError, match=r"^n=9, d_in=1: a baseline needs"):
        random_baseline(9, 1, absolute=False)


# The full comparison takes minutes on a CPU. Its memory is that of one row of tiles, however many rows there are.
FIRST_TILES = """
import re, torch
from pathlib import Path
from sae_lens_sampled.similarity import TILE, max_cosines
def peak():  # kB; of this process only, unlike ru_maxrss, which begins at its parent's
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1))
torch.set_num_threads(1)
before = peak()
a, b = torch.randn(65_536, 768), torch.randn(65_536, 768)
max_cosines(a[:TILE], b[: 4 * TILE])
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(free_memory() < ENOUGH_MEMORY, reason="needs Linux and 4 GiB of free memory")
def test_tiles_of_65536_latents_and_both_dictionaries_fit_in_2_gb():
    """The first four tiles, each stored in place of the previous one."""
    result = subprocess.run([sys.executable, "-c", FIRST_TILES], capture_output=True, text=True, check=True)
    assert 2 * 65_536 * 768 * 4 < int(result.stdout) < 2e9
