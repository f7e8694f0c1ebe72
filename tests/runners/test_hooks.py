"""The order in which hooks run, hooks that must be switched on in a model, and heads side by side."""

from contextlib import contextmanager

import pytest
import torch
from sae_lens.load_model import load_model
from transcoder_runner_helpers import runner_config
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_sampled import TranscoderRunner, as_sae_on_outputs
from sae_lens_sampled.runners.activation_cache import text_store
from sae_lens_sampled.runners.hooks import FLAGS, heads_side_by_side, one_pass, switch_on, switched_on
from sae_lens_sampled.runners.run_checks import check_hook
from sae_lens_sampled.runners.transcoder import check_outputs

TOKEN = torch.zeros(1, 1, dtype=torch.int64)
D_MODEL = 12


@pytest.fixture(scope="module")
def models(tiny_lm):
    config = {"n_layers": 2, "d_model": D_MODEL, "n_ctx": 16, "d_head": 3, "n_heads": 4, "d_vocab": 20}
    torch.manual_seed(0)
    return {
        "bridge": TransformerBridge.boot_transformers(str(tiny_lm), device="cpu"),
        "hooked": HookedTransformer(HookedTransformerConfig(**config, act_fn="relu")),
        "grouped": HookedTransformer(HookedTransformerConfig(**config, act_fn="relu", n_key_value_heads=2)),
        "auto": load_model("AutoModelForCausalLM", str(tiny_lm), device="cpu"),
    }


def config(tiny_lm, hook_name, hook_name_out, d_in=128, d_out=128):
    return runner_config(tiny_lm, hook_name=hook_name, hook_name_out=hook_name_out, d_in=d_in, d_out=d_out)


@contextmanager
def all_calls():
    """Every HookPoint in the order in which torch calls it, whatever its names."""
    called = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: called.append(module) if isinstance(module, HookPoint) else None
    )
    try:
        yield called
    finally:
        handle.remove()


def order_of_running(model):
    """Hooks in two blocks with the time at which each first runs; one dict for each of two exclusive flags."""
    orders = []
    for flag in ("use_attn_in", "use_split_qkv_input"):
        others = [name for name in model.hook_dict if name.endswith(tuple(FLAGS)) and FLAGS.get(name) != flag]
        wanted = [name for name in others if not name.endswith(ends_of_other(flag))]
        with switched_on(model, wanted), all_calls() as called, torch.no_grad():
            model(TOKEN)
        times = {id(hook): time for time, hook in reversed(list(enumerate(called)))}
        names = [name for name in model.hook_dict if is_in_two_blocks(name)]
        orders.append({name: times[id(model.hook_dict[name])] for name in names if id(model.hook_dict[name]) in times})
    return orders


def ends_of_other(flag):
    other = {"use_attn_in": "use_split_qkv_input", "use_split_qkv_input": "use_attn_in"}[flag]
    return tuple(end for end, needed in FLAGS.items() if needed == other)


def is_in_two_blocks(name):
    return any(f"{stem}.{number}" in f"{name}." for stem in ("blocks", "layers") for number in ("0.", "1."))


@pytest.mark.parametrize("kind", ["bridge", "hooked", "auto"])
def test_every_pair_of_hooks_in_two_blocks_comes_in_the_order_in_which_it_runs(models, kind):
    """All hooks in one pass, compared in pairs (a transcoder's two hooks) with the order in which torch calls them."""
    model, n_pairs = models[kind], 0
    for times in order_of_running(model):
        with switched_on(model, times):
            place = {name: i for i, name in enumerate(one_pass(model, TOKEN, times))}
        assert place.keys() == times.keys()
        for first in times:
            for second in times:
                if times[first] != times[second]:
                    n_pairs += 1
                    assert (place[first] < place[second]) == (times[first] < times[second]), (first, second)
    assert n_pairs > {"bridge": 7000, "hooked": 2000, "auto": 400}[kind]


def test_canonical_names_and_aliases_of_the_bridge_may_be_mixed(models, tiny_lm):
    """The bridge's cache lists the canonical name of a hook before the requested alias."""
    names = [
        "hook_resid_pre",
        "hook_in",
        "ln2.hook_normalized",
        "attn.hook_q",
        "attn.o.hook_in",
        "hook_attn_out",
        "mlp.in.hook_out",
        "mlp.hook_post",
        "mlp.hook_out",
        "hook_mlp_out",
        "hook_resid_post",
    ]
    names = [f"blocks.{block}.{name}" for block in (0, 1) for name in names]
    model = models["bridge"]
    times = order_of_running(model)[0]
    widths = {name: x[0, 0].numel() for name, x in one_pass(model, TOKEN, names).items()}
    for first in names:
        for second in names:
            cfg = config(tiny_lm, first, second, widths[first], widths[second])
            if times[first] < times[second]:
                check_outputs(model, cfg)
                continue
            told = f"{second} comes before {first} in " if times[first] > times[second] else "are the same hook: train"
            with pytest.raises(ValueError, match=told):
                check_outputs(model, cfg)


