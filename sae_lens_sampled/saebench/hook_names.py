"""Translate hook names of TransformerLens' bridge and of Hugging Face models to those of HookedTransformer.

A name is translated only if the activations are the same and replacing them has the same effect, which depends on the
architecture. `tests/saebench/test_hook_names.py` compares activations and effects under the two names.
"""

import re

BLOCK = re.compile(
    r"(?P<stem>gpt_neox\.layers|model\.layers|model\.decoder\.layers|transformer\.h|transformer\.blocks|blocks)"
    r"\.(?P<number>\d+)(?:\.(?P<rest>.+))?"
)

# Each table maps a place in a HookedTransformer block to its other names.
Places = dict[str, str]

BRIDGE_ANYWHERE: Places = {
    "hook_resid_pre": "hook_in",
    "hook_resid_post": "hook_out",
    "hook_attn_in": "attn.hook_attn_in",
    "hook_q_input": "attn.hook_q_input",
    "hook_k_input": "attn.hook_k_input",
    "hook_v_input": "attn.hook_v_input",
}
BRIDGE: Places = {
    "attn.hook_q": "attn.q.hook_out",
    "attn.hook_k": "attn.k.hook_out",
    "attn.hook_v": "attn.v.hook_out",
    "attn.hook_z": "attn.o.hook_in",
    "hook_mlp_in": "ln2.hook_in",
    "mlp.hook_post": "mlp.out.hook_in",
}
BRIDGE_OUTPUTS: Places = {
    "hook_attn_out": "attn.hook_out attn.o.hook_out attn.hook_hidden_states",
    "hook_mlp_out": "mlp.hook_out mlp.out.hook_out",
}
BRIDGE_PLAIN: Places = {"mlp.hook_pre": "mlp.in.hook_out"}
BRIDGE_GATED: Places = {"mlp.hook_pre": "mlp.gate.hook_out", "mlp.hook_pre_linear": "mlp.in.hook_out"}
NEOX: Places = {
    "hook_attn_out": "attention attention.dense post_attention_dropout",
    "mlp.hook_pre": "mlp.dense_h_to_4h",
    "mlp.hook_post": "mlp.act",
    "hook_mlp_out": "mlp mlp.dense_4h_to_h post_mlp_dropout",
}
GPT2: Places = {
    "hook_attn_out": "attn attn.c_proj attn.resid_dropout",
    "mlp.hook_pre": "mlp.c_fc",
    "mlp.hook_post": "mlp.act",
    "hook_mlp_out": "mlp mlp.c_proj mlp.dropout",
}
HEADS: Places = {
    "attn.hook_q": "self_attn.q_proj",
    "attn.hook_k": "self_attn.k_proj",
    "attn.hook_v": "self_attn.v_proj",
}
GATED: Places = {"mlp.hook_pre": "mlp.gate_proj", "mlp.hook_pre_linear": "mlp.up_proj"}
OUTPUTS: Places = {"hook_attn_out": "self_attn self_attn.o_proj", "hook_mlp_out": "mlp mlp.down_proj"}
# Outputs that the model normalises before adding them to the residual stream; HookedTransformer hooks them afterwards.
NORMALISED_OUTPUTS: Places = {
    "hook_attn_out": "ln1_post.hook_out post_attention_layernorm",
    "hook_mlp_out": "ln2_post.hook_out post_feedforward_layernorm",
}
# Names of places that HookedTransformer lacks, by the nearest place that it has.
NEAREST: Places = {
    "hook_resid_pre": "ln1.hook_in",
    "ln1.hook_normalized": "ln1.hook_out attn.hook_in attn.q.hook_in attn.k.hook_in attn.v.hook_in attn.qkv.hook_in "
    "input_layernorm ln_1",
    "ln2.hook_normalized": "ln2.hook_out mlp.hook_in mlp.gate.hook_in mlp.in.hook_in post_attention_layernorm "
    "pre_feedforward_layernorm ln_2",
}


def _by_name(*tables: Places) -> dict[str, str]:
    """Invert `tables`: map every other name to its place."""
    return {name: place for table in tables for place, names in table.items() for name in names.split()}


LLAMA = _by_name(BRIDGE, BRIDGE_OUTPUTS, BRIDGE_GATED, HEADS, GATED, OUTPUTS)
GEMMA_2 = _by_name(BRIDGE, BRIDGE_GATED, HEADS, GATED, NORMALISED_OUTPUTS)
ARCHITECTURES = {
    "GPTNeoXForCausalLM": _by_name(BRIDGE, BRIDGE_OUTPUTS, BRIDGE_PLAIN, NEOX),
    "GPT2LMHeadModel": _by_name(BRIDGE, BRIDGE_OUTPUTS, BRIDGE_PLAIN, GPT2),
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "GemmaForCausalLM": LLAMA,
    "Gemma2ForCausalLM": GEMMA_2,
    "Gemma3ForCausalLM": GEMMA_2,
}
"""Tables from other names (of the bridge and of Hugging Face) to HookedTransformer's, by Hugging Face architecture."""
ANYWHERE = _by_name(BRIDGE_ANYWHERE)
NEIGHBOURS = _by_name(BRIDGE, BRIDGE_OUTPUTS, BRIDGE_PLAIN, GPT2, NEOX, HEADS, OUTPUTS, NORMALISED_OUTPUTS, NEAREST)


def transformer_lens_hook(hook_name: str, architecture: str | None = None) -> str:
    """Return the TransformerLens name of the same place, or `hook_name` itself if it is not translated.

    `gpt_neox.layers.3` becomes `blocks.3.hook_resid_post`. The input of a block after the first is named as the output
    of the block before it, because SAEBench's absorption reads only `hook_resid_post`.

    Args:
        hook_name: name in HookedTransformer, in TransformerLens' bridge or in a Hugging Face model.
        architecture: class of the Hugging Face model, such as "GPTNeoXForCausalLM"; None translates only names that
            mean the same in every architecture.
    """
    match = BLOCK.fullmatch(hook_name)
    if match is None:
        return hook_name
    number, rest, is_of_bridge = int(match["number"]), match["rest"], match["stem"] == "blocks"
    if rest is None:
        return hook_name if is_of_bridge else f"blocks.{number}.hook_resid_post"
    own = ARCHITECTURES.get(architecture or "", {})
    place = (ANYWHERE | own).get(rest, rest) if is_of_bridge == ("hook_" in rest) else rest
    if place == "hook_resid_pre" and number > 0:
        return f"blocks.{number - 1}.hook_resid_post"
    return f"blocks.{number}.{place}" if is_of_bridge or place != rest else hook_name


def is_in_block(hook_name: str) -> bool:
    """Whether the name is that of a block of a model or of a place inside one."""
    return BLOCK.fullmatch(hook_name) is not None


def nearest_hook(hook_name: str) -> str | None:
    """Return the TransformerLens name nearest to a place that HookedTransformer lacks; None if none is known."""
    match = BLOCK.fullmatch(hook_name)
    place = None if match is None else NEIGHBOURS.get(match["rest"] or "")
    return None if match is None or place is None else f"blocks.{match['number']}.{place}"
