"""Rejected and failing uploads: each error is one sentence, nothing is lost, and no token is shown."""

import json
import re
import traceback

import pytest
import torch
from helpers import D_IN, D_SAE, activations, config, sampled_sae
from hub_helpers import REPO, as_checkpoint, as_folder, snapshot, trained
from hub_server import TOKEN, Fault
from sae_lens import SAE

from sae_lens_sampled import SampledTopKSAE, SampledTopKTrainingSAE, load_checkpoint, to_jumprelu
from sae_lens_sampled.hub.upload import HubError, upload_to_hub

RETRY = "local files are unchanged, and running this again sends only what is missing"


FAULTS = {
    "token refused": (
        Fault("GET", "/api/models", 401),
        r"got no token or does not accept it \(401\): log in with `hf auth login`",
    ),
    "may not create": (
        Fault("POST", "/repos/create", 403),
        rf"not let you write to '{REPO}' \(403.*\): .* your token needs write",
    ),
    "may not write": (Fault("POST", "/preupload/", 403), rf"not let you write to '{REPO}' \(403"),
    "exists unseen": (
        Fault("POST", "/repos/create", 409),
        rf"'{REPO}' exists but you cannot see it, or .* \(409\): check its name",
    ),
    "changed meanwhile": (
        Fault("POST", "/commit/", 409),
        rf"'{REPO}' exists but .*, or someone else is changing it \(409\)",
    ),
    "storage fails": (
        Fault("PUT", "/lfs/", 500),
        "the Hub answered with HTTP status 500, 'injected', a server error: try again later",
    ),
    "second SAE fails": (
        Fault("POST", "/commit/", 503, after=1),
        "the Hub answered with HTTP status 503, 'injected', a server error",
    ),
    "dropped in the weights": (Fault("PUT", "/lfs/", None), r"exchange with the Hub failed \(\w+: "),
    "dropped at the second commit": (Fault("POST", "/commit/", None, after=1), r"with the Hub failed \(\w+: "),
    "dropped at the card": (Fault("POST", "/validate-yaml", None), r"with the Hub failed \(\w+: "),
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
    with pytest.raises(HubError, match=r"does not accept it \(401\)") as caught:
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


@pytest.mark.parametrize(
    "repo_id", ["sweep", "a/b/c", "alice/", "/sweep", "alice/swe ep", "alice/-sweep", "alice/x.git", ""]
)
def test_a_repo_id_of_another_form_is_refused(repo_id, server):
    with pytest.raises(ValueError, match=f"repo_id='{repo_id}' must have the form 'user/name'"):
        upload_to_hub({"a": sampled_sae()}, repo_id)
    assert server.requests == []


@pytest.mark.parametrize("sae_id", ["", "/etc", "../up", "a/../b", "a//b", "a b", "."])
def test_an_sae_id_that_is_no_folder_is_refused(sae_id, server):
    with pytest.raises(ValueError, match=f"sae_id={re.escape(repr(sae_id))} must be a relative path"):
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
        ("no weights", "is not an SAE that SAELens can load"),
        ("truncated weights", "is not an SAE that SAELens can load"),
        ("another size", "is not an SAE that SAELens can load"),
        ("another program's", "is not an SAE that SAELens can load"),
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
        (dict, {}, "saes is empty; pass at least one SAE or folder"),
        (lambda: {"a": torch.nn.Linear(2, 3)}, {}, "a Linear cannot be uploaded"),
        (
            lambda: {"a": SampledTopKTrainingSAE(config(normalize_activations="covariance_whitening"))},
            {},
            "has normalize_activations='covariance_whitening', which is not folded",
        ),
        (
            lambda: {"a": sampled_sae()},
            {"evaluation": {"b": {"l0": 1}}},
            "evaluation has 'b', which is not among the SAEs: a",
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
        with pytest.raises(ValueError, match="has training weights and loads only with sae_lens_sampled"):
            upload_to_hub({"a": refused}, REPO)
    assert server.requests == []


def with_nan(kind, folder):
    """An exported folder or a checkpoint with three NaN in its weights or its thresholds."""
    sae = trained()
    if kind == "checkpoint":
        sae.W_enc.data[:3, 0] = torch.nan
    if kind == "thresholds of a checkpoint":
        sae.rate_matcher.threshold[:3] = torch.nan
    if "checkpoint" in kind:
        return as_checkpoint(sae, folder)
    exported = to_jumprelu(sae)
    exported.threshold.data[-1] = torch.inf  # legitimate: a latent that cannot fire
    parameter = exported.W_dec if kind == "export" else exported.threshold
    parameter.data.flatten()[:3] = torch.nan
    exported.save_model(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "counted"),
    [
        ("export", f"3 of {D_SAE * D_IN} entries of W_dec"),
        ("thresholds of an export", f"3 of {D_SAE} entries of threshold"),
        ("checkpoint", f"3 of {D_SAE * D_IN} entries of W_enc"),
        (
            "thresholds of a checkpoint",
            f"cannot be exported: 3 of {D_SAE} thresholds learnt in training are negative or NaN",
        ),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_nan_is_refused_before_anything_is_sent_or_written(kind, counted, dry_run, server, tmp_path):
    folder = with_nan(kind, tmp_path / "sae")
    target = tmp_path / "out" if dry_run else None
    with pytest.raises(ValueError, match=counted) as caught:
        upload_to_hub({"good": trained(), "bad": folder}, REPO, dry_run_folder=target)
    assert repr(str(folder)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert server.requests == []
    assert not (tmp_path / "out").exists()


def test_a_latent_that_cannot_fire_is_published(tmp_path, server):
    exported = to_jumprelu(trained())
    exported.threshold.data[0] = torch.inf
    upload_to_hub({"a": exported}, REPO, dry_run_folder=tmp_path / "out")
    assert SAE.load_from_disk(tmp_path / "out" / "a").threshold[0] == torch.inf
