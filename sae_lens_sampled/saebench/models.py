"""The language model that SAEs are evaluated on: an official name or a local folder, loaded once."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_official_model_name

from sae_lens_sampled.runners.hooks import one_pass, switched_on
from sae_lens_sampled.runners.language_model import (
    defining_kwargs,
    load_hooked_transformer,
    meaningful_kwargs,
    model_kwargs_of,
)
from sae_lens_sampled.saebench.hook_names import is_in_block, nearest_hook, transformer_lens_hook
from sae_lens_sampled.saebench.sources import EvalSAE, fingerprint_tensors

NOT_OF_THE_MODEL = ("device", "model_name", "tokenizer_name")
"""Fields of TransformerLens' configuration that say where a model is, not what it computes."""


@dataclass(frozen=True)
class EvalModel:
    """A language model in the form that SAEBench needs."""

    name: str
    """Official name, or name of the folder."""
    hooked: HookedTransformer
    """The model, without weight processing other than that in `kwargs`, as SAEBench's core loads it."""
    fingerprint: str
    """Hash of weights, configuration and vocabulary: a cache keyed by it is never stale."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of `from_pretrained` that change which model the name denotes."""
    passes: dict[tuple[str, ...], dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)
    """Cache of `attach`, by requested hooks: activations of a few tokens by hook, in the order in which hooks run."""


def load_model(
    model: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    kwargs: Mapping[str, Any] | None = None,
) -> EvalModel:
    """Load a model by its official TransformerLens name, or from a folder in Hugging Face format.

    `kwargs` are further arguments of `from_pretrained_no_processing`, such as those of the run that trained the SAEs;
    the dtype among them is ignored for `dtype`, and so are those that only place the model.

    Raises:
        ValueError: if `model` is neither, the folder has no config or no tokenizer, or the model cannot be loaded.
    """
    kwargs = meaningful_kwargs(kwargs or {})
    hooked = load_hooked_transformer(model, device, dtype, kwargs)
    name = Path(model).resolve().name if Path(model).is_dir() else str(model)
    vocabulary = sorted(hooked.tokenizer.get_vocab().items())  # type: ignore[union-attr]
    config = {key: str(value) for key, value in hooked.cfg.to_dict().items() if key not in NOT_OF_THE_MODEL}
    fingerprint = fingerprint_tensors(dict(hooked.state_dict()), config, {"vocabulary": vocabulary})
    return EvalModel(name, hooked, fingerprint, defining_kwargs(kwargs))


def common_model(saes: Sequence[EvalSAE]) -> str:
    """Name of the model that all of `saes` were trained on, from their metadata.

    Raises:
        ValueError: if the metadata name several models, or those of one SAE name none.
    """
    names = {sae.name: sae.sae.cfg.metadata.model_name for sae in saes}
    if len(set(names.values())) > 1 or None in names.values():
        raise ValueError(f"the metadata of the SAEs do not name one common model: {names}; pass model=... (--model).")
    return str(next(iter(names.values())))


