"""SAEs on hooks that must be switched on, and on hooks with heads: trained, exported and evaluated by SAEBench."""

from types import SimpleNamespace

import pytest
import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.training.activation_scaler import ActivationScaler
from transcoder_runner_helpers import runner_config
from transformer_lens.model_bridge import TransformerBridge

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from eval_helpers import SMALL, TINY_LM, run_small

from sae_lens_sampled import (
    DataParallelRunner,
    SampledTopKTrainingSAE,
    SampledTopKTrainingSAEConfig,
    TranscoderRunner,
)
from sae_lens_sampled.runners.calibrate_command import activations_of_run
from sae_lens_sampled.runners.hooks import FLAGS, switch_on
from sae_lens_sampled.runners.training_data import token_settings
from sae_lens_sampled.saebench import load_saes
from sae_lens_sampled.saebench.models import load_model

HOOKS = {  # hooks of the bridge and their widths; with heads, the width of all heads together
    "blocks.2.hook_mlp_in": 128,
    "blocks.2.hook_attn_in": 512,
    "blocks.2.hook_q_input": 512,
    "blocks.2.attn.hook_result": 512,
    "blocks.2.attn.o.hook_in": 128,
    "blocks.2.mlp.hook_out": 128,
}
WITH_HEADS = [name for name, width in HOOKS.items() if width == 512] + ["blocks.2.attn.o.hook_in"]
NAMES = {"blocks.2.attn.o.hook_in": "blocks.2.attn.hook_z", "blocks.2.mlp.hook_out": "blocks.2.hook_mlp_out"}


def short(hook_name):
    return hook_name.replace(".", "_")


@pytest.fixture(scope="module")
def trained(tiny_lm, tmp_path_factory):
    """Folder of the exported SAEs, and the metrics of SAELens' evaluation in training, by hook."""
    folder, evaluations = tmp_path_factory.mktemp("saes"), {}
    bridge = TransformerBridge.boot_transformers(str(tiny_lm), device="cpu")
    for hook_name, d_in in HOOKS.items():
        sae = SampledTopKTrainingSAEConfig(d_in=d_in, d_sae=256, k=16, pool_factor=None)
        fields = {"sae": sae, "hook_name": hook_name, "training_tokens": 256 * 30}
        cfg = runner_config(tiny_lm, **fields, output_path=str(folder / short(hook_name)))
        runner = DataParallelRunner(cfg, override_model=bridge)
        made = runner.run()
        evaluations[hook_name] = runner.evaluator(made, runner.activations_store, ActivationScaler())
        for flag in FLAGS.values():  # the next hook may need a flag that excludes this one
            getattr(bridge, f"set_{flag}")(False)
    return SimpleNamespace(folder=folder, evaluations=evaluations)


@pytest.fixture(scope="module")
def results(trained, tmp_path_factory):
    sources = [(short(hook_name), trained.folder / short(hook_name)) for hook_name in HOOKS]
    return run_small(sources, ["core"], tmp_path_factory.mktemp("results"))["core"]


def known_to_sae_bench(hooked, hook_name):
    """Switch the hook on, and give it an alias from which SAEBench sees that it has heads."""
    switch_on(hooked, [hook_name])
    hook = hooked.hook_dict[hook_name]
    hook.name = "blocks.2.hook_z_alias"
    hooked.hook_dict[hook.name] = hooked.mod_dict[hook.name] = hook
    return hook.name


def core_by_hand(trained, hook_name, name):
    """Unmodified core on a model with the flag on; under an alias if the hook's name does not show its heads."""
    import sae_bench.evals.core.main as core

    hooked = load_model(TINY_LM).hooked
    [loaded] = load_saes([("x", trained.folder / short(hook_name))])
    known = name if not name.endswith(("hook_attn_in", "hook_result")) else known_to_sae_bench(hooked, name)
    switch_on(hooked, [name])
    loaded.sae.cfg.metadata.hook_name, loaded.sae.cfg.metadata.hook_layer = known, 2
    store = ActivationsStore.from_sae(hooked, loaded.sae, dataset=str(TINY_LM / "text"), context_size=48)
    store.shuffle_input_dataset(seed=42)
    loaded.sae.cfg.hook_name, loaded.sae.cfg.hook_layer, loaded.sae.cfg.hook_head_index = known, 2, None
    loaded.sae.cfg.architecture_str = "jumprelu"
    special = {hooked.tokenizer.pad_token_id, hooked.tokenizer.eos_token_id, hooked.tokenizer.bos_token_id}
    config = core.CoreEvalConfig(**SMALL["core"], exclude_special_tokens_from_reconstruction=True)
    for what in ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics"):
        setattr(config, f"compute_{what}", True)
    return core.run_evals(loaded.sae, store, hooked, config, ignore_tokens=special)[0]


