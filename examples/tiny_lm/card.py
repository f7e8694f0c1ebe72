"""The model card, from the numbers that `train.py` and `first_letters.py` have measured."""

import json
import math
from pathlib import Path

CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [gpt_neox, tiny, interpretability]
---

# tiny_lm

A small Pythia-style language model (GPT-NeoX, {parameters:,} parameters: {layers} layers, width {hidden_size}, {heads} heads,
vocabulary {vocab_size:,}, contexts of {context} tokens in training) on English novels first published between 1839 and 1929, all in
the public domain in the United States. It exists so that examples and tests of sparse autoencoders run on a real
language model's residual stream without a network. It writes period prose badly and knows nothing else.

Weights are stored in float16 and load as float32. Trained by `examples/tiny_lm/train.py`; `training.json` has all settings
of its {n_runs} runs.

## Held-out loss

{tokens_seen:,} tokens seen in training ({tokens_of_text:,} of text, the rest lines such as `{{word}} has the first letter: W` and `{{word}} W`).
Measured on {n_held_out} novels that were held out whole, {held_out_tokens:,} tokens:

| model | nats per token | perplexity |
|---|---|---|
| unigram | {unigram:.3f} | {unigram_ppl:.0f} |
| bigram, backing off to the unigram (smoothing chosen on the held-out text) | {bigram:.3f} | {bigram_ppl:.0f} |
| this model | {model:.3f} | {model_ppl:.0f} |

Held out: {held_out_files}.
`text/` holds passages of these as JSON lines (`train` to train SAEs on, `validation` from another novel).
{first_letters}"""

FIRST_LETTERS = """
## First letters

SAEBench's absorption evaluation needs first letters that a linear probe reads from the residual stream. F1 of its probes
on words they were not trained on, by `examples/tiny_lm/first_letters.py`; the evaluation uses the letters above 0.6:

| after block | letters above 0.6 | {letters} |
|---|---|{rule}
{rows}
"""


def write_card(folder: Path) -> None:
    report = json.loads((folder / "training.json").read_text())
    loss = report["held_out_loss"]
    runs = [run["settings"] for run in report["runs"]]
    card = CARD.format(
        **runs[0],
        parameters=report["parameters"],
        held_out_tokens=report["held_out_tokens"],
        tokens_seen=sum(run["steps"] * run["batch_size"] * run["context"] for run in runs),
        tokens_of_text=sum(run["steps"] * (run["batch_size"] - run["spelling_rows"]) * run["context"] for run in runs),
        **loss,
        **{f"{name}_ppl": math.exp(value) for name, value in loss.items()},
        n_runs=len(runs),
        n_held_out=len(report["held_out_files"]),
        held_out_files=", ".join(file.removesuffix(".txt").replace("_", " ") for file in report["held_out_files"]),
        first_letters=_first_letters(folder / "first_letters.json"),
    )
    (folder / "README.md").write_text(card)


def _first_letters(file: Path) -> str:
    if not file.exists():
        return ""
    f1_by_layer = json.loads(file.read_text())
    letters = list(next(iter(f1_by_layer.values())))
    rows = [
        f"| {layer.removeprefix('layer_')} | {sum(value > 0.6 for value in f1.values())} | "
        + " | ".join(f"{value:.2f}" for value in f1.values())
        + " |"
        for layer, f1 in f1_by_layer.items()
    ]
    return FIRST_LETTERS.format(letters=" | ".join(letters), rule="---|" * len(letters), rows="\n".join(rows))
