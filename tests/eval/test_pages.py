"""The pages in eval/: the index names every script, and the export page matches its results."""

import json

import pytest

from bench import check_export, export_page

TRAINED = {"data": "tiny_lm", "pool_factor": 5, "score": "l2_norm", "L0": 10.0, "FVU": 0.2}
GLOBAL = {"global_L0": 30.0, "global_FVU": 0.1}


def row(l0, fvu, **fields):
    return TRAINED | GLOBAL | {"per_latent_L0": l0, "per_latent_FVU": fvu} | fields


def test_the_index_names_every_script_and_every_page():
    eval_folder = check_export.EVAL
    index = (eval_folder / "README.md").read_text()
    scripts = [file for file in eval_folder.rglob("*.py") if 'if __name__ == "__main__":' in file.read_text()]
    assert len(scripts) > 8
    files = [*scripts, *eval_folder.rglob("*.sh"), *eval_folder.glob("*.md")]
    missing = [file for file in files if f"({file.relative_to(eval_folder)})" not in index and file.name != "README.md"]
    assert not missing


def test_the_committed_page_is_that_of_the_committed_results():
    results = json.loads(check_export.RESULTS.read_text())
    wanted = check_export.settings("tiny_lm", quick=False) + check_export.settings("synthetic", quick=False)
    rows = [row for setting in wanted for row in results if check_export.is_of(row, setting)]
    assert len(rows) == len(wanted) == len(results) == 132
    pages = export_page.pages(rows, check_export.SETUP)
    assert pages == {page: (check_export.EVAL / page).read_text() for page in pages}


def test_exports_are_counted_by_how_far_they_are_from_training():
    # L0 2% above, 4% below, 30% above; FVU 1% above, 3% above, halved.
    summary = export_page.summary([row(10.2, 0.202), row(9.6, 0.206), row(13.0, 0.1)])
    assert summary == {
        "n": 3,
        "n_l0_within": {"3%": 1, "5%": 2},
        "n_fvu_within": {"2%": 2},
        "n_fvu_lower": {"2%": 1},
        "n_fvu_higher": {"2%": 1},
        "largest_l0_gap": "30%",
        "lowest_fvu_gap": "50% lower",
        "highest_fvu_gap": "3% higher",
        "largest_fvu_ratio": "1",
    }


@pytest.mark.parametrize(("pool", "section"), [("top", "misses"), ("proportional", "drawn")])
def test_a_pool_is_reported_where_it_belongs(pool, section):
    rows = [
        row(10, 0.2, pool_sampling="top"),
        row(12, 0.8, pool_sampling=pool),
        row(10, 0.2, pool_sampling="proportional"),
        row(10, 0.2, matryoshka_widths=[8, 64]),
    ]
    answer, page = export_page.pages(rows, check_export.SETUP).values()
    assert ("FVU is up to 4 times" in answer) == (section == "drawn")
    _, misses, *_ = page.split("in training):")
    assert ("+20.0%" in misses.partition('"FVU best"')[0]) == (section == "misses")
    assert page.count("+20.0%") == (2 if section == "misses" else 1)  # also in the table of all rows


def test_the_best_thresholds_are_shown_where_they_were_searched():
    table = export_page.table([row(10, 0.2), row(10, 0.2, best_FVU=0.1254)], leave_out=["L0 global"]).splitlines()
    assert "L0 global" not in table[0]
    assert [line.rsplit("|", 2)[1].strip() for line in table] == ["FVU best", table[1].rsplit("|", 2)[1], "-", "0.125"]
