"""Wherever a store reads a text that is too short, the error says how many tokens it has and how many are needed."""

import copy
import json
from dataclasses import replace

import pytest
from datasets import Dataset, DatasetDict
from runner_worker import runner_config
from sae_lens import ActivationsStore

from sae_lens_sampled import DataParallelRunner
from sae_lens_sampled.runners.stores import reporting_short_text

TOO_SHORT = (
    "gives no prompt of context_size={} tokens: it has 10 tokens, 10 in its longest row. Use more or longer texts or, "
    "where it can be set, a smaller context_size."
)
NO_ROWS = "has no rows; use another text."
FEW = "has fewer than 32 prompts of context_size=64 tokens, which are read at once; use more text."


@pytest.fixture
def text(tmp_path):
    """Function that writes a text with one row of `n_words` words (no row for 0) and returns its folder."""
    folder = tmp_path / "text"
    folder.mkdir()

    def write(n_words):
        row = json.dumps({"text": "she " * n_words}) + "\n"
        (folder / "train.jsonl").write_text(row if n_words else "")
        return folder

    return write


@pytest.mark.parametrize(("n_words", "said"), [(0, NO_ROWS), (9, TOO_SHORT.format(48))])
def test_core_tells(saes, tmp_path, text, n_words, said):
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    from eval_helpers import run_small

    from sae_lens_sampled.saebench import EvalError

    with pytest.raises(EvalError) as error:
        run_small(saes[2:3], ["core"], tmp_path / "out", text=text(n_words))
    assert str(error.value).splitlines()[1] == (
        f"core of batchtopk_custom_sae: ValueError: text={str(tmp_path / 'text')!r} {said}"
    )


@pytest.mark.parametrize("n_words", [0, 9])
def test_core_tells_of_saes_that_only_sae_bench_itself_evaluates(saes, tmp_path, text, n_words, monkeypatch):
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    from eval_helpers import run_small
    from sae_bench.sae_bench_utils import general_utils

    from sae_lens_sampled.saebench import EvalError, recording

    monkeypatch.setattr(recording, "is_shareable", lambda sae: False)
    monkeypatch.setattr(general_utils.time, "sleep", lambda seconds: None)  # between SAEBench's retries
    with pytest.raises(
        EvalError, match=r"ValueError: text='.*text' with context_size=48 has no rows or gives no prompt;"
    ):
        run_small(saes[2:3], ["core"], tmp_path / "out", text=text(n_words))


@pytest.mark.parametrize(("n_words", "said"), [(0, NO_ROWS), (9, FEW), (1500, FEW)])
def test_the_study_tells(tmp_path, text, n_words, said):
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    from study_helpers import SMOKE, storage

    from study.text import text_activations

    study = replace(SMOKE, held_out=str(text(n_words)), context_size=64)
    with pytest.raises(ValueError) as error:  # noqa: PT011  compared below
        text_activations(storage(tmp_path, study))
    assert str(error.value) == f"held-out text {study.held_out!r} {said}"


def test_a_runner_tells_of_a_text_without_rows(tiny_lm, tmp_path, text):
    cfg = runner_config(tiny_lm, tmp_path, "none", dataset_path=str(text(0)))
    with pytest.raises(ValueError, match=r"^dataset_path='.*text' has no rows; use another text\.$"):
        DataParallelRunner(cfg)
    with pytest.raises(ValueError, match=r"^override_dataset has no rows; use another text\.$"):
        DataParallelRunner(cfg, override_dataset=Dataset.from_dict({"text": []}))


def test_rows_that_are_not_joined_are_reported_by_the_longest(tiny_lm, tmp_path):
    """Joined, the rows would fill a prompt."""
    rows = Dataset.from_dict({"text": ["she " * 9, "she " * 12, "she " * 15]})
    cfg = runner_config(tiny_lm, tmp_path, "none", disable_concat_sequences=True)
    store = DataParallelRunner(copy.deepcopy(cfg)).activations_store
    store = ActivationsStore.from_config(store.model, cfg, rows)
    with (
        pytest.raises(
            ValueError, match=r"^it gives no prompt of context_size=32 .* 39 tokens, 16 in its longest row\."
        ),
        reporting_short_text("it", store),
    ):
        store.get_batch_tokens()


def test_probing_data_without_rows_is_reported(tmp_path):
    pytest.importorskip("sae_bench", reason="needs the extra `eval`")
    from sae_lens_sampled.saebench import load_probing_dataset

    for empty in ("train", "test"):
        for name in ("train", "test"):
            rows = [f'{{"text": "{i}", "label": {i % 2}}}\n' for i in range(0 if name == empty else 99)]
            (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        with pytest.raises(
            ValueError, match=rf"^probing data '.*{empty}\.jsonl' has no rows or is not a complete json"
        ):
            load_probing_dataset(tmp_path)
        splits = {
            "train": Dataset.from_list([{"text": "a", "label": 0}]),
            empty: Dataset.from_dict({"text": [], "label": []}),
        }
        with pytest.raises(ValueError, match=rf"^probing data set 'dataset' has no rows for '{empty}'\.$"):
            load_probing_dataset(DatasetDict(splits))
