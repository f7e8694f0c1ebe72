"""The language model that an SAE was trained on: identifying it from the SAE's metadata, and loading it again.

A name alone is not enough: the run's `model_from_pretrained_kwargs` may choose a revision or subfolder, fold the layer
norms, centre weights or set the dtype.
"""

import inspect
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from sae_lens.load_model import load_model
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import str_to_dtype
from transformer_lens import HookedTransformer
from transformer_lens.loading_from_pretrained import get_official_model_name
from transformer_lens.supported_models import OFFICIAL_MODEL_NAMES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
NAMES_WITH_A_MEANING = ("llama", "gemma", "bert", "t5", "wav2vec2", "phi", "python", "santacoder", "v0", "solu")
"""Parts of a path from which TransformerLens infers an architecture: it takes `/saes/gemma/my-pythia` for a Gemma."""

PLACEMENT = (
    "device",
    "device_map",
    "low_cpu_mem_usage",
    "max_memory",
    "move_to_device",
    "n_devices",
    "offload_folder",
)
"""Arguments for where the model is placed, which changes no results."""
SOURCES = ("cache_dir", "force_download", "local_files_only", "token")
"""Arguments for where the model's files come from, which changes no results either but is needed to load the model."""
DTYPE = ("dtype", "torch_dtype")
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(HookedTransformer.from_pretrained_no_processing).parameters.items()
    if parameter.default is not inspect.Parameter.empty and name not in DTYPE
}
"""Defaults of `from_pretrained_no_processing`; passing one changes nothing, and SAELens' runners record one unasked."""


def model_kwargs_of(metadata: SAEMetadata) -> dict[str, Any]:
    """The `from_pretrained` arguments of the training run that affect which model is loaded, or from where."""
    return meaningful_kwargs(metadata.model_from_pretrained_kwargs or {})


