"""A text that the user names: how it is split, and what is kept of it with the results."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("sae_bench", reason="needs the extra `eval`")


from study import run
from study.named_text import TITLES, keep_titles, with_text, with_text_of_results
from study.storage import Storage
from study.studies import BLOCK_10, LONG


def test_a_named_text_is_split_by_file_and_known_by_its_content(tmp_path):
    for i in range(40):
        novel = tmp_path / "novels" / f"Author{i:02}_Some_Title_{1850 + i}.txt"
        novel.parent.mkdir(exist_ok=True)
        novel.write_text("\ufeff" + f"Line of novel {i:02}, which is not long.\n" * 200, encoding="utf-8")
    config = replace(BLOCK_10, probing_splits=0)  # these are not the novels of the probing tasks
    study = with_text(config, str(tmp_path / "novels"), tmp_path / "work")
    titles = json.loads((Path(study.dataset).parent / TITLES).read_text())
    assert titles["held_out"] == ["Author19, Some Title (1869)", "Author39, Some Title (1889)"]
    assert len(titles["train"]) == 38
    rows = {
        part: [json.loads(line)["text"] for line in (Path(folder) / "train.jsonl").read_text().splitlines()]
        for part, folder in (("train", study.dataset), ("held_out", study.held_out))
    }
    assert {row[14:16] for row in rows["held_out"]} == {"19", "39"}
    assert sum(map(len, rows["train"])) == 38 * 200 * 37  # nothing is lost but the byte order mark
    first = [row[14:16] for row in rows["train"][:10]]
    assert first != sorted(first)  # passages of all novels are mixed
    (tmp_path / "novels").rename(tmp_path / "elsewhere")
    again = with_text(config, str(tmp_path / "elsewhere"), tmp_path / "other_work")
    assert again.settings() == study.settings()
    assert not any(str(tmp_path) in str(value) for value in study.settings().values())
    # Titles and fingerprint are kept with the results, so they can be shown without the text.
    study_of_text = Storage(study, tmp_path / "results", tmp_path / "work")
    assert with_text_of_results(config, study_of_text.results) == config
    keep_titles(study, study_of_text.results)
    study_of_text.evaluations.append({"arm": "topk", "seed": 0, "metrics": {}})
    shown_later = with_text_of_results(config, study_of_text.results)
    assert shown_later.settings() == study.settings()
    assert json.loads((study_of_text.results / TITLES).read_text()) == titles
    assert list(Storage(shown_later, study_of_text.results, tmp_path).evaluations.load()) == [("topk", 0)]
    (tmp_path / "elsewhere" / "Author00_Some_Title_1850.txt").write_text("changed")
    assert with_text(config, str(tmp_path / "elsewhere"), tmp_path).settings() != study.settings()


def test_titles_of_results_stay_if_another_text_is_given(tmp_path):
    for text in ("one", "other"):
        (tmp_path / text).mkdir()
        for i in range(2):
            (tmp_path / text / f"Author{i}_Novel_{text}_1850.txt").write_text(f"Line {text} of novel {i}.\n" * 200)
    config = replace(LONG, probing_splits=0)
    results = tmp_path / "results"
    kept = Storage(with_text(config, str(tmp_path / "one"), tmp_path / "work"), results, tmp_path / "work")
    keep_titles(kept.study, results)
    kept.evaluations.append({"arm": "topk", "seed": 0, "metrics": {}})
    before = (results / TITLES).read_text()
    arguments = ["--config", "smollm2-10m", "--text", str(tmp_path / "other"), "--work-dir", str(tmp_path / "again")]
    with pytest.raises(SystemExit, match="has results of this study with other settings"):
        run.main([*arguments, "--results-dir", str(results), "--stages", "train"])
    assert (results / TITLES).read_text() == before


def test_a_text_of_one_file_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("text")
    with pytest.raises(ValueError, match=r"must have at least two \.txt files, one of which is held out"):
        with_text(BLOCK_10, str(tmp_path), tmp_path)
    assert with_text(BLOCK_10, "monology/pile-uncopyrighted", tmp_path).dataset == "monology/pile-uncopyrighted"
