"""Activations of the language model on running text, with the tokens they belong to."""

import shutil
from pathlib import Path

import torch
from sae_lens import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor

from sae_lens_sampled.files import atomic_path
from sae_lens_sampled.runners.stores import reporting_short_text
from study.plan import Unit, arms
from study.storage import Storage
from study.training import language_model, new_sae

CHUNK = 4096
"""Tokens encoded at a time."""
PROMPTS = 32
"""Held-out prompts that the language model reads at a time."""


def held_out(storage: Storage) -> str:
    """The text that core runs on: a Hub name or a folder.

    Core reads the split `train`, so a single file is copied into a folder, as this split.
    """
    text = storage.study.held_out
    if not Path(text).is_file():
        return text
    folder = storage.cache / "held_out_text"
    if not folder.exists():
        with atomic_path(folder) as unfinished:
            unfinished.mkdir(parents=True)
            shutil.copy(text, unfinished / "train.jsonl")
    return str(folder)


@torch.no_grad()
def text_activations(storage: Storage) -> tuple[Tensor, Tensor]:
    """Held-out tokens, shape (n_tokens,), and their activations, shape (n_tokens, d_in), without special tokens.

    These are `held_out_tokens`, or fewer if the text ends before.

    Raises:
        ValueError: if the text has no rows or is too short for a single batch of prompts.
    """
    study = storage.study
    n_tokens = study.held_out_tokens
    model = language_model(study)
    sae = new_sae(study, Unit(arms(study)[0], study.first_seed))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.prepend_bos = study.hook, True
    text = held_out(storage)
    with reporting_short_text(f"held-out text {text!r}"):
        store = ActivationsStore.from_sae(
            model,
            sae,
            dataset=text,
            context_size=study.context_size,
            store_batch_size_prompts=PROMPTS,
            device=study.device,
        )
    special = torch.tensor(get_special_token_ids(model.tokenizer), device=study.device)
    tokens, activations, n_read = [], [], 0
    while n_read < n_tokens:
        try:
            batch = store.get_batch_tokens(raise_at_epoch_end=True)
        except StopIteration:
            break  # the text is shorter: read again, it would be in both halves
        x = store.get_activations(batch).reshape(-1, study.d_in).float()
        kept = ~torch.isin(batch.flatten(), special)
        tokens.append(batch.flatten()[kept])
        activations.append(x[kept])
        n_read += len(tokens[-1])
    if not tokens:
        raise ValueError(
            f"held-out text {text!r} has fewer than {PROMPTS} prompts of context_size={study.context_size} tokens, "
            "which are read at once; use more text."
        )
    return torch.cat(tokens)[:n_tokens], torch.cat(activations)[:n_tokens]
