"""What `run_evals` depends on: models, hooks, settings, the network."""

import json
import shutil
import socket
import time

import datasets.config
import pytest
import torch

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from eval_helpers import HOOK, PROBING, SMALL, TINY_LM, core_by_hand
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from sae_lens_sampled.saebench import EvalError, load_saes, network, run_evals, runner
from sae_lens_sampled.saebench.bundled import bundled
from sae_lens_sampled.saebench.models import attach, load_model, transformer_lens_hook
from sae_lens_sampled.saebench.network import check_network
from sae_lens_sampled.saebench.results import write_result
from sae_lens_sampled.saebench.sources import parse_source, seed_group
from sae_lens_sampled.saebench.top_contexts import TopActivations


def an_sae(**fields):
    metadata = SAEMetadata(**{"model_name": str(TINY_LM), "hook_name": HOOK, "prepend_bos": False} | fields)
    sae = StandardSAE(StandardSAEConfig(d_in=128, d_sae=64, metadata=metadata))
    torch.nn.init.normal_(sae.W_enc)
    sae.W_dec.data = torch.nn.functional.normalize(sae.W_enc.data.T, dim=1)
    return sae


@pytest.fixture(scope="module")
def model():
    return load_model(TINY_LM)


def run(saes, output_dir, evals=("core",), **fields):
    defaults = {"model": TINY_LM, "text": TINY_LM / "text", "probing_datasets": [PROBING], "show_progress": False}
    return run_evals(saes, evals, output_dir=output_dir, **defaults | fields)


def test_a_model_has_the_same_fingerprint_wherever_it_lies_and_another_with_another_weight(model, tmp_path):
    folder = tmp_path / "t5-llama-gemma" / "bert"  # names that TransformerLens mistakes for architectures
    shutil.copytree(TINY_LM, folder, ignore=shutil.ignore_patterns("text"))
    copy = load_model(folder)
    assert copy.name == "bert"
    assert copy.fingerprint == model.fingerprint
    tokens = torch.tensor([[5, 6, 7]])
    assert torch.equal(copy.hooked(tokens), model.hooked(tokens))
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.layers.0.mlp.dense_h_to_4h.bias"][3] += 0.25
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(folder).fingerprint != model.fingerprint


def test_a_folder_without_config_or_tokenizer_is_reported(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json; it must be in Hugging Face format\.$"):
        load_model(tmp_path)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY_LM / name, tmp_path)
    with pytest.raises(ValueError, match=r"has no tokenizer .*tokenizer\.save_pretrained\(folder\)\.$"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("gpt_neox.layers.3", "blocks.3.hook_resid_post"),
        ("model.layers.11", "blocks.11.hook_resid_post"),
        ("transformer.h.0", "blocks.0.hook_resid_post"),
        ("blocks.2.hook_out", "blocks.2.hook_resid_post"),
        ("blocks.3.hook_resid_pre", "blocks.2.hook_resid_post"),
        ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_pre"),
        ("blocks.2.hook_mlp_out", "blocks.2.hook_mlp_out"),
    ],
)
def test_equal_places_have_one_name(name, want):
    assert transformer_lens_hook(name) == want


