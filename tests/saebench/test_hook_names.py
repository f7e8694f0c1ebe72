"""SAEs on hooks whose names in TransformerLens' bridge and Hugging Face models differ from HookedTransformer's."""

import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.load_model import HookedProxyLM, load_model
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import Transcoder, TranscoderConfig
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.pretrained.weight_conversions import (
    convert_gemma_weights,
    convert_gpt2_weights,
    convert_llama_weights,
    convert_mistral_weights,
    convert_qwen2_weights,
    convert_qwen3_weights,
)

pytest.importorskip("sae_bench", reason="needs the extra `eval`")

from sae_lens_sampled.runners.hooks import one_pass, switched_on
from sae_lens_sampled.saebench import load_saes
from sae_lens_sampled.saebench.hook_names import ARCHITECTURES, transformer_lens_hook
from sae_lens_sampled.saebench.models import EvalModel, attach
from sae_lens_sampled.saebench.models import load_model as load_eval_model

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
SIZES = {"vocab_size": 4096, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 32}


@pytest.fixture(scope="module")
def bundled(tiny_lm):
    return SimpleNamespace(
        eval=load_eval_model(tiny_lm),
        bridge=TransformerBridge.boot_transformers(str(tiny_lm), device="cpu"),
        auto=load_model("AutoModelForCausalLM", str(tiny_lm), device="cpu"),
    )


def shown_and_effect(model, hook_name):
    """Activations at a hook, heads side by side, and the output if they are permuted; None if it never runs."""
    seen = []

    def mix(x, hook):
        seen.append(x.flatten(start_dim=2))
        return seen[0].roll(1, -1).view(x.shape)

    with switched_on(model, [hook_name]), torch.no_grad():
        model.hook_dict[hook_name].add_hook(mix)
        output = model(TOKENS).log_softmax(dim=-1)
        model.hook_dict[hook_name].remove_hooks()
    return (seen[0], output) if seen else None


def runs(model, hook_name):
    with switched_on(model, [hook_name]):
        return bool(one_pass(model, TOKENS, [hook_name]))


def assert_is_same_place(model, hook_name, hooked, known):
    there, here = shown_and_effect(model, hook_name), shown_and_effect(hooked, known)
    for what, got, want in zip(("activations", "effect"), here, there, strict=True):
        torch.testing.assert_close(
            got, want, atol=1e-4, rtol=1e-4, msg=lambda text, w=what: f"{w} of {hook_name} as {known}: {text}"
        )


def attached(hook_name, d_in, model, **fields):
    """(hook name in SAEBench's model, None), or (None, error message) if the SAE is refused."""
    metadata = SAEMetadata(model_name="x", hook_name=hook_name, prepend_bos=False, **fields)
    [sae] = load_saes([("one", StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=8, metadata=metadata)))])
    try:
        attach(sae, model)
    except ValueError as error:
        return None, str(error)
    return sae.sae.cfg.metadata.hook_name, None


OTHERS = {  # hooks of the bundled model that HookedTransformer lacks, and what the error must name
    "ln1.hook_in": "blocks.1.hook_resid_pre",
    **dict.fromkeys(
        ("ln1.hook_out", "attn.hook_in", "attn.q.hook_in", "attn.k.hook_in", "attn.v.hook_in", "input_layernorm"),
        "blocks.1.ln1.hook_normalized",
    ),
    **dict.fromkeys(
        ("ln2.hook_out", "mlp.hook_in", "mlp.in.hook_in", "post_attention_layernorm"), "blocks.1.ln2.hook_normalized"
    ),
    **dict.fromkeys(("attn.hook_cos", "attn.hook_sin", "attention.query_key_value"), "model 'tiny_lm'"),
    **dict.fromkeys(("attn.hook_attn_scores", "attn.hook_pattern"), "without one row per token"),
}


@pytest.mark.parametrize("kind", ["bridge", "auto"])
def test_every_hook_of_a_block_is_the_same_place_under_another_name_or_refused(bundled, kind):
    """Compared by activations, and by the effect of changing them; hooks that never run cannot be trained on."""
    model, refused = getattr(bundled, kind), set()
    for name in model.hook_dict:
        if not name.startswith(("blocks.1.", "gpt_neox.layers.1")):
            continue
        with switched_on(model, [name]):
            shown = one_pass(model, TOKENS, [name])
        if not shown:
            assert name.endswith(("hook_rot_k", "hook_rot_q", "qkv.hook_in", "qkv.hook_out")), name
            continue
        known, why = attached(name, shown[name][0, 0].numel(), bundled.eval)
        if known is not None:
            assert_is_same_place(model, name, bundled.eval.hooked, known)
            continue
        rest = name.split(".1.")[1]
        refused.add(rest)
        assert name in why
        assert why.endswith((f"; the nearest is {OTHERS[rest]}: train an SAE on that.", ".")), why
        assert OTHERS[rest] in why
    assert refused == {name for name in OTHERS if ("hook_" in name) == (kind == "bridge")}