def meaningful_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` without None, without defaults other than dtype's, and without those that only place the model."""
    return {
        name: value
        for name, value in sorted(kwargs.items())
        if name not in PLACEMENT and value is not None and (name not in DEFAULTS or value != DEFAULTS[name])
    }


def defining_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`meaningful_kwargs` without the sources of files: the same name with equal ones loads the same model."""
    return {name: value for name, value in meaningful_kwargs(kwargs).items() if name not in SOURCES}


def dtype_of(kwargs: Mapping[str, Any]) -> str | None:
    """The model's dtype in `kwargs`, as SAEBench writes it; None if there is none.

    Raises:
        ValueError: if it is not the name of a dtype.
    """
    named = [kwargs[name] for name in DTYPE if name in kwargs]
    if not named:
        return None
    try:
        return str(str_to_dtype(str(named[0]).removeprefix("torch."))).removeprefix("torch.")
    except ValueError as error:
        raise ValueError(
            f"model_from_pretrained_kwargs has dtype={named[0]!r}, which is not a dtype; pass that of the "
            "training run, such as dtype='bfloat16'."
        ) from error


def load_hooked_transformer(
    model: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    kwargs: Mapping[str, Any] | None = None,
) -> HookedTransformer:
    """Load a HookedTransformer as SAELens and SAEBench do, with no weight processing except that in `kwargs`.

    Args:
        model: an official TransformerLens name, or a folder in Hugging Face format.
        device: where to put it.
        dtype: its dtype, whatever `kwargs` say.
        kwargs: other arguments of `from_pretrained_no_processing`: a revision, a subfolder, `fold_ln` and the like.

    Raises:
        ValueError: if there is no such model, it cannot be loaded with these arguments, or a folder is to be loaded and
            no temporary folder is suitable.
    """
    kwargs = {name: value for name, value in meaningful_kwargs(kwargs or {}).items() if name not in DTYPE}
    folder = Path(model)
    if folder.is_dir():
        _check_folder(folder, kwargs)
    with (
        _official(folder.resolve()) if folder.is_dir() else nullcontext(str(model)) as path,
        redirect_stdout(io.StringIO()),  # TransformerLens would print that it loaded a made-up name
        _reasons(model, kwargs),
    ):
        hooked = HookedTransformer.from_pretrained_no_processing(path, device=device, dtype=dtype, **kwargs)
    if folder.is_dir():
        hooked.cfg.model_name = folder.resolve().name
    return hooked


def load_model_of_run(
    metadata: SAEMetadata,
    hooks: list[str],
    device: str = "cpu",
    model: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Load the model that an SAE was trained on, as SAELens' stores expect it.

    Args:
        metadata: metadata of the SAE.
        hooks: names of the hooks to read.
        device: where to put the model.
        model: Hub name or folder of the same model elsewhere; None for the name in the metadata.
        kwargs: arguments of `from_pretrained`; None for those of the run.

    Raises:
        ValueError: if no model is named, or it cannot be loaded with these arguments.
    """
    name = model or metadata.model_name
    if name is None:
        raise ValueError("the metadata of this SAE has no model_name; pass the model (model=..., --model).")
    kwargs = model_kwargs_of(metadata) if kwargs is None else meaningful_kwargs(kwargs)
    class_name = metadata.model_class_name or "HookedTransformer"
    if class_name != "HookedTransformer":
        with _reasons(name, kwargs):
            return load_model(class_name, name, device, kwargs, hooks)
    if Path(name).is_dir() and not kwargs:
        return _bridge(name, device, {})  # SAELens loads no folders, so the run used a bridge or a copy of this model
    if Path(name).is_dir() or _is_official(name):
        hooked = load_hooked_transformer(name, device, str_to_dtype(dtype_of(kwargs) or "float32"), kwargs)
        if all(hook in hooked.hook_dict for hook in hooks):
            return hooked
    return _bridge(name, device, kwargs)


def _bridge(name: str, device: str, kwargs: Mapping[str, Any]) -> Any:
    """TransformerLens' bridge, which supports more models and more hook names."""
    # Imported here: transformer-lens 2, which SAELens also supports, has no bridge, and most commands need none.
    from transformer_lens.model_bridge import TransformerBridge

    others = {key: value for key, value in kwargs.items() if key not in DTYPE}
    dtype = str_to_dtype(dtype_of(kwargs) or "float32")
    with _reasons(name, kwargs):
        return TransformerBridge.boot_transformers(name, device=device, dtype=dtype, **others)


def _is_official(name: str) -> bool:
    try:
        return bool(get_official_model_name(name))
    except ValueError:
        return False


@contextmanager
def _reasons(model: str | Path, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Turns every loading error into one that names the model and the arguments."""
    try:
        yield
    except Exception as error:  # errors of Hub, files, transformers and TransformerLens share no base
        shown = {name: value for name, value in kwargs.items() if name != "token"}
        arguments = f" with model_from_pretrained_kwargs={shown}" if shown else ""
        way_out = (
            "; if these model_from_pretrained_kwargs are for another model, pass other model_kwargs "
            "(--model-kwargs '{...}')" * bool(shown)
        )
        text = str(error)[:1000].rstrip(".")  # TransformerLens lists every model it knows
        reason = text if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {text}"
        raise ValueError(f"model={str(model)!r} cannot be loaded{arguments}: {reason}{way_out}.") from error


def _check_folder(folder: Path, kwargs: Mapping[str, Any]) -> None:
    inner = folder / str(kwargs.get("subfolder", ""))
    if not (inner / "config.json").exists():
        raise ValueError(
            f"model folder {str(folder)!r} has no {inner.relative_to(folder) / 'config.json'}; it must be in Hugging "
            "Face format"
            + (", with the subfolder that model_from_pretrained_kwargs names." if inner != folder else ".")
        )
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(
            f"model folder {str(folder)!r} has no tokenizer (tokenizer.json or the like); "
            "save one there with tokenizer.save_pretrained(folder)."
        )


def _neutral_folder() -> Path:
    """A new temporary folder from whose path TransformerLens infers no architecture."""
    for place in [tempfile.gettempdir(), "/tmp", "/var/tmp", str(Path.home()), os.getcwd()]:
        for _ in range(10):  # a random name may match too
            if not os.access(place, os.W_OK):
                break
            folder = Path(tempfile.mkdtemp(prefix="model-", dir=place)).resolve()
            if not any(part in str(folder).lower() for part in NAMES_WITH_A_MEANING):
                return folder
            folder.rmdir()
    raise ValueError(
        f"TMPDIR={tempfile.gettempdir()!r} is not writable, or its path contains a name, such as gemma, from which "
        "TransformerLens infers an architecture; set TMPDIR to another folder."
    )


@contextmanager
def _official(folder: Path) -> Iterator[str]:
    """A path to `folder` that TransformerLens accepts as an official name and from which it infers no architecture."""
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
