import json
import re
import traceback
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from helpers import D_IN, D_SAE, activations, batchtopk_sae, config, sampled_sae, train
from hub_server import TOKEN, Fault, HubServer, Repo
from huggingface_hub import constants
from huggingface_hub.utils import _http
from sae_lens import SAE, JumpReLUSAE, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from safetensors.torch import save_file

from sae_lens_sampled import SampledTopKSAE, SampledTopKTrainingSAE, load_checkpoint, to_jumprelu
from sae_lens_sampled.hub import HubError, upload_to_hub

REPO = "alice/sweep"
RETRY = "local files are unchanged, and running this again sends only what is missing"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub that the installed client takes for the real one."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))  # between retries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        _http.close_session()
        yield server
        _http.close_session()


def trained(pool_factor=4.0, **fields):
    sae = sampled_sae(pool_factor=pool_factor, pool_group_size=16, **fields)
    sae.cfg.metadata.model_name = "pythia-160m-deduped"
    sae.cfg.metadata.dataset_path = "monology/pile-uncopyrighted"
    sae.cfg.metadata.hook_name = "blocks.6.hook_resid_post"
    train(sae, 5)
    return sae


def as_folder(sae, folder):
    to_jumprelu(sae).save_model(folder)
    return folder


def as_checkpoint(sae, folder):
    sae.save_model(folder)
    save_file({"sparsity": torch.linspace(-9, -1, D_SAE)}, folder / "sparsity.safetensors")
    (folder / "runner_cfg.json").write_text('{"lr": 0.001}')
    return folder


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


FORMS = {
    "training SAE": lambda sae, folder: sae,
    "JumpReLU SAE": lambda sae, folder: to_jumprelu(sae),
    "exported folder": as_folder,
    "checkpoint folder": as_checkpoint,
    "folder as a string": lambda sae, folder: str(as_folder(sae, folder)),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_comes_down_is_what_was_sent(form, server, tmp_path):
    sae = trained()
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    address = upload_to_hub({"layer_6/pool_4": FORMS[form](sae, tmp_path / "sae")}, REPO)
    assert address == f"{server.url}/{REPO}"
    down = SAE.from_pretrained(REPO, "layer_6/pool_4")
    acts = activations(200, seed=7)
    assert down.cfg.architecture() == "jumprelu"
    assert torch.equal(down.encode(acts), to_jumprelu(sae).encode(acts))
    assert torch.equal(down(acts), to_jumprelu(sae)(acts))
    assert all(torch.equal(sae.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_checkpoint_goes_up_folded_and_exported_with_sparsity_and_runner_config(server, tmp_path):
    sae = SampledTopKTrainingSAE(config(normalize_activations="expected_average_only_in"))
    train(sae, 3)
    folder = as_checkpoint(sae, tmp_path / "checkpoint")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.5}')
    (folder / "trainer_state.pt").write_bytes(b"optimizer")
    local = snapshot(folder)
    upload_to_hub({"a": folder}, REPO)
    down, cfg, sparsity = SAE.from_pretrained_with_cfg_and_sparsity(REPO, "a")
    acts = activations(100)
    assert torch.equal(down.encode(acts), to_jumprelu(load_checkpoint(folder)).encode(acts))
    assert cfg["normalize_activations"] == "none"
    assert torch.equal(sparsity, torch.linspace(-9, -1, D_SAE))
    assert sorted(server.repos[REPO].files) == [
        "README.md",
        *(f"a/{name}" for name in ("cfg.json", "runner_cfg.json", "sae_weights.safetensors", "sparsity.safetensors")),
    ]
    assert snapshot(folder) == local


@pytest.mark.parametrize("as_object", [True, False])
def test_other_architectures_are_exported_too(as_object, server, tmp_path):
    batchtopk = batchtopk_sae()
    train(batchtopk, 3)
    standard = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l1_coefficient=0.5))
    for sae, architecture in [(batchtopk, "jumprelu"), (standard, "standard")]:
        before = sae.W_dec.clone()
        sae.save_model(tmp_path / architecture)
        upload_to_hub({architecture: sae if as_object else tmp_path / architecture}, f"alice/{architecture}")
        cfg = json.loads(server.repos[f"alice/{architecture}"].files[f"{architecture}/cfg.json"])
        assert cfg["architecture"] == architecture
        assert "l1_coefficient" not in cfg
        assert torch.equal(sae.W_dec, before)
    torch.testing.assert_close(
        SAE.from_pretrained("alice/jumprelu", "jumprelu").encode(activations(50)),
        to_jumprelu(batchtopk).encode(activations(50)),
    )


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