def weights_and_config(kind: str) -> tuple[Any, Any, dict[str, Any]]:
    """Config of a small Hugging Face model, TransformerLens' weight conversion, and the architecture's own fields."""
    family = kind.removesuffix("2").removesuffix("3")
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=4096, n_embd=24, n_layer=2, n_head=4, n_positions=32)
        own = {"d_mlp": 96, "act_fn": "gelu_new", "normalization_type": "LN", "eps": 1e-5}
        return config, convert_gpt2_weights, own
    classes = {"gemma3": "Gemma3TextConfig"}
    config = getattr(transformers, classes.get(kind, f"{kind.capitalize()}Config"))(**SIZES, **HEADS)
    own = {"n_key_value_heads": 2, "normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 6}
    own |= {"d_mlp": 40, "act_fn": "gelu_pytorch_tanh" if family == "gemma" else "silu", "gated_mlp": True}
    own |= {"final_rms": True, "use_qk_norm": kind in ("qwen3", "gemma3")}
    if kind in ("gemma2", "gemma3"):
        own |= {"use_normalization_before_and_after": True, "attn_scale": config.query_pre_attn_scalar**0.5}
    if kind == "gemma2":
        own |= {"attn_scores_soft_cap": 50.0, "output_logits_soft_cap": 30.0}
    if kind == "gemma3":
        config.layer_types, own["rotary_base"] = ["full_attention"] * 2, 1_000_000
    if kind in ("llama", "mistral", "qwen2", "qwen3"):
        own["eps"] = config.rms_norm_eps
    convert = {"llama": convert_llama_weights, "mistral": convert_mistral_weights, "gemma": convert_gemma_weights}
    convert |= {"qwen2": convert_qwen2_weights, "qwen3": convert_qwen3_weights}
    return config, convert.get(kind, convert.get(family)), own


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_names_of_other_architectures_are_of_the_same_places(kind, tiny_lm, tmp_path):
    config, convert, own = weights_and_config(kind)
    torch.manual_seed(0)
    source = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in source.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_lm / file, tmp_path)
    source.save_pretrained(tmp_path)
    architecture = type(source).__name__
    shape = {"n_layers": 2, "d_model": 24, "d_head": 6, "n_heads": 4, "n_ctx": 32, "d_vocab": 4096, "eps": 1e-6}
    hooked = HookedTransformer(HookedTransformerConfig(**shape | own, original_architecture=architecture))
    hooked.load_state_dict(convert(source, hooked.cfg), strict=False)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    stem = "transformer.h" if kind == "gpt2" else "model.layers"
    translated = set()
    for model, prefix in ((HookedProxyLM(source, bridge.tokenizer), stem), (bridge, "blocks")):
        torch.testing.assert_close(hooked(TOKENS).log_softmax(-1), model(TOKENS).log_softmax(-1), atol=1e-4, rtol=1e-4)
        for name in model.hook_dict:
            known = transformer_lens_hook(name, architecture)
            if not name.startswith(f"{prefix}.1") or known == name or not runs(model, name):
                continue
            # Heads with shared keys and values have no separate inputs: switching on the flag rejects such an SAE.
            if not (known.endswith("hook_attn_in") and hooked.cfg.n_key_value_heads):
                assert_is_same_place(model, name, hooked, known)
            translated.add(name.removeprefix(f"{prefix}.1").removeprefix("."))
    # Every name in the table except one, which most bridges do not run.
    assert ARCHITECTURES[architecture].keys() - translated <= {"attn.hook_hidden_states"}


def test_what_a_pass_of_the_model_shows_to_be_wrong_is_reported(bundled):
    heads = "blocks.1.attn.hook_result"
    assert attached(heads, 128, bundled.eval, hook_head_index=3) == (heads, None)
    _, why = attached(heads, 128, bundled.eval, hook_head_index=4)
    assert why.endswith("of shape (5, 4, 128) for 5 tokens, without one row per token or a head 4; leave it out.")
    _, why = attached(heads, 128, bundled.eval)
    assert why == (
        f"SAE 'one_custom_sae' has d_in=128, but {heads} of model 'tiny_lm' is 512 wide: the SAE was trained on "
        "another model or hook (model_name=x); check both."
    )
    _, why = attached("gpt_neox.layers.9.mlp", 128, bundled.eval)
    assert why.startswith("SAE 'one_custom_sae' uses hook 'gpt_neox.layers.9.mlp', which model 'tiny_lm' of Transf")
    assert not bundled.eval.hooked.cfg.use_attn_result


def test_a_flag_that_the_evaluated_model_cannot_have_is_reported():
    """Separate inputs of heads with shared keys and values, which the bridge has but HookedTransformer lacks."""
    config = {"n_layers": 2, "d_model": 12, "n_ctx": 16, "d_head": 3, "n_heads": 4, "d_vocab": 20, "act_fn": "relu"}
    hooked = HookedTransformer(HookedTransformerConfig(**config, n_key_value_heads=2))
    _, why = attached("blocks.1.attn.hook_attn_in", 48, EvalModel("grouped", hooked, ""))
    assert why.startswith(
        "SAE 'one_custom_sae' cannot be evaluated on model 'grouped': blocks.1.hook_attn_in needs use_attn_in, which "
        "this model does not support; choose another hook. (Can't use attn_in with GroupedQueryAttention"
    )


def test_transcoders_whose_outputs_come_first_are_refused(bundled):
    def transcoder(hook_in, hook_out):
        metadata = SAEMetadata(model_name="x", hook_name=hook_in, hook_name_out=hook_out, prepend_bos=False)
        sizes = {"d_in": 128, "d_out": 128, "d_sae": 8}
        [sae] = load_saes(
            [("one", Transcoder(TranscoderConfig(**sizes, apply_b_dec_to_input=False, metadata=metadata)))]
        )
        return sae

    right = transcoder("blocks.1.hook_in", "gpt_neox.layers.1.mlp")
    attach(right, bundled.eval)
    metadata = right.sae.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out) == ("blocks.0.hook_resid_post", "blocks.1.hook_mlp_out")
    with pytest.raises(ValueError) as error:  # noqa: PT011  compared below
        attach(transcoder("blocks.1.mlp.hook_out", "blocks.1.hook_in"), bundled.eval)
    assert str(error.value) == (
        "transcoder 'one_custom_sae' reconstructs blocks.0.hook_resid_post, which comes before its input hook "
        "blocks.1.hook_mlp_out in model 'tiny_lm', but must come after it; leave this transcoder out."
    )