def test_the_sae_gets_what_sae_bench_reads(model):
    [sae] = load_saes([("one", an_sae(hook_name="gpt_neox.layers.1", prepend_bos=None, model_name="elsewhere/lm"))])
    attach(sae, model)
    metadata = sae.sae.cfg.metadata
    assert (metadata.hook_name, metadata.hook_layer) == ("blocks.1.hook_resid_post", 1)
    assert (metadata.model_name, metadata.prepend_bos) == ("tiny_lm", False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hook_name": "blocks.9.hook_resid_post"},
            r"SAE 'one_custom_sae' uses hook 'blocks\.9\.hook_resid_post', which model 'tiny_lm' of TransformerLens "
            r"does not have; leave this SAE out\.$",
        ),
        ({"hook_name": None}, r"has no hook_name in its metadata"),
    ],
)
def test_an_sae_of_another_place_is_reported_before_any_work(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run([("one", an_sae(**fields))], tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_an_sae_of_another_width_is_reported(tmp_path):
    sae = StandardSAE(StandardSAEConfig(d_in=96, d_sae=64, metadata=SAEMetadata(model_name="x", hook_name=HOOK)))
    with pytest.raises(
        ValueError, match=r"has d_in=96, but blocks\.2\.hook_resid_post of model 'tiny_lm' is 128 wide: the SAE was "
    ):
        run([("one", sae)], tmp_path)


def test_absorption_refuses_hooks_that_it_would_not_read(tmp_path):
    with pytest.raises(ValueError, match=r"uses hook 'blocks\.2\.hook_mlp_out', but absorption always reads blocks\.N"):
        run([("one", an_sae(hook_name="blocks.2.hook_mlp_out"))], tmp_path, ["absorption"])


def test_core_runs_on_hooks_inside_a_block_as_sae_bench_does(tmp_path):
    saes = {hook: an_sae(hook_name=f"blocks.2.{hook}") for hook in ("hook_mlp_out", "attn.hook_z", "hook_attn_out")}
    got = run(list(saes.items()), tmp_path / "ours", overrides={"core": SMALL["core"]})["core"]
    for hook, sae in saes.items():
        want = core_by_hand(hook, sae, tmp_path / "by_hand")
        assert got[f"{hook}_custom_sae"]["eval_result_metrics"] == want["eval_result_metrics"]


def test_mmcs_refuses_one_sae_and_saes_of_different_hooks(tmp_path):
    with pytest.raises(ValueError, match="mmcs compares SAEs, so it needs at least two; leave it out for one"):
        run([("one", an_sae())], tmp_path, ["mmcs"])
    with pytest.raises(ValueError, match="hook_name"):
        run([("one", an_sae()), ("two", an_sae(hook_name="blocks.1.hook_resid_post"))], tmp_path, ["mmcs"])


def test_unknown_evals_are_reported(tmp_path):
    with pytest.raises(ValueError, match=r"^evals=\['cor'\] must be one or more of \['core', 'sparse_probing', 'abs"):
        run([("one", an_sae())], tmp_path, ["cor"])
    with pytest.raises(ValueError, match=r"^overrides \(--set\) has 'scr', which is not an eval; use one of \['core'"):
        run([("one", an_sae())], tmp_path, overrides={"scr": {}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"core": {"contextsize": 16}},
            r"^overrides\['core'\] sets 'contextsize', which is not among the fields of its configuration: ",
        ),
        ({"core": {"llm_dtype": "bfloat16"}}, r"sets 'llm_dtype'; pass dtype=\.\.\. instead\.$"),
        ({"core": {"dataset": "x"}}, r"sets 'dataset'; pass text=\.\.\. instead\.$"),
        (
            {"mmcs": {"live_density": 0.1}},
            r"^overrides \(--set\) has 'mmcs', which is not among evals=\['core'\]; add it there or leave it out\.$",
        ),
    ],
)
def test_overrides_that_would_do_nothing_or_harm_are_reported(overrides, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run([("one", an_sae())], tmp_path, overrides=overrides)


def test_saes_of_different_models_need_the_model_named(tmp_path):
    saes = [("one", an_sae()), ("two", an_sae(model_name="gpt2"))]
    with pytest.raises(ValueError, match=r"do not name one common model: .*'gpt2'.*; pass model=\.\.\. \(--model\)\.$"):
        run(saes, tmp_path, model=None)


def test_nothing_but_broken_weights_is_reported_before_any_work(tmp_path):
    broken = an_sae()
    broken.W_enc.data[3, 4] = torch.nan
    evals = ["core", "sparse_probing"]
    with pytest.raises(EvalError) as error:
        run([("one", broken)], tmp_path, evals, overrides={name: SMALL[name] for name in evals})
    assert str(error.value) == (
        "2 of 2 results are missing:\ncore of one_custom_sae, sparse_probing of one_custom_sae: ValueError: 1 of 8,192 "
        "entries of W_enc are not finite, so this SAE is unusable: its training has probably diverged. Use an "
        "earlier checkpoint, or train with a lower learning rate."
    )
    assert not list(tmp_path.iterdir())


def test_hooks_outside_the_blocks_are_reported(tmp_path):
    with pytest.raises(ValueError, match="uses hook 'hook_embed'; SAEBench supports only hooks inside a block"):
        run([("one", an_sae(hook_name="hook_embed"))], tmp_path)


def test_two_data_sets_of_one_name_are_reported(tmp_path):
    with pytest.raises(ValueError, match=r"two of probing_datasets have the same name: \['sentence_polarity', "):
        run([("one", an_sae())], tmp_path, ["sparse_probing"], probing_datasets=[PROBING, PROBING])


def test_numbers_that_json_does_not_have_become_none(tmp_path):
    [sae] = load_saes([("one", an_sae())])
    result = {"sae_cfg_dict": {}, "eval_result_metrics": {"a": {"b": float("inf"), "c": [1.5, float("nan")]}}}
    result["eval_result_unstructured"] = {"fvu": float("nan")}
    write_result(tmp_path / "x.json", result, sae, {})
    text = (tmp_path / "x.json").read_text()
    written = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert written["eval_result_metrics"] == {"a": {"b": None, "c": [1.5, None]}}
    assert written["eval_result_unstructured"] == {"fvu": None}


def test_a_temporary_folder_with_a_meaning_is_not_used(monkeypatch, tmp_path):
    (tmp_path / "albert").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "albert"))
    assert load_model(TINY_LM).hooked.cfg.d_model == 128


