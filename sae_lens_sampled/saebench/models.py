"""The language model that SAEs are evaluated on: an official name or a local folder, loaded once."""

import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

from sae_lens_sampled.hooks import one_pass, switched_on
from sae_lens_sampled.saebench.hook_names import is_in_block, nearest_hook, transformer_lens_hook
from sae_lens_sampled.saebench.sources import EvalSAE, fingerprint_tensors

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
NAMES_WITH_A_MEANING = ("llama", "gemma", "bert", "t5", "wav2vec2", "phi", "python", "santacoder", "v0", "solu")
"""TransformerLens takes the architecture from such parts of a model's whole path, `/saes/gemma/my-pythia` for Gemma."""
NOT_OF_THE_MODEL = ("device", "model_name", "tokenizer_name")
"""Fields of TransformerLens' configuration that tell where a model lies, not what it does."""


@dataclass(frozen=True)
class EvalModel:
    """A language model as SAEBench wants it."""

    name: str
    """The official name, or that of the folder."""
    hooked: HookedTransformer
    """The model, without weight processing, as SAEBench loads it."""
    fingerprint: str
    """Hash of weights, configuration and vocabulary: a cache keyed by it is never stale."""


def load_model(model: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> EvalModel:
    """Load the model of an official TransformerLens name, or of a folder in Hugging Face format.

    Raises:
        ValueError: if it is neither, or if the folder has no config or no tokenizer.
    """
    folder = Path(model)
    if folder.is_dir():
        _check_folder(folder)
    name = folder.resolve().name if folder.is_dir() else str(model)
    with (
        _official(folder.resolve()) if folder.is_dir() else nullcontext(name) as path,
        redirect_stdout(io.StringIO()),  # that it is loaded, under a name that nobody gave it
    ):
        hooked = HookedTransformer.from_pretrained_no_processing(path, device=device, dtype=dtype)
    if folder.is_dir():
        hooked.cfg.model_name = name
    vocabulary = sorted(hooked.tokenizer.get_vocab().items())  # type: ignore[union-attr]
    config = {key: str(value) for key, value in hooked.cfg.to_dict().items() if key not in NOT_OF_THE_MODEL}
    return EvalModel(name, hooked, fingerprint_tensors(dict(hooked.state_dict()), config, {"vocabulary": vocabulary}))


def attach(sae: EvalSAE, model: EvalModel) -> None:
    """Write into the SAE's metadata what SAEBench reads there, in the terms of `model`.

    Raises:
        ValueError: if a hook of the SAE is not in the model or cannot be switched on there, is of another width or does
            not have a row for each token, or if a transcoder's outputs come before its inputs.
    """
    metadata = sae.sae.cfg.metadata
    if metadata.hook_name is None:
        raise ValueError(f"SAE {sae.name!r} has no hook_name in its metadata, so nothing tells where it belongs.")
    metadata.hook_name = _hook_in(model, sae, metadata.hook_name)
    widths = {metadata.hook_name: ("d_in", sae.sae.cfg.d_in)}
    if isinstance(sae.sae, Transcoder):
        if metadata.hook_name_out is None:
            raise ValueError(
                f"transcoder {sae.name!r} has no hook_name_out in its metadata: where it writes is unknown."
            )
        metadata.hook_name_out = _hook_in(model, sae, metadata.hook_name_out)
        widths[metadata.hook_name_out] = ("d_out", sae.sae.cfg.d_out)
    _check_pass(model, sae, widths)
    metadata.model_name = model.name
    metadata.hook_layer = int(metadata.hook_name.split(".")[1])
    if metadata.prepend_bos is None:
        metadata.prepend_bos = model.hooked.cfg.default_prepend_bos


def _hook_in(model: EvalModel, sae: EvalSAE, hook_name: str) -> str:
    """The name of one of the SAE's hooks in `model`."""
    known = transformer_lens_hook(hook_name, model.hooked.cfg.original_architecture)
    if known in model.hooked.hook_dict and re.match(r"blocks\.\d+\.", known):
        return known
    of_hook = f"SAE {sae.name!r} is of hook {hook_name!r}"
    if not is_in_block(hook_name):
        raise ValueError(f"{of_hook}; SAEBench takes hooks inside a block, blocks.N....")
    nearest = nearest_hook(hook_name)
    way_out = f"; the nearest is {nearest}: train an SAE on that" if nearest in model.hooked.hook_dict else ""
    raise ValueError(f"{of_hook}, which model {model.name!r} of TransformerLens does not have{way_out}.")


def _check_pass(model: EvalModel, sae: EvalSAE, widths: Mapping[str, tuple[str, int]]) -> None:
    """Refuse what a pass of the model shows to be wrong; `widths` has name and value of a field for each hook."""
    hooked, metadata = model.hooked, sae.sae.cfg.metadata
    n_tokens = hooked.cfg.n_heads + 1  # another number than that of the heads, which come first in attention patterns
    tokens = torch.zeros(1, n_tokens, dtype=torch.int64, device=hooked.cfg.device)
    try:
        with switched_on(hooked, widths):
            activations = one_pass(hooked, tokens, widths)
    except ValueError as error:
        raise ValueError(f"SAE {sae.name!r} cannot be evaluated on model {model.name!r}: {error}") from error
    for hook_name, (field, width) in widths.items():
        if hook_name not in activations:
            raise ValueError(f"SAE {sae.name!r} is of hook {hook_name!r}, which does not run in model {model.name!r}.")
        of_token = _of_one_token(activations[hook_name], n_tokens, metadata.hook_head_index)
        if of_token is None:
            raise ValueError(
                f"SAE {sae.name!r} is of hook {hook_name!r}, where model {model.name!r} has activations of shape "
                f"{tuple(activations[hook_name].shape[1:])} for {n_tokens} tokens, with no row of each token's own"
                + ("." if metadata.hook_head_index is None else f" and hook_head_index={metadata.hook_head_index}.")
            )
        if of_token.numel() != width:
            raise ValueError(
                f"SAE {sae.name!r} has {field}={width}, but {hook_name} of model {model.name!r} is {of_token.numel()} "
                f"wide: it was trained on another one ({metadata.model_name})."
            )
    if next(iter(activations)) != metadata.hook_name:
        raise ValueError(
            f"transcoder {sae.name!r} writes {metadata.hook_name_out}, which comes before {metadata.hook_name} in "
            f"model {model.name!r}; outputs must come after inputs."
        )


def _of_one_token(activations: Tensor, n_tokens: int, head: int | None) -> Tensor | None:
    """What a hook has for the first token, or for its head; None if the activations are not of that form."""
    if activations.shape[1] != n_tokens:
        return None
    of_token = activations[0, 0]
    if head is None:
        return of_token
    return of_token[head] if of_token.ndim > 1 and head < len(of_token) else None


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise ValueError(f"model folder {str(folder)!r} has no config.json; it must be in Hugging Face format.")
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(
            f"model folder {str(folder)!r} has no tokenizer (tokenizer.json or the like); "
            "write it there with tokenizer.save_pretrained(folder)."
        )


def _neutral_folder() -> Path:
    """A new temporary folder in whose path TransformerLens reads no architecture."""
    for place in [tempfile.gettempdir(), "/tmp", "/var/tmp", str(Path.home()), os.getcwd()]:
        for _ in range(10):  # a random name may have a meaning too
            if not os.access(place, os.W_OK):
                break
            folder = Path(tempfile.mkdtemp(prefix="model-", dir=place)).resolve()
            if not any(part in str(folder).lower() for part in NAMES_WITH_A_MEANING):
                return folder
            folder.rmdir()
    raise ValueError(f"TMPDIR={tempfile.gettempdir()!r} has a part that TransformerLens takes for an architecture.")


@contextmanager
def _official(folder: Path) -> Iterator[str]:
    """A path to `folder` that TransformerLens accepts for an official name and in which it reads no architecture."""
    parent = _neutral_folder()
    path = parent / "model"
    path.mkdir()  # not a link itself: TransformerLens would follow it to the real name
    for file in folder.iterdir():
        (path / file.name).symlink_to(file)
    OFFICIAL_MODEL_NAMES.append(str(path))
    try:
        yield str(path)
    finally:
        OFFICIAL_MODEL_NAMES.remove(str(path))
        shutil.rmtree(parent)