def split_row(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


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


def test_a_dry_run_writes_what_an_upload_would_send_and_asks_nothing(server, tmp_path):
    saes = {"a": trained(2.0), "deep/b": as_checkpoint(trained(4.0), tmp_path / "checkpoint")}
    assert upload_to_hub(saes, REPO, dry_run_folder=tmp_path / "out") == str(tmp_path / "out")
    assert server.requests == []
    upload_to_hub(saes, REPO)
    assert snapshot(tmp_path / "out") == server.repos[REPO].files
    with pytest.raises(ValueError, match=r"dry_run_folder=.* is not empty; choose a new one"):
        upload_to_hub(saes, REPO, dry_run_folder=tmp_path / "out")


@pytest.mark.parametrize("held", ["a/cfg.json", "a/sae_weights.safetensors", "a/sparsity.safetensors", "README.md"])
def test_nothing_on_the_hub_is_overwritten_without_force(held, server):
    server.repos[REPO] = Repo(private=False, files={held: b"of somebody", "notes.txt": b"kept"})
    sae = trained()
    with pytest.raises(ValueError, match=f"'{REPO}' holds other content in {held}; nothing was uploaded"):
        upload_to_hub({"a": sae}, REPO)
    assert server.repos[REPO].files == {held: b"of somebody", "notes.txt": b"kept"}
    assert server.count("PUT") == server.count("POST", "/commit/") == 0
    upload_to_hub({"a": sae}, REPO, force=True)
    assert sorted(server.repos[REPO].files) == ["README.md", "a/cfg.json", "a/sae_weights.safetensors", "notes.txt"]
    assert torch.equal(SAE.from_pretrained(REPO, "a").encode(activations(9)), to_jumprelu(sae).encode(activations(9)))


@pytest.mark.parametrize("held", ["a/cfg.json", "a/sae_weights.safetensors", "README.md"])
def test_other_content_of_the_same_size_is_noticed(held, server):
    sae = trained()
    upload_to_hub({"a": sae}, REPO)
    files = server.repos[REPO].files
    files[held] = files[held][:-3] + bytes([files[held][-3] ^ 1]) + files[held][-2:]
    with pytest.raises(ValueError, match=f"holds other content in {held}; nothing was uploaded"):
        upload_to_hub({"a": sae}, REPO)


def test_sending_the_same_again_sends_nothing(server):
    saes = {"a": trained(), "b": batchtopk_sae()}
    upload_to_hub(saes, REPO)
    server.requests.clear()
    upload_to_hub(saes, REPO)
    assert server.count("POST", "/commit/") == server.count("POST", "/preupload/") == server.count("PUT") == 0


FAULTS = {
    "token refused": (
        Fault("GET", "/api/models", 401),
        r"does not accept your token \(401\): log in with `hf auth login`",
    ),
    "may not create": (Fault("POST", "/repos/create", 403), rf"may not write to '{REPO}' \(403\): it needs write perm"),
    "may not write": (Fault("POST", "/preupload/", 403), rf"may not write to '{REPO}' \(403\)"),
    "exists unseen": (Fault("POST", "/repos/create", 409), rf"'{REPO}' exists unseen or is being changed .* \(409\)"),
    "changed meanwhile": (Fault("POST", "/commit/", 409), rf"'{REPO}' exists unseen or is being changed .* \(409\)"),
    "storage fails": (Fault("PUT", "/lfs/", 500), "the Hub answered 500, an error of its own: try again later"),
    "second SAE fails": (Fault("POST", "/commit/", 503, after=1), "the Hub answered 503, an error of its own"),
    "dropped in the weights": (Fault("PUT", "/lfs/", None), r"exchange with the Hub broke off \(\w+: "),
    "dropped at the second commit": (Fault("POST", "/commit/", None, after=1), r"broke off \(\w+: "),
    "dropped at the card": (Fault("POST", "/validate-yaml", None), r"broke off \(\w+: "),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_sentence_and_a_second_run_completes(name, server, tmp_path, capfd):
    fault, sentence = FAULTS[name]
    saes = {"a": as_folder(trained(2.0), tmp_path / "a"), "b": as_checkpoint(trained(4.0), tmp_path / "b")}
    local = snapshot(tmp_path / "a"), snapshot(tmp_path / "b")
    server.faults.append(Fault(**vars(fault)))
    with pytest.raises(HubError, match=f"{sentence}.*; {RETRY}\\.$") as caught:
        upload_to_hub(saes, REPO)
    assert str(caught.value).count("\n") == 0
    assert caught.value.__cause__ is not None
    text = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
    assert TOKEN not in text

    server.faults.clear()
    done = [path for path in server.repos[REPO].files if path.startswith("a/")] if REPO in server.repos else []
    server.requests.clear()
    upload_to_hub(saes, REPO)
    assert (snapshot(tmp_path / "a"), snapshot(tmp_path / "b")) == local
    assert server.count("POST", "/commit/") == (2 if done else 3) - (name == "dropped at the card")
    for sae_id, folder in saes.items():
        upload = SAE.from_pretrained(REPO, sae_id)
        sae = SAE.load_from_disk(folder) if sae_id == "a" else to_jumprelu(load_checkpoint(folder))
        assert torch.equal(upload.encode(activations(20)), sae.encode(activations(20)))


def test_a_wrong_token_is_refused_in_one_sentence_and_never_shown(server, monkeypatch, capfd):
    wrong = TOKEN[::-1]
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(HubError, match=r"does not accept your token \(401\)") as caught:
        upload_to_hub({"a": trained()}, REPO)
    assert server.repos == {}
    assert wrong not in "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())


def test_the_token_is_in_nothing_that_is_sent_shown_or_kept(server, tmp_path, capfd):
    upload_to_hub({"a": trained()}, REPO)
    upload_to_hub({"a": trained()}, REPO, dry_run_folder=tmp_path / "out")
    assert TOKEN not in "".join(capfd.readouterr())
    for content in [*server.repos[REPO].files.values(), *snapshot(tmp_path).values()]:
        assert TOKEN.encode() not in content


def test_a_token_in_a_config_stops_the_upload(server):
    sae = trained()
    sae.cfg.metadata.model_from_pretrained_kwargs = {"token": TOKEN}
    with pytest.raises(ValueError, match=r"a/cfg\.json would publish what looks like a Hub token") as caught:
        upload_to_hub({"a": sae}, REPO)
    assert TOKEN not in str(caught.value)
    assert server.requests == []


def test_private_is_kept_or_refused(server):
    sae = trained()
    upload_to_hub({"a": sae}, "alice/hidden", private=True)
    assert server.repos["alice/hidden"].private
    upload_to_hub({"a": sae}, "alice/open")
    assert not server.repos["alice/open"].private
    with pytest.raises(ValueError, match="'alice/open' exists and is public"):
        upload_to_hub({"b": sae}, "alice/open", private=True)
    assert not [path for path in server.repos["alice/open"].files if path.startswith("b/")]


@pytest.mark.parametrize(
    "repo_id", ["sweep", "a/b/c", "alice/", "/sweep", "alice/swe ep", "alice/-sweep", "alice/x.git", ""]
)
def test_a_repo_id_of_another_form_is_refused(repo_id, server):
    with pytest.raises(ValueError, match=f"repo_id='{repo_id}' must have the form 'user/name'"):
        upload_to_hub({"a": sampled_sae()}, repo_id)
    assert server.requests == []


@pytest.mark.parametrize("sae_id", ["", "/etc", "../up", "a/../b", "a//b", "a b", "."])
def test_an_sae_id_that_is_no_folder_is_refused(sae_id, server):
    with pytest.raises(ValueError, match=f"sae_id={re.escape(repr(sae_id))} must be a relative folder"):
        upload_to_hub({sae_id: sampled_sae()}, REPO)
    assert server.requests == []


def broken_folder(kind, folder):
    as_folder(trained(), folder)
    cfg, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    if kind == "missing":
        return folder / "elsewhere"
    if kind == "no config":
        cfg.unlink()
    if kind == "config is no JSON":
        cfg.write_text("{")
    if kind == "config is a list":
        cfg.write_text("[]")
    if kind == "no weights":
        weights.unlink()
    if kind == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    if kind == "another size":
        cfg.write_text(json.dumps({**json.loads(cfg.read_text()), "d_sae": D_SAE + 1}))
    if kind == "another program's":
        cfg.write_text('{"architecture": "LlamaForCausalLM"}')
    if kind == "truncated checkpoint":
        as_checkpoint(trained(), folder)
        weights.write_bytes(weights.read_bytes()[:-100])
    return folder


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("missing", "holds no SAE: it has no readable cfg.json"),
        ("no config", "holds no SAE: it has no readable cfg.json"),
        ("config is no JSON", "holds no SAE: it has no readable cfg.json"),
        ("config is a list", "holds no SAE: its cfg.json is not a JSON object"),
        ("no weights", "is no SAE that SAELens can load"),
        ("truncated weights", "is no SAE that SAELens can load"),
        ("another size", "is no SAE that SAELens can load"),
        ("another program's", "is no SAE that SAELens can load"),
        ("truncated checkpoint", "no readable training checkpoint"),
    ],
)
def test_a_folder_that_is_no_sae_is_refused(kind, sentence, server, tmp_path):
    folder = broken_folder(kind, tmp_path / "sae")
    with pytest.raises(ValueError, match=sentence) as caught:
        upload_to_hub({"good": sampled_sae(), "bad": folder}, REPO)
    assert str(folder) in str(caught.value)
    assert server.requests == []


