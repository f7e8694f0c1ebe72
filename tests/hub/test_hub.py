"""Uploads to a local Hub, and downloads of what was uploaded."""

import json

import pytest
import torch
from helpers import D_IN, D_SAE, activations, batchtopk_sae, config, train
from hub_helpers import REPO, as_checkpoint, as_folder, snapshot, trained
from hub_server import Repo
from sae_lens import SAE, StandardTrainingSAE, StandardTrainingSAEConfig

from sae_lens_sampled import SampledTopKTrainingSAE, load_checkpoint, to_jumprelu
from sae_lens_sampled.hub.upload import upload_to_hub

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


def test_a_dry_run_writes_what_an_upload_would_send_and_asks_nothing(server, tmp_path):
    saes = {"a": trained(2.0), "deep/b": as_checkpoint(trained(4.0), tmp_path / "checkpoint")}
    assert upload_to_hub(saes, REPO, dry_run_folder=tmp_path / "out") == str(tmp_path / "out")
    assert server.requests == []
    upload_to_hub(saes, REPO)
    assert snapshot(tmp_path / "out") == server.repos[REPO].files
    with pytest.raises(ValueError, match=r"dry_run_folder=.* is not an empty folder; choose a new one"):
        upload_to_hub(saes, REPO, dry_run_folder=tmp_path / "out")


@pytest.mark.parametrize("held", ["a/cfg.json", "a/sae_weights.safetensors", "a/sparsity.safetensors", "README.md"])
def test_nothing_on_the_hub_is_overwritten_without_force(held, server):
    server.repos[REPO] = Repo(private=False, files={held: b"of somebody", "notes.txt": b"kept"})
    sae = trained()
    with pytest.raises(ValueError, match=f"'{REPO}' has different content in {held}; nothing was uploaded"):
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
    with pytest.raises(ValueError, match=f"has different content in {held}; nothing was uploaded"):
        upload_to_hub({"a": sae}, REPO)


def test_sending_the_same_again_sends_nothing(server):
    saes = {"a": trained(), "b": batchtopk_sae()}
    upload_to_hub(saes, REPO)
    server.requests.clear()
    upload_to_hub(saes, REPO)
    assert server.count("POST", "/commit/") == server.count("POST", "/preupload/") == server.count("PUT") == 0


def test_private_is_kept_or_refused(server):
    sae = trained()
    upload_to_hub({"a": sae}, "alice/hidden", private=True)
    assert server.repos["alice/hidden"].private
    upload_to_hub({"a": sae}, "alice/open")
    assert not server.repos["alice/open"].private
    with pytest.raises(ValueError, match="'alice/open' exists and is public"):
        upload_to_hub({"b": sae}, "alice/open", private=True)
    assert not [path for path in server.repos["alice/open"].files if path.startswith("b/")]


@pytest.mark.parametrize("sae", [batchtopk_sae, trained])
def test_an_exported_config_is_the_same_text_in_every_process(sae, tmp_path):
    """Lets a second run resume: SAELens writes some configs in the order of a set, which differs between processes."""
    upload_to_hub({"a": sae()}, REPO, dry_run_folder=tmp_path / "out")
    text = (tmp_path / "out" / "a" / "cfg.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True)
