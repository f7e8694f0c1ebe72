"""Attribution graphs with your own transcoders: which latents at which tokens make the model predict the next word.

    pip install --no-deps 'circuit-tracer>=0.5,<0.6'
    python examples/attribution.py

trains a transcoder with a skip connection for each MLP of the small language model in `examples/tiny_lm`, offline,
passes the transcoders to circuit-tracer, and prints the latents with the largest direct effects on the most likely next
word; about a minute on two CPU cores. A second call reuses the transcoders. Needs the `eval` extra.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
from sae_lens import SAE
from sae_lens.constants import RUNNER_CFG_FILENAME
from safetensors.torch import save_file
from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from sae_lens_sampled import SampledTopKTranscoderConfig
from sae_lens_sampled.saebench.models import load_model
from transcoder import hooks, parser, train

PROMPT = "He was not a man to be trusted; and she did not know what to"


def transcoders(args: argparse.Namespace, model: TransformerBridge) -> list[Path]:
    """Folders of the exported transcoders, block by block; missing transcoders are trained."""
    settings = f"d_sae_{args.d_sae}_k_{args.k}_steps_{args.steps}"
    folders = [args.output_dir / settings / f"block_{block}" for block in range(model.cfg.n_layers)]
    for block, folder in enumerate(folders):
        hook_in, hook_out = hooks(block)
        shared = {"d_in": model.cfg.d_model, "d_sae": args.d_sae, "k": args.k, "device": args.device}
        if not (folder / RUNNER_CFG_FILENAME).exists():  # the file that training writes last
            train(
                args, model, SampledTopKTranscoderConfig(hook_name_out=hook_out, skip=True, **shared), hook_in, folder
            )
    return folders


def save_for_circuit_tracer(folder: Path) -> Path:
    """Write the exported transcoder's weights as circuit-tracer reads them: under its names, with latents first."""
    sae: Any = SAE.load_from_disk(folder)
    weights = {
        "W_enc": sae.W_enc.T,
        "b_enc": sae.b_enc,
        "activation_function.threshold": sae.threshold,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    if sae.cfg.architecture() == "jumprelu_skip_transcoder":
        weights["W_skip"] = sae.W_skip
    file = folder / "circuit_tracer.safetensors"
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, file)
    return file


def replacement_model(hooked: HookedTransformer, folders: list[Path]) -> Any:
    """circuit-tracer's model, with the MLPs replaced by transcoders."""
    # It requires huggingface-hub below 1, which had this constant; nothing else that is used here is missing.
    huggingface_hub.constants.HF_HUB_ENABLE_HF_TRANSFER = False  # type: ignore[attr-defined]
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    files = {block: str(save_for_circuit_tracer(folder)) for block, folder in enumerate(folders)}
    hook_in, hook_out = (hook.removeprefix("blocks.0.") for hook in hooks(0))
    loaded = load_transcoder_set(files, "", hook_in, hook_out, lazy_encoder=False, lazy_decoder=False)
    model = TransformerLensReplacementModel(hooked.cfg, tokenizer=hooked.tokenizer)
    model.load_state_dict(hooked.state_dict())
    model._configure_replacement_model(loaded)
    return model


def main() -> None:
    arguments = parser(__doc__, Path("attribution_output"))
    arguments.add_argument("--prompt", default=PROMPT)
    args = arguments.parse_args()
    try:
        import circuit_tracer
    except ModuleNotFoundError:
        sys.exit("attribution needs circuit-tracer: pip install --no-deps 'circuit-tracer>=0.5,<0.6'")
    folders = transcoders(args, TransformerBridge.boot_transformers(args.model, device=args.device))
    hooked = load_model(args.model, args.device).hooked
    tokens = hooked.to_tokens(args.prompt, prepend_bos=True)[0]
    graph = circuit_tracer.attribute(tokens, replacement_model(hooked, folders), batch_size=64)
    words = [hooked.to_string(token) for token in tokens]
    target, share = graph.logit_targets[0].token_str, graph.logit_probabilities[0]
    print(f"\n{''.join(words)!r} continues with {target!r}, with probability {share:.0%}.")
    print(f"Of {len(graph.active_features):,} active latents, these directly raise or lower that token's logit most:\n")
    first_logit = len(graph.adjacency_matrix) - len(graph.logit_targets)
    effects = graph.adjacency_matrix[first_logit, : len(graph.selected_features)]
    print(f"{'block':>6}{'token':>16}{'latent':>8}{'activation':>12}{'effect':>9}")
    for place in effects.abs().topk(10).indices:
        feature = graph.selected_features[place]
        block, position, latent = graph.active_features[feature].tolist()
        activation = graph.activation_values[feature]
        print(f"{block:6}{words[position]!r:>16}{latent:8}{activation:12.2f}{effects[place]:9.3f}")


if __name__ == "__main__":
    main()
