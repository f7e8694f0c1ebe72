"""The tokens that an SAE was trained on, and their activations, read again with the settings of its run.

SAELens' `ActivationsStore.from_sae` takes some of these settings from the metadata and leaves the others at their
defaults: it may then include the first tokens of prompts, whose activations often have many times the norm of others,
although training left them out.
"""

import math
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens import ActivationsStore
from sae_lens.saes.sae import SAE, SAEMetadata
from sae_lens.util import get_special_token_ids

from sae_lens_sampled.folders import read_runner_config

BUFFERED_BATCHES = 4
"""Minimum number of batches in a buffer; half of the buffer is served before it is refilled and mixed again."""
MIN_BUFFERED_PROMPTS = 64
SAMPLED_PROMPTS = 256
"""Number of prompts from which the share of first tokens is computed."""


@dataclass(frozen=True)
class TokenSettings:
    """Which tokens of a text are read, and how the model runs on them; fields as in the configs of SAELens' runners."""

    context_size: int
    prepend_bos: bool
    seqpos_slice: tuple[int | None, ...] = (None,)
    exclude_special_tokens: bool | list[int] = False
    disable_concat_sequences: bool = False
    sequence_separator_token: int | Literal["bos", "eos", "sep"] | None = "bos"
    use_chat_formatting: bool = False
    autocast_lm: bool = False
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    """Fields that are not given anywhere and have SAELens' defaults."""

    def described(self) -> str:
        """The required settings, those that differ from SAELens' defaults, and those that are assumed, as text."""
        known = [f for f in fields(self) if f.name not in (*self.unknown, "unknown")]
        required = ("context_size", "prepend_bos")
        told = [f"{f.name}={getattr(self, f.name)!r}" for f in known if f.name in required or not _is_default(self, f)]
        assumed = [f"{name}={getattr(self, name)!r}" for name in self.unknown]
        return ", ".join(told) + (f"; unknown, so assumed: {', '.join(assumed)}" if assumed else "")


RUN_FIELDS = tuple(f.name for f in fields(TokenSettings) if f.name != "unknown")


def token_settings(metadata: SAEMetadata, folder: Path | None = None) -> TokenSettings:
    """The settings with which an SAE was trained, from its metadata or the `runner_cfg.json` in its folder.

    Args:
        metadata: metadata of the SAE, which takes precedence.
        folder: a checkpoint or an export, with or without the `runner_cfg.json` of SAELens' runners.

    Raises:
        ValueError: if `context_size` or `prepend_bos` is in neither.
    """
    run = read_runner_config(folder) if folder else {}
    # SAELens writes None for unknown values; of these fields only one may itself be None.
    known: dict[str, Any] = {
        name: of[name]
        for of in (run, metadata)
        for name in RUN_FIELDS
        if name in of and (of[name] is not None or name == "sequence_separator_token")
    }
    for name in ("context_size", "prepend_bos"):
        if name not in known:
            raise ValueError(
                f"the metadata of this SAE has no {name}, so the tokens that it was trained on are unknown; set "
                f"sae.cfg.metadata.{name} to the value of the training run (for a saved SAE, in the metadata of its "
                "cfg.json)."
            )
    if "seqpos_slice" in known:
        known["seqpos_slice"] = tuple(known["seqpos_slice"])
    missing = tuple(name for name in RUN_FIELDS if name not in known)
    return TokenSettings(**known, unknown=missing)


def remember_settings(metadata: SAEMetadata, cfg: Any) -> None:
    """Write all token settings of a run to its SAE's metadata; SAELens itself writes only some of them."""
    for name in RUN_FIELDS:
        metadata[name] = getattr(cfg, name)


def store_of_run(
    model: Any, sae: SAE[Any], settings: TokenSettings, dataset: Any, batch_size: int, device: str
) -> ActivationsStore:
    """A store of the activations at the SAE's hook, for the tokens of `dataset` that training would have read.

    Args:
        model: the language model, as SAELens' stores expect it.
        sae: the SAE, whose metadata names the hook.
        settings: settings of its run.
        dataset: Hub name, folder, or dataset.
        batch_size: tokens per batch; the buffer size follows from it.
        device: device of the activations.

    Raises:
        StopIteration: if the data set has no rows, as SAELens' store does.
    """
    excluded = settings.exclude_special_tokens
    excluded = get_special_token_ids(model.tokenizer) if excluded is True else excluded
    return ActivationsStore(
        model=model,
        dataset=dataset,
        streaming=True,
        hook_name=sae.cfg.metadata.hook_name,
        hook_head_index=sae.cfg.metadata.hook_head_index,
        context_size=settings.context_size,
        d_in=sae.cfg.d_in,
        n_batches_in_buffer=buffer_prompts(batch_size, settings),
        total_training_tokens=10**9,
        store_batch_size_prompts=32,
        train_batch_size_tokens=batch_size,
        prepend_bos=settings.prepend_bos,
        normalize_activations=sae.cfg.normalize_activations,
        device=torch.device(device),
        dtype=sae.cfg.dtype,
        model_kwargs=settings.model_kwargs,
        autocast_lm=settings.autocast_lm,
        seqpos_slice=settings.seqpos_slice,
        exclude_special_tokens=torch.tensor(excluded, device=device) if excluded else None,
        disable_concat_sequences=settings.disable_concat_sequences,
        sequence_separator_token=settings.sequence_separator_token,
        use_chat_formatting=settings.use_chat_formatting,
    )


def buffer_prompts(batch_size: int, settings: TokenSettings) -> int:
    """Number of prompts that SAELens' buffer (`n_batches_in_buffer`) needs to mix batches of `batch_size` tokens."""
    n_positions = len(range(settings.context_size)[slice(*settings.seqpos_slice)])
    return max(MIN_BUFFERED_PROMPTS, math.ceil(BUFFERED_BATCHES * batch_size / n_positions))


def first_token_share(store: ActivationsStore) -> float:
    """Share of the tokens served by `store` that are the first of their prompt, estimated from its first 256 prompts.

    In large models, first tokens have activations with many times the norm of others.

    Raises:
        StopIteration: if the text yields no prompt, as the store itself would.
    """
    prompts = list(islice(store._iterate_tokenized_sequences(), SAMPLED_PROMPTS))
    store.n_dataset_processed = 0  # nothing has been served yet
    if not prompts:
        raise StopIteration
    served = torch.stack(prompts)[:, slice(*store.seqpos_slice)]
    kept = torch.ones_like(served, dtype=torch.bool)
    if store.exclude_special_tokens is not None:
        kept = ~torch.isin(served, store.exclude_special_tokens.to(served.device))
    first = range(store.context_size)[slice(*store.seqpos_slice)][0] == 0
    return (kept[:, 0].sum() / kept.sum()).item() if first else 0.0


def expected_first_token_share(settings: TokenSettings, bos_token_id: int | None) -> float | None:
    """Share of first tokens among the training tokens, by the run's settings; None if these are unknown."""
    if not {"exclude_special_tokens", "seqpos_slice"}.isdisjoint(settings.unknown):
        return None
    positions = range(settings.context_size)[slice(*settings.seqpos_slice)]
    excluded = settings.exclude_special_tokens
    without_bos = excluded is True or (isinstance(excluded, list) and bos_token_id in excluded)
    if positions[0] != 0 or (settings.prepend_bos and bos_token_id is not None and without_bos):
        return 0.0
    return 1 / len(positions)


def _is_default(settings: TokenSettings, of: Any) -> bool:
    return getattr(settings, of.name) == (of.default if of.default_factory is not dict else {})