@pytest.mark.parametrize("hook_name", HOOKS)
def test_core_gives_what_sae_bench_gives_with_the_flag_on(trained, results, hook_name):
    got = results[f"{short(hook_name)}_custom_sae"]["eval_result_metrics"]
    want = core_by_hand(trained, hook_name, NAMES.get(hook_name, hook_name))
    n_compared = 0
    for category, numbers in want.items():
        for name, value in numbers.items():
            assert got[category][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
            n_compared += 1
    assert n_compared > 10
    assert got["model_behavior_preservation"]["kl_div_with_sae"] > 0


def test_evaluations_in_training_agree_on_how_much_is_reconstructed(trained, results):
    for hook_name in HOOKS:
        metrics = trained.evaluations[hook_name]
        core = results[f"{short(hook_name)}_custom_sae"]["eval_result_metrics"]
        assert metrics["sparsity"]["l0"] == pytest.approx(16, rel=0.05)
        want = core["reconstruction_quality"]["explained_variance"]
        assert metrics["reconstruction_quality"]["explained_variance"] == pytest.approx(want, abs=0.15), hook_name


def test_probing_reads_heads_side_by_side_and_hooks_that_must_be_switched_on(trained, tmp_path):
    """In this model attention and the MLP read the previous block's output, once or once per head."""
    widened = {hook_name: SAE.load_from_disk(trained.folder / short(hook_name)) for hook_name in HOOKS}
    same = SAE.load_from_disk(trained.folder / short("blocks.2.hook_mlp_in"))
    same.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sources = [("same", same)] + [(short(name), widened[name]) for name in ("blocks.2.hook_mlp_in", *WITH_HEADS)]
    results = run_small(sources, ["sparse_probing"], tmp_path)["sparse_probing"]
    metrics = {name.removesuffix("_custom_sae"): result["eval_result_metrics"] for name, result in results.items()}
    assert metrics["same"] == metrics["blocks_2_hook_mlp_in"]
    assert metrics["blocks_2_hook_attn_in"]["llm"] == metrics["blocks_2_hook_q_input"]["llm"]
    assert metrics.keys() >= {short(name) for name in WITH_HEADS}
    one_head = same
    one_head.cfg.metadata.hook_head_index = 1
    one_head.cfg.metadata.hook_name = "blocks.2.attn.hook_result"
    with pytest.raises(
        ValueError, match=r"^SAE 'one_custom_sae' has hook_head_index=1, but sparse probing reads whole"
    ):
        run_small([("one", one_head)], ["sparse_probing"], tmp_path)


def test_a_transcoder_may_read_and_write_hooks_with_heads(tiny_lm, tmp_path):
    hooks = {"hook_name": "blocks.2.hook_attn_in", "hook_name_out": "blocks.2.attn.hook_result"}
    cfg = runner_config(tiny_lm, **hooks, d_in=512, d_out=512, training_tokens=256 * 30)
    runner = TranscoderRunner(cfg, override_model=TransformerBridge.boot_transformers(str(tiny_lm), device="cpu"))
    made = runner.run()
    metrics = runner.evaluator(made, runner.activations_store, ActivationScaler())
    core = run_small([("heads", made)], ["core"], tmp_path)["core"]["heads_custom_sae"]["eval_result_metrics"]
    want = core["reconstruction_quality"]["explained_variance"]
    assert metrics["reconstruction_quality"]["explained_variance"] == pytest.approx(want, abs=0.15)
    assert metrics["sparsity"]["l0"] == pytest.approx(8)


def test_calibrate_switches_the_hook_on(tiny_lm):
    sae = SampledTopKTrainingSAE(SampledTopKTrainingSAEConfig(d_in=128, d_sae=256, k=16))
    metadata = sae.cfg.metadata
    metadata.hook_name, metadata.context_size, metadata.prepend_bos = "blocks.2.hook_mlp_in", 48, False
    metadata.model_name, settings = str(tiny_lm), token_settings(metadata)
    batches = activations_of_run(sae, settings, str(tiny_lm / "text"), batch_size=64)
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_pre"
    same = activations_of_run(sae, settings, str(tiny_lm / "text"), batch_size=64)
    torch.manual_seed(0)
    got = next(batches)
    torch.manual_seed(0)
    assert torch.equal(got, next(same))
