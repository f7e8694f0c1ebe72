"""The bundled language model is as its card describes it."""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_model_is_small_and_predicts_held_out_text_better_than_ngrams(tiny_lm):
    files = [tiny_lm / "model.safetensors", tiny_lm / "tokenizer.json"]
    assert sum(file.stat().st_size for file in files) < 6e6
    report = json.loads((tiny_lm / "training.json").read_text())
    loss = report["held_out_loss"]
    assert loss["model"] < loss["bigram"] - 0.4 < loss["unigram"] - 2

    tokenizer, model = (kind.from_pretrained(tiny_lm) for kind in (AutoTokenizer, AutoModelForCausalLM))
    assert model.dtype == torch.float32
    lines = (tiny_lm / "text" / "validation.jsonl").read_text().splitlines()
    text = "".join(json.loads(line)["text"] for line in lines[:30])
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = ids[: len(ids) // 128 * 128].view(-1, 128)
    with torch.no_grad():
        measured = model(input_ids=rows, labels=rows).loss.item()
    assert measured < loss["bigram"] - 0.4


def test_enough_first_letters_are_readable_for_absorption(tiny_lm):
    letters_by_layer = json.loads((tiny_lm / "first_letters.json").read_text())
    readable = {layer: sum(f1 > 0.6 for f1 in letters.values()) for layer, letters in letters_by_layer.items()}
    assert readable["layer_2"] >= 10, readable


def test_model_answers_the_first_letter_prompt(tiny_lm):
    tokenizer, model = (kind.from_pretrained(tiny_lm) for kind in (AutoTokenizer, AutoModelForCausalLM))
    words = [" house", " table", " mother", " garden", " river", " people"]
    prompt = "".join(f"{word} has the first letter: {word[1].upper()}\n" for word in words[:-1])
    ids = tokenizer(f"{prompt}{words[-1]} has the first letter:", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " P"


def test_transformers_4_knows_the_class_of_the_tokenizer(tiny_lm):
    config = json.loads((tiny_lm / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # version 4 rejects the class that version 5 writes


def test_bundled_text_was_held_out_from_training(tiny_lm):
    report = json.loads((tiny_lm / "training.json").read_text())
    for split in ("train", "validation"):
        lines = (tiny_lm / "text" / f"{split}.jsonl").read_text().splitlines()
        assert {json.loads(line)["source"] for line in lines} <= set(report["held_out_files"])