def common_model_kwargs(saes: Sequence[EvalSAE]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that all of `saes` were trained with.

    Raises:
        ValueError: if these differ between SAEs, which were then trained on different models.
    """
    first = saes[0]
    wanted = model_kwargs_of(first.sae.cfg.metadata)
    for sae in saes:
        kwargs = model_kwargs_of(sae.sae.cfg.metadata)
        if defining_kwargs(kwargs) != defining_kwargs(wanted):
            raise ValueError(
                f"{sae.name!r} was trained on a model with model_from_pretrained_kwargs={kwargs}, but {first.name!r} "
                f"on one with {wanted}; use SAEs of one model at a time or, for `run_evals` (`eval`), pass "
                "model_kwargs=... (--model-kwargs) to evaluate all on the same."
            )
    return wanted


def check_one_model(saes: Sequence[EvalSAE]) -> None:
    """Reject SAEs that were trained on different models, as far as their metadata say.

    Raises:
        ValueError: naming two of the SAEs, if the metadata have different models or arguments of `from_pretrained`.
    """
    names = {_one_name(name): sae.name for sae in saes if (name := sae.sae.cfg.metadata.model_name) is not None}
    if len(names) > 1:
        (model, sae), (other_model, other_sae), *_ = names.items()
        raise ValueError(
            f"{sae!r} was trained on {model!r}, but {other_sae!r} on {other_model!r}: dictionaries of different models "
            "have nothing in common. Compare SAEs of one model; if both names mean the same model, set model_name "
            "alike in the metadata of their cfg.json."
        )
    common_model_kwargs(saes)


def _one_name(model: str) -> str:
    """The last part of a model's name or path, the same for all of TransformerLens' aliases of a model."""
    with suppress(ValueError):
        model = get_official_model_name(model)
    return Path(model).name


def attach(sae: EvalSAE, model: EvalModel) -> None:
    """Fill in the SAE's metadata for SAEBench, with the hook names that `model` uses.

    Raises:
        ValueError: if a hook of the SAE is missing in its metadata, is not in a block of the model, cannot be switched
            on or never runs there, has another width or not a row for each token (or no such head), or if a
            transcoder's outputs come before its inputs.
    """
    metadata = sae.sae.cfg.metadata
    if metadata.hook_name is None:
        raise ValueError(
            f"SAE {sae.name!r} has no hook_name in its metadata; set sae.cfg.metadata.hook_name to the hook that it "
            "was trained on (for a saved SAE, in the metadata of its cfg.json)."
        )
    metadata.hook_name = _hook_in(model, sae, metadata.hook_name)
    widths = {metadata.hook_name: ("d_in", sae.sae.cfg.d_in)}
    if isinstance(sae.sae, Transcoder):
        if metadata.hook_name_out is None:
            raise ValueError(
                f"transcoder {sae.name!r} has no hook_name_out in its metadata; set sae.cfg.metadata.hook_name_out to "
                "the hook that it reconstructs (for a saved one, in the metadata of its cfg.json)."
            )
        metadata.hook_name_out = _hook_in(model, sae, metadata.hook_name_out)
        widths[metadata.hook_name_out] = ("d_out", sae.sae.cfg.d_out)
    _check_pass(model, sae, widths)
    # Core passes the dtype too, and Python rejects duplicate arguments.
    kwargs = {name: value for name, value in model.kwargs.items() if name != "dtype"}
    metadata.model_name, metadata.model_from_pretrained_kwargs = model.name, kwargs
    metadata.hook_layer = int(metadata.hook_name.split(".")[1])
    if metadata.prepend_bos is None:
        metadata.prepend_bos = model.hooked.cfg.default_prepend_bos


def _hook_in(model: EvalModel, sae: EvalSAE, hook_name: str) -> str:
    """Return the name that `model` uses for a hook of the SAE; raise `ValueError` if no block of it has such a hook."""
    known = transformer_lens_hook(hook_name, model.hooked.cfg.original_architecture)
    if known in model.hooked.hook_dict and re.match(r"blocks\.\d+\.", known):
        return known
    of_hook = f"SAE {sae.name!r} uses hook {hook_name!r}"
    if not is_in_block(hook_name):
        raise ValueError(f"{of_hook}; SAEBench supports only hooks inside a block (blocks.N.*): leave this SAE out.")
    nearest = nearest_hook(hook_name)
    way_out = (
        f"; the nearest is {nearest}: train an SAE on that"
        if nearest in model.hooked.hook_dict
        else "; leave this SAE out"
    )
    raise ValueError(f"{of_hook}, which model {model.name!r} of TransformerLens does not have{way_out}.")


def _check_pass(model: EvalModel, sae: EvalSAE, widths: Mapping[str, tuple[str, int]]) -> None:
    """Run the model on a few tokens and reject an SAE whose hooks do not fit.

    `widths` maps each hook to the config field of its width and the value of that field.
    """
    hooked, metadata = model.hooked, sae.sae.cfg.metadata
    n_tokens = hooked.cfg.n_heads + 1  # not the number of heads, the first dimension of attention patterns
    tokens = torch.zeros(1, n_tokens, dtype=torch.int64, device=hooked.cfg.device)
    try:
        if tuple(widths) not in model.passes:
            with switched_on(hooked, widths):
                model.passes[tuple(widths)] = one_pass(hooked, tokens, widths)
    except ValueError as error:
        raise ValueError(f"SAE {sae.name!r} cannot be evaluated on model {model.name!r}: {error}") from error
    activations = model.passes[tuple(widths)]
    for hook_name, (name, width) in widths.items():
        if hook_name not in activations:
            raise ValueError(
                f"SAE {sae.name!r} uses hook {hook_name!r}, which never fires in model {model.name!r}; "
                "leave this SAE out."
            )
        of_token = _of_one_token(activations[hook_name], n_tokens, metadata.hook_head_index)
        if of_token is None:
            raise ValueError(
                f"SAE {sae.name!r} uses hook {hook_name!r}, where model {model.name!r} has activations of shape "
                f"{tuple(activations[hook_name].shape[1:])} for {n_tokens} tokens, without one row per token"
                + (
                    "; leave it out."
                    if metadata.hook_head_index is None
                    else f" or a head {metadata.hook_head_index}; leave it out."
                )
            )
        if of_token.numel() != width:
            raise ValueError(
                f"SAE {sae.name!r} has {name}={width}, but {hook_name} of model {model.name!r} is {of_token.numel()} "
                f"wide: the SAE was trained on another model or hook (model_name={metadata.model_name}); check both."
            )
    if next(iter(activations)) != metadata.hook_name:
        raise ValueError(
            f"transcoder {sae.name!r} reconstructs {metadata.hook_name_out}, which comes before its input hook "
            f"{metadata.hook_name} in model {model.name!r}, but must come after it; leave this transcoder out."
        )


def _of_one_token(activations: Tensor, n_tokens: int, head: int | None) -> Tensor | None:
    """The first token's activations, or those of one head; None if there is no row per token or no such head."""
    if activations.shape[1] != n_tokens:
        return None
    of_token = activations[0, 0]
    if head is None:
        return of_token
    return of_token[head] if of_token.ndim > 1 and head < len(of_token) else None
