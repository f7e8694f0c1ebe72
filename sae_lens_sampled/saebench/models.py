"""The language model that SAEs are evaluated on: an official name or a local folder, loaded once."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.transcoder import Transcoder
from transformer_lens import HookedTransformer

from sae_lens_sampled.language_model import load_hooked_transformer, meaningful_kwargs, model_kwargs_of
from sae_lens_sampled.saebench.sources import EvalSAE, fingerprint_tensors

BLOCK_OUTPUT = re.compile(
    r"(?:gpt_neox\.layers|model\.layers|model\.decoder\.layers|transformer\.h|transformer\.blocks)\.(\d+)"
    r"|blocks\.(\d+)\.hook_out"
)
"""Names that Hugging Face and TransformerLens' bridge have for the residual stream after a block."""

OF_MODEL_WIDTH = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out")
"""Ends of the names of hooks that are as wide as the residual stream."""

NOT_OF_THE_MODEL = ("device", "model_name", "tokenizer_name")
"""Fields of TransformerLens' configuration that tell where a model lies, not what it does."""


@dataclass(frozen=True)
class EvalModel:
    """A language model as SAEBench wants it."""

    name: str
    """The official name, or that of the folder."""
    hooked: HookedTransformer
    """The model, without weight processing but for that of `kwargs`, as SAEBench's core loads it."""
    fingerprint: str
    """Hash of weights, configuration and vocabulary: a cache keyed by it is never stale."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of `from_pretrained` that make it another model than its name alone does."""


def load_model(
    model: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    kwargs: Mapping[str, Any] | None = None,
) -> EvalModel:
    """Load the model of an official TransformerLens name, or of a folder in Hugging Face format.

    `kwargs` are other arguments of `from_pretrained_no_processing`, such as those of the run that trained the SAEs.

    Raises:
        ValueError: if it is neither, if the folder has no config or no tokenizer, or the arguments do not fit.
    """
    kwargs = meaningful_kwargs(kwargs or {})
    hooked = load_hooked_transformer(model, device, dtype, kwargs)
    name = Path(model).resolve().name if Path(model).is_dir() else str(model)
    vocabulary = sorted(hooked.tokenizer.get_vocab().items())  # type: ignore[union-attr]
    config = {key: str(value) for key, value in hooked.cfg.to_dict().items() if key not in NOT_OF_THE_MODEL}
    fingerprint = fingerprint_tensors(dict(hooked.state_dict()), config, {"vocabulary": vocabulary})
    return EvalModel(name, hooked, fingerprint, kwargs)


def common_model(saes: Sequence[EvalSAE]) -> str:
    """Name of the model that all of `saes` were trained on.

    Raises:
        ValueError: if they name several, or one of them none.
    """
    names = {sae.name: sae.sae.cfg.metadata.model_name for sae in saes}
    if len(set(names.values())) > 1 or None in names.values():
        raise ValueError(f"the metadata of the SAEs do not name one model, {names}; pass model=...")
    return str(next(iter(names.values())))


def common_model_kwargs(saes: Sequence[EvalSAE]) -> dict[str, Any]:
    """The arguments of `from_pretrained` that all of `saes` were trained with.

    Raises:
        ValueError: if they differ: then the SAEs are of different models.
    """
    first = saes[0]
    wanted = model_kwargs_of(first.sae.cfg.metadata)
    for sae in saes:
        kwargs = model_kwargs_of(sae.sae.cfg.metadata)
        if kwargs != wanted:
            raise ValueError(
                f"{sae.name!r} was trained on a model with model_from_pretrained_kwargs={kwargs}, but {first.name!r} "
                f"on one with {wanted}; evaluate SAEs of one model at a time, or pass model_kwargs=... for all."
            )
    return wanted


def check_one_model(saes: Sequence[EvalSAE]) -> None:
    """Refuse SAEs that were trained on different models, as far as their metadata say.

    Raises:
        ValueError: with two of the models.
    """
    names = {Path(name).name: sae.name for sae in saes if (name := sae.sae.cfg.metadata.model_name) is not None}
    if len(names) > 1:
        (model, sae), (other_model, other_sae), *_ = names.items()
        raise ValueError(
            f"{sae!r} was trained on {model!r}, but {other_sae!r} on {other_model!r}: dictionaries of different models "
            "have nothing in common."
        )
    common_model_kwargs(saes)


def transformer_lens_hook(hook_name: str) -> str:
    """The TransformerLens name of the same place: `gpt_neox.layers.3` is `blocks.3.hook_resid_post`.

    What comes into a block is what its predecessor put out; SAEBench's absorption knows the latter name only.
    """
    if match := BLOCK_OUTPUT.fullmatch(hook_name):
        return f"blocks.{match[1] or match[2]}.hook_resid_post"
    if (match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", hook_name)) and int(match[1]) > 0:
        return f"blocks.{int(match[1]) - 1}.hook_resid_post"
    return hook_name


def attach(sae: EvalSAE, model: EvalModel) -> None:
    """Write into the SAE's metadata what SAEBench reads there, in the terms of `model`.

    Raises:
        ValueError: if a hook of the SAE is not in the model, or the model's residual stream is of another width.
    """
    metadata = sae.sae.cfg.metadata
    if metadata.hook_name is None:
        raise ValueError(f"SAE {sae.name!r} has no hook_name in its metadata, so nothing tells where it belongs.")
    metadata.hook_name = _hook_in(model, sae, metadata.hook_name, "d_in")
    if isinstance(sae.sae, Transcoder):
        if metadata.hook_name_out is None:
            raise ValueError(
                f"transcoder {sae.name!r} has no hook_name_out in its metadata: where it writes is unknown."
            )
        metadata.hook_name_out = _hook_in(model, sae, metadata.hook_name_out, "d_out")
    metadata.model_name, metadata.model_from_pretrained_kwargs = model.name, dict(model.kwargs)
    metadata.hook_layer = int(metadata.hook_name.split(".")[1])
    if metadata.prepend_bos is None:
        metadata.prepend_bos = model.hooked.cfg.default_prepend_bos


def _hook_in(model: EvalModel, sae: EvalSAE, hook_name: str, field: str) -> str:
    """The name of one of the SAE's hooks in `model`; `field` of its config is the width there."""
    width = getattr(sae.sae.cfg, field)
    known = transformer_lens_hook(hook_name)
    if not re.match(r"blocks\.\d+\.", known):
        raise ValueError(f"SAE {sae.name!r} is of hook {known!r}; SAEBench takes hooks inside a block, blocks.N....")
    if known not in model.hooked.hook_dict:
        raise ValueError(f"SAE {sae.name!r} is of hook {hook_name!r}, which model {model.name!r} does not have.")
    if known.endswith(OF_MODEL_WIDTH) and width != model.hooked.cfg.d_model:
        raise ValueError(
            f"SAE {sae.name!r} has {field}={width}, but model {model.name!r} has d_model={model.hooked.cfg.d_model}: "
            f"it was trained on another one ({sae.sae.cfg.metadata.model_name})."
        )
    return known
