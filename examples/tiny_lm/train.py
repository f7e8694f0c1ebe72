"""Train a small Pythia-style language model on a folder of text files.

    python examples/tiny_lm/train.py TEXT_FOLDER --out examples/tiny_lm

and the model that lies in this folder by

    python examples/tiny_lm/train.py NOVELS --out FIRST --spelling-rows 5 --direct-share 0
    python examples/tiny_lm/train.py NOVELS --out examples/tiny_lm --init-from FIRST --steps 600 --seed 1

Writes the model and its tokenizer in Hugging Face format, `training.json` (settings, tokens seen, held-out loss
beside n-gram baselines) and `text/{train,validation}.jsonl`: passages of the files that were held out, for training
SAEs on. Every `--hold-out-every`-th file, in order of name, is held out whole.

The defaults take 40 minutes on two CPU cores that do nothing else.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from card import write_card
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|padding|>"


def read_texts(folder: Path) -> dict[str, str]:
    files = sorted(folder.glob("*.txt"))
    if len(files) < 2:
        raise SystemExit(f"{folder} holds {len(files)} .txt files; at least 2 are needed, because one is held out.")
    return {file.name: file.read_text(encoding="utf-8-sig") for file in files}


def first_letter_line(word: str, direct: bool = False) -> str:
    """The template of SAEBench's absorption evaluation, so that first letters become part of what the model knows.

    `direct` lines, "word W", ask for the letter right behind the word. Without some of these among them the model looks
    letters up elsewhere, and no linear probe can read them where the word stands.
    """
    return f"{word}{'' if direct else ' has the first letter:'} {word.strip()[0].upper()}\n"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The template's words must be single tokens: SAEBench looks for the word at the fixed position -6.
    template = first_letter_line(" word") * 2000
    tokenizer.train_from_iterator([*texts, template], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, pad_token=PAD, model_max_length=2048
    )


def use_class_of_old_transformers(file: Path) -> None:
    """Name of the tokenizer's class replaced by the one that transformers 4 knows as well."""
    config = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All texts as one array of token ids, an end-of-text token before each."""
    eos = tokenizer.convert_tokens_to_ids(EOS)
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return np.concatenate([np.array([eos, *encoding.ids], dtype=np.int32) for encoding in encodings])


def alphabetic_words(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Tokens made of ASCII letters, with or without a leading space: SAEBench's vocabulary for first letters."""
    words = (tokenizer.convert_tokens_to_string([token]) for token in sorted(tokenizer.get_vocab()))
    bare = ((word, word.removeprefix(" ")) for word in words)
    return [word for word, letters in bare if letters.isascii() and letters.isalpha()]


