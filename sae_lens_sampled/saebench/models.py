"""The language model that SAEs are evaluated on: an official name or a local folder, loaded once."""

import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from sae_lens.saes.transcoder import Transcoder
from transformer_lens import HookedTransformer
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

from sae_lens_sampled.saebench.sources import EvalSAE, fingerprint_tensors

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
NAMES_WITH_A_MEANING = ("llama", "gemma", "bert", "t5", "wav2vec2", "phi", "python", "santacoder", "v0", "solu")
"""TransformerLens takes the architecture from such parts of a model's whole path, `/saes/gemma/my-pythia` for Gemma."""
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
    metadata.model_name = model.name
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