@pytest.mark.parametrize("hook_out", ["blocks.2.hook_mlp_out", "blocks.2.mlp.hook_out"])
def test_one_place_under_two_names_or_one_is_reported_with_the_way_out(models, tiny_lm, hook_out):
    cfg = config(tiny_lm, "blocks.2.mlp.hook_out", hook_out)
    with pytest.raises(ValueError) as error:  # noqa: PT011  compared below
        TranscoderRunner(cfg, override_model=models["bridge"])
    assert str(error.value) == (
        f"hook_name='blocks.2.mlp.hook_out' and hook_name_out={hook_out!r} are the same hook: train an SAE on it "
        "instead, with architecture sampled_topk, or name another hook_name_out."
    )


def test_an_evaluation_refuses_outputs_before_inputs_in_the_first_pass(models, tiny_lm):
    """Otherwise it would use the inputs of the previous pass."""
    model = models["bridge"]
    sae = TranscoderRunner(
        config(tiny_lm, "blocks.2.hook_resid_pre", "blocks.2.hook_mlp_out"), override_model=model
    ).sae
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = "blocks.2.hook_mlp_out", "blocks.2.hook_resid_pre"
    with as_sae_on_outputs(sae, model), pytest.raises(ValueError, match=r"^blocks\.2\.hook_resid_pre comes before"):
        model(TOKEN)
    sae.cfg.metadata.hook_name = "blocks.2.hook_in"
    with pytest.raises(ValueError, match="are the same hook"), as_sae_on_outputs(sae, model):
        pass
    sae.cfg.metadata.hook_name = "blocks.9.hook_in"
    told = r"uses hook 'blocks\.9\.hook_in', which the model does not have; pass the model that it was"
    with pytest.raises(ValueError, match=told), as_sae_on_outputs(sae, model):
        pass
    model(TOKEN)  # no hook is left on the model
    assert all(hook._forward_pre_hooks == {} for hook in model.hook_dict.values())


@pytest.mark.parametrize("kind", ["bridge", "hooked"])
@pytest.mark.parametrize("end", FLAGS)
def test_flags_are_on_for_as_long_as_hooks_need_them(models, kind, end):
    model, flag = models[kind], FLAGS[end]
    name = next(name for name in model.hook_dict if name.startswith("blocks.1.") and name.endswith(end))
    assert not getattr(model.cfg, flag)
    with switched_on(model, [name, name]):
        assert getattr(model.cfg, flag)
        (x,) = one_pass(model, TOKEN, [name]).values()
    assert x.shape[:2] == (1, 1)
    assert not getattr(model.cfg, flag)
    assert switch_on(model, [name]) == [flag]
    assert switch_on(model, [name]) == []
    getattr(model, f"set_{flag}")(False)


def test_a_flag_that_cannot_be_switched_on_is_named(models):
    with pytest.raises(
        ValueError, match=r"^blocks\.1\.hook_attn_in needs use_attn_in, which this model does not support; "
    ):
        switch_on(models["grouped"], ["blocks.1.hook_attn_in"])
    both = ["blocks.1.hook_attn_in", "blocks.1.hook_q_input"]
    with pytest.raises(ValueError, match=r"use_attn_in and .* needs use_split_qkv_input, which exclude each other"):
        switch_on(models["hooked"], both)
    told = "which excludes use_split_qkv_input, but the model has the latter on: call set_use_split"
    with switched_on(models["hooked"], both[1:]), pytest.raises(ValueError, match=told):
        switch_on(models["hooked"], both[:1])
    assert switch_on(models["auto"], ["some.hook_mlp_in"]) == []


def test_a_hook_that_never_runs_is_reported(models, tiny_lm):
    told = r"^hook_name='blocks\.2\.attn\.hook_rot_k' is a hook of .* that does not fire or yields no tensor; use"
    with pytest.raises(ValueError, match=told):
        check_hook(models["bridge"], config(tiny_lm, "blocks.2.attn.hook_rot_k", "blocks.2.hook_mlp_out"))


@pytest.mark.parametrize("name", ["blocks.1.attn.hook_result", "blocks.1.attn.o.hook_in", "blocks.1.attn.q.hook_out"])
def test_heads_side_by_side_are_read_and_written_back(models, name):
    model, tokens, shift = models["bridge"], torch.tensor([[3, 1, 4]]), {}

    def add(x, hook):
        shift["of"] = torch.linspace(-1, 1, x[0, 0].numel()).view(x.shape[2:])
        return x + shift["of"]

    with switched_on(model, [name]), torch.no_grad():
        with_heads = model.run_with_cache(tokens, names_filter=[name])[1][name]
        want = model.run_with_hooks(tokens, fwd_hooks=[(name, add)])
        assert shift["of"].ndim == 2
        with heads_side_by_side(model, [name]):
            whole = model.run_with_cache(tokens, names_filter=[name])[1][name]
            got = model.run_with_hooks(tokens, fwd_hooks=[(name, add)])
            assert shift["of"].ndim == 1
        assert torch.equal(whole, with_heads.flatten(start_dim=2))
        assert torch.equal(got, want)
        assert model.run_with_cache(tokens, names_filter=[name])[1][name].ndim == 4


def test_the_store_of_a_cache_switches_its_hook_on(tiny_lm):
    """In this model the input of the MLP equals the input of the block."""
    model, rows = TransformerBridge.boot_transformers(str(tiny_lm), device="cpu"), []
    for name in ("blocks.1.hook_mlp_in", "blocks.1.hook_resid_pre"):
        store = text_store(model, str(tiny_lm / "text"), name, 128, context_size=16, prompts=2)
        rows.append(store.get_filtered_llm_batch())
    assert torch.equal(*rows)