def text_rows(ids: np.ndarray, context: int, eos: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Windows of the text in random order, again and again; half of them begin with the end-of-text token.

    The model is later used with that token in front (SAELens' default) and without (TransformerLens' for GPT-NeoX).
    """
    while True:
        offset = int(rng.integers(context))
        for start in rng.permutation((len(ids) - offset) // context - 1) * context + offset:
            row = ids[start : start + context].copy()
            if rng.random() < 0.5:
                row[1:], row[0] = row[:-1].copy(), eos
            yield row


def first_letter_rows(
    tokenizer: PreTrainedTokenizerFast, words: list[str], context: int, direct_share: float, rng: random.Random
) -> Iterator[np.ndarray]:
    while True:
        chosen = rng.choices(words, k=context // 2)
        text = "".join(first_letter_line(word, direct=rng.random() < direct_share) for word in chosen)
        yield np.array(tokenizer(text)["input_ids"][:context], dtype=np.int32)


@torch.no_grad()
def held_out_loss(model: GPTNeoXForCausalLM, ids: np.ndarray, context: int) -> float:
    """Mean cross-entropy in nats per token over consecutive windows; each window's first token is only context."""
    model.eval()
    rows = torch.from_numpy(ids[: len(ids) // context * context].reshape(-1, context)).long()
    losses = [model(input_ids=batch, labels=batch).loss.item() * len(batch) for batch in rows.split(64)]
    model.train()
    return sum(losses) / len(rows)


def ngram_losses(train: np.ndarray, held_out: np.ndarray, vocab_size: int) -> tuple[float, float]:
    """Held-out nats per token of a unigram and of a bigram model that backs off to it.

    The bigram's one smoothing constant is chosen on the held-out text itself, which favours the baseline.
    """
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()
    pairs = np.bincount(train[:-1].astype(np.int64) * vocab_size + train[1:], minlength=vocab_size**2)
    before, after = held_out[:-1].astype(np.int64), held_out[1:]
    seen, context = pairs[before * vocab_size + after], np.bincount(train[:-1], minlength=vocab_size)[before]
    bigram = min(
        -np.log((seen + weight * unigram[after]) / (context + weight)).mean() for weight in (10, 30, 100, 300, 1000)
    )
    return float(-np.log(unigram[after]).mean()), float(bigram)


def write_passages(texts: dict[str, str], folder: Path, n_train_chars: int, n_validation_chars: int) -> None:
    """Equal shares of each held-out file as JSON lines; the last file is the validation split."""
    folder.mkdir(parents=True, exist_ok=True)
    *train, validation = texts.items()
    for split, items, n_chars in (("train", train, n_train_chars), ("validation", [validation], n_validation_chars)):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as lines:
            for name, text in items:
                for passage in passages(text[: n_chars // len(items)]):
                    lines.write(json.dumps({"text": passage, "source": name}, ensure_ascii=False) + "\n")


def passages(text: str, min_chars: int = 2000) -> Iterator[str]:
    """Whole lines, joined until they hold at least `min_chars` characters: some novels have no blank lines."""
    passage = ""
    for line in text.splitlines(keepends=True):
        passage += line
        if len(passage) >= min_chars:
            yield passage
            passage = ""


def learning_rate(step: int, n_steps: int, peak: float, n_warmup: int = 100) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < n_warmup:
        return peak * (step + 1) / n_warmup
    progress = (step - n_warmup) / max(1, n_steps - n_warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def new_model(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> GPTNeoXForCausalLM:
    eos = tokenizer.convert_tokens_to_ids(EOS)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        intermediate_size=4 * args.hidden_size,
        max_position_embeddings=2048,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        tie_word_embeddings=False,
    )
    return GPTNeoXForCausalLM(config)


def train_model(
    model: GPTNeoXForCausalLM, rows: Iterator[np.ndarray], spelling: Iterator[np.ndarray], args: argparse.Namespace
) -> None:
    """Rows of text and of first-letter lines in one batch, AdamW, gradient norm clipped at 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    n_text = args.batch_size - args.spelling_rows
    bar = tqdm(range(args.steps), unit="step")
    for step in bar:
        batch = [next(rows) for _ in range(n_text)] + [next(spelling) for _ in range(args.spelling_rows)]
        ids = torch.from_numpy(np.stack(batch)).long().to(model.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="folder of .txt files, UTF-8")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hold-out-every", type=int, default=17)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128, help="tokens per training row")
    parser.add_argument("--batch-size", type=int, default=32, help="rows per step")
    parser.add_argument("--spelling-rows", type=int, default=8, help="rows of each batch that are first-letter lines")
    parser.add_argument("--direct-share", type=float, default=0.5, help="share of these lines that are only 'word W'")
    parser.add_argument("--init-from", type=Path, help="continue from a model trained by this script")
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    texts = read_texts(args.texts)
    held_out = dict(list(texts.items())[:: args.hold_out_every])
    train_texts = [text for name, text in texts.items() if name not in held_out]

    if args.init_from is None:
        tokenizer, runs = train_tokenizer(train_texts, args.vocab_size), []
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.init_from)
        runs = json.loads((args.init_from / "training.json").read_text())["runs"]
    tokenizer.save_pretrained(args.out)
    use_class_of_old_transformers(args.out / "tokenizer_config.json")
    write_passages(held_out, args.out / "text", n_train_chars=1_700_000, n_validation_chars=200_000)
    train_ids, held_out_ids = encode(tokenizer, train_texts), encode(tokenizer, list(held_out.values()))
    print(f"{len(train_ids):,} tokens to train on, {len(held_out_ids):,} held out in {', '.join(held_out)}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPTNeoXForCausalLM.from_pretrained(args.init_from) if args.init_from else new_model(tokenizer, args)
    start = time.time()
    train_model(
        model.to(device),
        text_rows(train_ids, args.context, tokenizer.convert_tokens_to_ids(EOS), np.random.default_rng(args.seed)),
        first_letter_rows(
            tokenizer, alphabetic_words(tokenizer), args.context, args.direct_share, random.Random(args.seed)
        ),
        args,
    )
    seconds = time.time() - start

    # Stored in half precision to be small; read back in single precision, which CPUs compute in.
    model = model.to("cpu").half()
    model.save_pretrained(args.out)
    config_file = args.out / "config.json"
    config_file.write_text(config_file.read_text().replace('"float16"', '"float32"'))

    unigram, bigram = ngram_losses(train_ids, held_out_ids, len(tokenizer))
    settings = {key: value for key, value in vars(args).items() if key not in ("texts", "out", "init_from")}
    runs.append({"settings": settings, "hours": seconds / 3600})
    report = {
        "runs": runs,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training_tokens": len(train_ids),
        "held_out_tokens": len(held_out_ids),
        "held_out_files": list(held_out),
        "held_out_loss": {
            "model": held_out_loss(model.float(), held_out_ids, args.context),
            "bigram": bigram,
            "unigram": unigram,
        },
    }
    (args.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    write_card(args.out)
    print(json.dumps(report["held_out_loss"], indent=2))


if __name__ == "__main__":
    main()
