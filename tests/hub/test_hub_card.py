"""The model card that is uploaded with the SAEs."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import D_SAE, activations, batchtopk_sae
from hub_helpers import REPO, as_checkpoint, as_folder, metadata, snapshot, split_row, trained
from sae_lens import SAE, JumpReLUSAE
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from sae_lens_sampled import to_jumprelu
from sae_lens_sampled.hub.upload import upload_to_hub


def test_several_saes_share_a_repository_and_a_card(server, tmp_path):
    saes = {"pool_2": trained(2.0), "pool_4": as_folder(trained(4.0), tmp_path / "x"), "batchtopk": batchtopk_sae()}
    evaluation = {"pool_2": {"l0": 3.25, "fvu": 0.125, "dead": 4}, "batchtopk": {"l0": 2.5}}
    upload_to_hub(saes, REPO, evaluation=evaluation, license_id="apache-2.0")
    card = server.repos[REPO].files["README.md"].decode()
    for sae_id in saes:
        SAE.from_pretrained(REPO, sae_id)
    table = [line for line in card.splitlines() if line.startswith(("| SAE |", "| `"))]
    columns = [cell.strip() for cell in table[0].strip("|").split("|")]
    rows = {cells[0]: dict(zip(columns, cells, strict=True)) for cells in map(split_row, table[1:4])}
    assert {name: row["pool_factor"] for name, row in rows.items()} == {
        "`pool_2`": "2",
        "`pool_4`": "4",
        "`batchtopk`": "",
    }
    assert rows["`pool_2`"]["trained as"] == "sampled_topk"
    assert (rows["`pool_2`"]["L0"], rows["`pool_2`"]["FVU"], rows["`pool_2`"]["dead latents"]) == ("3.25", "0.125", "4")
    assert (rows["`batchtopk`"]["L0"], rows["`batchtopk`"]["FVU"]) == ("2.5", "")
    assert {row["k"] for row in rows.values()} == {"3"}
    assert "| `pool_factor` | 2, 4 |" in card
    assert "| hook | blocks.6.hook_resid_post |" in card
    assert "after `pool_steps`" not in card


def test_a_card_says_when_pools_end(tmp_path):
    upload_to_hub({"a": trained(pool_steps=3), "b": trained()}, REPO, dry_run_folder=tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "tokens, or among all latents without a `pool_factor` or after `pool_steps` steps." in card
    assert "| `pool_steps` | 3 |" in card


def test_counts_from_numpy_are_written_in_full(tmp_path):
    upload_to_hub({"a": trained()}, REPO, dry_run_folder=tmp_path, evaluation={"a": {"dead": np.int64(12_345)}})
    assert "12345" in (tmp_path / "README.md").read_text()


def test_the_cards_metadata_names_model_data_and_results(tmp_path):
    evaluation = {"a": {"l0": 3.25, "fvu": 0.125}}
    upload_to_hub({"a": trained()}, REPO, dry_run_folder=tmp_path / "out", evaluation=evaluation)
    data = metadata((tmp_path / "out" / "README.md").read_text())
    index = data.pop("model-index")
    assert data == {
        "library_name": "saelens",
        "license": "mit",
        "base_model": ["EleutherAI/pythia-160m-deduped"],
        "datasets": ["monology/pile-uncopyrighted"],
        "tags": ["sparse-autoencoder", "saelens", "sampled-sae", "arxiv:2508.21324"],
    }
    assert index[0]["name"] == "sweep"
    assert index[0]["results"][0]["dataset"]["type"] == "monology/pile-uncopyrighted"
    assert [(m["type"], m["value"], m["name"]) for m in index[0]["results"][0]["metrics"]] == [
        ("l0", 3.25, "L0 (a)"),
        ("fvu", 0.125, "FVU (a)"),
    ]


def test_local_models_and_data_stay_out_of_the_metadata_and_their_folders_out_of_the_card(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    sae = trained()
    sae.cfg.metadata.model_name, sae.cfg.metadata.dataset_path = "models/mine", str(tmp_path / "secret" / "tokens")
    upload_to_hub({"a": sae}, REPO, dry_run_folder="out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert {"base_model", "datasets", "model-index"}.isdisjoint(metadata(card))
    assert "| dataset | tokens |" in card
    assert "secret" not in card


@pytest.mark.parametrize("kind", ["training SAE", "checkpoint", "export"])
def test_no_file_that_goes_up_tells_where_things_lie_on_the_authors_disk(kind, tmp_path):
    sae = trained()
    metadata = sae.cfg.metadata
    metadata.model_name, metadata.dataset_path = str(tmp_path / "secret" / "my_lm"), "./secret/tokens"
    metadata.model_from_pretrained_kwargs = {"cache_dir": str(tmp_path / "secret" / "cache"), "revision": "v1.0/x"}
    source = {
        "training SAE": lambda: sae,
        "checkpoint": lambda: as_checkpoint(sae, tmp_path / "mine"),
        "export": lambda: as_folder(sae, tmp_path / "mine"),
    }[kind]()
    run = {"checkpoint_path": str(tmp_path / "secret" / "run"), "nested": [{"path": "~/secret/x"}], "lr": 0.001}
    if kind != "training SAE":
        (tmp_path / "mine" / "runner_cfg.json").write_text(json.dumps(run))
    before = {} if kind == "training SAE" else snapshot(tmp_path / "mine")
    upload_to_hub({"a": source}, REPO, dry_run_folder=tmp_path / "out")
    for file in (tmp_path / "out").rglob("*"):
        assert file.suffix == ".safetensors" or file.is_dir() or "secret" not in file.read_text(), file
    cfg = json.loads((tmp_path / "out" / "a" / "cfg.json").read_text())["metadata"]
    assert (cfg["model_name"], cfg["dataset_path"]) == ("my_lm", "tokens")
    assert cfg["model_from_pretrained_kwargs"] == {"cache_dir": "cache", "revision": "v1.0/x"}
    assert SAE.load_from_disk(tmp_path / "out" / "a").cfg.metadata.model_name == "my_lm"
    if kind != "training SAE":
        published = json.loads((tmp_path / "out" / "a" / "runner_cfg.json").read_text())
        assert published == {"checkpoint_path": "run", "nested": [{"path": "x"}], "lr": 0.001}
        assert snapshot(tmp_path / "mine") == before  # the author's own files are unchanged


def test_numbers_of_the_training_run_are_labelled_so(tmp_path):
    sae = trained()
    sae.cfg.metadata.l0, sae.cfg.metadata.num_dead_features = 3.5, 6
    upload_to_hub({"a": sae}, REPO, dry_run_folder=tmp_path / "out", evaluation={"a": {"l0": 3.25}})
    card = (tmp_path / "out" / "README.md").read_text()
    header, row = (line for line in card.splitlines() if line.startswith(("| SAE |", "| `a`")))
    cells = dict(zip(split_row(header), split_row(row), strict=True))
    assert (cells["L0"], cells["dead latents (training)"], "L0 (training)" in cells) == ("3.25", "6", False)
    assert "not measured on the stored SAE" in card


def test_a_pruned_sae_says_so(server):
    sae = trained()
    thresholds = sae.latent_threshold.clone().masked_fill(torch.arange(D_SAE) < 10, torch.inf)
    pruned = to_jumprelu(sae, thresholds, prune=True)
    upload_to_hub({"a": pruned}, REPO)
    assert "| d_sae before pruning |" in server.repos[REPO].files["README.md"].decode()
    down = SAE.from_pretrained(REPO, "a")
    assert torch.equal(down.encode(activations(50)), pruned.encode(activations(50)))


def test_the_cards_snippet_runs_in_saelens_alone(server, monkeypatch):
    sae = trained()
    upload_to_hub({"a": sae}, REPO)
    (snippet,) = re.findall(r"```python\n(.*?)```", server.repos[REPO].files["README.md"].decode(), re.DOTALL)
    assert "sae_lens_sampled" not in snippet
    monkeypatch.delitem(SAE_CLASS_REGISTRY, "sampled_topk")
    monkeypatch.delitem(SAE_TRAINING_CLASS_REGISTRY, "sampled_topk")
    names = {}
    exec(snippet, names)
    assert type(names["sae"]) is JumpReLUSAE
    assert torch.equal(names["sae"].encode(activations(50)), to_jumprelu(sae).encode(activations(50)))