@pytest.mark.parametrize(
    ("saes", "fields", "sentence"),
    [
        (dict, {}, "there is no SAE to upload"),
        (lambda: {"a": torch.nn.Linear(2, 3)}, {}, "a Linear cannot be uploaded"),
        (
            lambda: {"a": SampledTopKTrainingSAE(config(normalize_activations="covariance_whitening"))},
            {},
            "has normalize_activations='covariance_whitening', which is not folded",
        ),
        (
            lambda: {"a": sampled_sae()},
            {"evaluation": {"b": {"l0": 1}}},
            "evaluation has 'b', which is none of the SAEs: a",
        ),
        (
            lambda: {"a": sampled_sae()},
            {"evaluation": {"a": {"fvu": float("nan")}}},
            r"evaluation\['a'\]\['fvu'\]=nan must be a finite number",
        ),
        (lambda: {"a": sampled_sae()}, {"evaluation": {"a": {"l0": "12"}}}, "='12' must be a finite number"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(saes, fields, sentence, server):
    with pytest.raises(ValueError, match=sentence):
        upload_to_hub(saes(), REPO, **fields)
    assert server.requests == []


def test_weights_of_training_are_not_published_as_an_inference_sae(server, tmp_path):
    trained().save_model(tmp_path / "checkpoint")
    sae = SAE.load_from_disk(tmp_path / "checkpoint")
    assert isinstance(sae, SampledTopKSAE)
    sae.save_model(tmp_path / "saved")
    for refused in (sae, tmp_path / "saved"):
        with pytest.raises(ValueError, match="has the weights of training and loads only with sae_lens_sampled"):
            upload_to_hub({"a": refused}, REPO)
    assert server.requests == []


@pytest.mark.parametrize("sae", [batchtopk_sae, trained])
def test_an_exported_config_is_the_same_text_in_every_process(sae, tmp_path):
    """So that a re-run continues: SAELens writes some configs in the order of a set, which changes with the process."""
    upload_to_hub({"a": sae()}, REPO, dry_run_folder=tmp_path / "out")
    text = (tmp_path / "out" / "a" / "cfg.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