def test_the_fingerprint_sees_the_vocabulary(model, tmp_path):
    shutil.copytree(TINY_LM, tmp_path / "lm", ignore=shutil.ignore_patterns("text"))
    tokenizer = json.loads((tmp_path / "lm" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "lm" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_model(tmp_path / "lm").fingerprint != model.fingerprint


def test_without_a_network_the_remedy_comes_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(network, "_is_reachable", lambda: False)
    start = time.monotonic()
    with pytest.raises(ConnectionError) as error:
        run(
            [("one", an_sae())],
            tmp_path,
            ["core", "sparse_probing"],
            model="pythia-14m",
            text=None,
            probing_datasets=(),
        )
    assert time.monotonic() - start < 20
    text = str(error.value)
    assert text.startswith(
        "model 'pythia-14m', text 'Skylion007/openwebtext', SAEBench's eight probing data sets must be"
    )
    assert text.endswith(
        "pass local ones: a folder as model (--model), a folder as text (--text), files as probing_datasets "
        "(--probing-data). For SAEs of the bundled model, offline=True (--offline) is enough."
    )
    with pytest.raises(ConnectionError, match="but offline is set"):
        run([("one", an_sae())], tmp_path, model="pythia-14m", offline=True)


def test_a_host_that_refuses_is_not_reachable(monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    assert not network._is_reachable()


def test_folders_need_no_network(monkeypatch):
    monkeypatch.setattr(network, "_is_reachable", lambda: pytest.fail("asked the Hub"))
    assert check_network(str(TINY_LM), str(TINY_LM / "text"), default_probing_datasets=False, offline=False)


def test_an_unknown_model_is_reported():
    with pytest.raises(ValueError, match=r"^model='my-lm' is neither a folder nor one of TransformerLens' official"):
        check_network("my-lm", None, default_probing_datasets=False, offline=False)
    with pytest.raises(ValueError, match=r"^model='/gone' is not a folder on this machine; pass the language model's"):
        check_network("/gone", None, default_probing_datasets=False, offline=False)


def test_offline_only_what_the_evals_read_is_taken_from_the_repository(monkeypatch, tmp_path):
    monkeypatch.setattr("sae_lens_sampled.saebench.runner.bundled", lambda path: pytest.fail(f"took {path}"))
    saes = [("one", an_sae()), ("two", an_sae())]
    fields = {"text": None, "probing_datasets": (), "offline": True}
    assert run(saes, tmp_path, ["mmcs"], **fields)["mmcs"].keys() == {"one_custom_sae", "two_custom_sae"}
    assert run(saes, tmp_path / "prepared", ["mmcs"], **fields, prepare_only=True) == {}


def test_offline_no_server_is_asked_about_local_probing_data(monkeypatch, tmp_path):
    modes, load = [], runner.load_probing_datasets

    def noted(sources):
        modes.append(datasets.config.HF_HUB_OFFLINE)
        return load(sources)

    monkeypatch.setattr(runner, "load_probing_datasets", noted)
    run([("one", an_sae()), ("two", an_sae())], tmp_path, ["mmcs"], offline=True)
    assert modes == [True]


def test_offline_without_the_repository_is_reported(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="clone the repository, or pass your own"):
        bundled(tmp_path / "tiny_lm")


@pytest.mark.parametrize(
    ("release", "group"),
    [
        ("topk_seed0", "topk"),
        ("topk-seed-12", "topk"),
        ("runs/seed_3/topk", "runs/topk"),
        ("topk_seed1_layer2", "topk_layer2"),
        ("seedless", "seedless"),
        ("birdseed5", "birdseed5"),
    ],
)
def test_seeds_are_reported_by_the_name(release, group):
    assert seed_group(release) == group


def test_arguments_are_folders_or_pairs(tmp_path):
    assert parse_source("me/repo:layer_6/a") == ("me/repo", "layer_6/a")
    assert parse_source(f"name={tmp_path}") == ("name", tmp_path)
    assert parse_source("folder") == type(tmp_path)("folder")
    (tmp_path / "a:b").mkdir()
    assert parse_source(str(tmp_path / "a:b")) == tmp_path / "a:b"


def test_top_activations_are_those_of_sorting_the_maxima_of_all_batches():
    generator = torch.Generator().manual_seed(0)
    acts = torch.rand(9, 30, 5, generator=generator)
    top = TopActivations(5, "cpu")
    for i, batch in enumerate(acts):
        top.update(torch.arange(30 * i, 30 * i + 30), batch)
    for latent in range(5):
        column = acts[:, :, latent]
        want = sorted(((column[i].max().item(), 30 * i + int(column[i].argmax())) for i in range(9)), reverse=True)[:3]
        assert list(zip(top.values[:, latent].tolist(), top.places[:, latent].tolist(), strict=True)) == want
