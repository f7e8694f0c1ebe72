"""How well first letters can be read from the model's residual stream, by SAEBench's own probes.

    python examples/tiny_lm/first_letters.py examples/tiny_lm

Trains the linear probes of SAEBench's absorption evaluation on every layer (they see 80 % of the single-token words)
and writes their F1 on the other words to `first_letters.json` and into the model card. Absorption evaluates the letters
above 0.6. Needs sae_bench.
"""

import argparse
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from card import write_card
from sae_bench.evals.absorption.common import load_or_train_probe, load_probe_data_split
from sae_bench.evals.absorption.probing import gen_probe_stats
from sae_bench.evals.absorption.prompting import VERBOSE_FIRST_LETTER_TEMPLATE, VERBOSE_FIRST_LETTER_TOKEN_POS
from transformer_lens.model_bridge import TransformerBridge


def f1_per_letter(model: TransformerBridge, layer: int, probes: Path) -> dict[str, float]:
    probe = load_or_train_probe(
        model, VERBOSE_FIRST_LETTER_TEMPLATE, VERBOSE_FIRST_LETTER_TOKEN_POS, layer, probes, device="cpu"
    )
    activations, words = load_probe_data_split(model, layer, "test", probes, device="cpu")
    labels = torch.tensor([label for _, label in words])
    # Above 0 is what the absorption evaluation counts as found.
    return {stats.letter: round(stats.f1, 3) for stats in gen_probe_stats(probe, activations, labels, 0.0, "cpu")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    model = TransformerBridge.boot_transformers(str(args.model), device="cpu")
    model.cfg.model_name = args.model.name  # names the folder that the probes are stored in
    with TemporaryDirectory() as probes:
        f1_by_layer = {
            f"layer_{layer}": f1_per_letter(model, layer, Path(probes)) for layer in range(model.cfg.n_layers)
        }
    (args.model / "first_letters.json").write_text(json.dumps(f1_by_layer, indent=1) + "\n")
    write_card(args.model)
    for layer, f1 in f1_by_layer.items():
        print(f"{layer}: {sum(value > 0.6 for value in f1.values())} letters above 0.6: {f1}")


if __name__ == "__main__":
    main()
