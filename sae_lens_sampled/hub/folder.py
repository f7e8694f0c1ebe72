"""Folders to upload to the Hub, each with an SAE for inference that plain SAELens loads."""

import json
import shutil
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import SAE, TrainingSAE

from sae_lens_sampled.files import link_or_copy
from sae_lens_sampled.folders import check_folded, is_checkpoint, read_config
from sae_lens_sampled.sae.checks import check_weights
from sae_lens_sampled.sae.export import to_jumprelu
from sae_lens_sampled.sae.inference import load_checkpoint
from sae_lens_sampled.sae.training import SampledTopKTrainingSAE

SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME)


def inference_folder(sae: TrainingSAE[Any] | SAE[Any] | str | Path, target: Path) -> Path:
    """Write an SAE's files for inference to `target` and return `target`; paths in configs lose their folders.

    Raises:
        ValueError: if `sae` is neither an SAE nor a folder that holds one, or should not be published as it is.
    """
    name = f"this {type(sae).__name__}"
    if isinstance(sae, (str, Path)):
        source = Path(sae)
        target.mkdir(parents=True)
        if not is_checkpoint(source):
            _checked(source, repr(str(source)))
            for file in SAE_FILES:
                if (source / file).exists():
                    link_or_copy(source / file, target / file)
            return _without_local_paths(target)
        sae, name = load_checkpoint(source), repr(str(source))
        for file in (SPARSITY_FILENAME, RUNNER_CFG_FILENAME):
            if (source / file).exists():
                shutil.copy(source / file, target / file)
    if not isinstance(sae, SAE):
        raise ValueError(f"a {type(sae).__name__} cannot be uploaded; pass an SAELens SAE or its folder.")  # noqa: TRY004
    if isinstance(sae, SampledTopKTrainingSAE):
        _exported(sae, name).save_model(target)
    elif isinstance(sae, TrainingSAE):
        sae.save_inference_model(target)
    else:
        sae.save_model(target)
    # SAELens writes the fields in set order, so the file would differ from run to run.
    (target / SAE_CFG_FILENAME).write_text(json.dumps(read_config(target), indent=2, sort_keys=True), encoding="utf-8")
    return _without_local_paths(_checked(target, name))


def without_folders(value: Any) -> Any:
    """`value`, of JSON types, with paths shortened to their last part: the rest describes the author's disk.

    A path is absolute or begins with "." or "~"; others could be names on the Hub.
    """
    if isinstance(value, dict):
        return {name: without_folders(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    is_path = isinstance(value, str) and (Path(value).is_absolute() or value.startswith((".", "~")))
    return Path(value).name if is_path else value


def _without_local_paths(folder: Path) -> Path:
    """Rewrite the configurations in `folder` that contain local paths; return `folder`."""
    for name in (SAE_CFG_FILENAME, RUNNER_CFG_FILENAME):
        try:
            cfg = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if (publishable := without_folders(cfg)) != cfg:
            (folder / name).unlink()  # it may be a link to the user's own file
            (folder / name).write_text(json.dumps(publishable, indent=2, sort_keys=True), encoding="utf-8")
    return folder


def _exported(sae: TrainingSAE[Any], name: str) -> SAE[Any]:
    try:
        return to_jumprelu(sae)
    except ValueError as error:
        raise ValueError(f"{name} cannot be exported: {error}") from error


def _checked(folder: Path, name: str) -> Path:
    """Check that plain SAELens loads an SAE from `folder` that takes raw activations; return `folder`."""
    cfg = read_config(folder)
    if cfg.get("architecture") == "sampled_topk":
        raise ValueError(
            f"{name} has training weights and loads only with sae_lens_sampled; pass the training SAE or its "
            "checkpoint instead, which is then exported as a JumpReLU SAE."
        )
    check_folded(cfg.get("normalize_activations"), name)
    try:
        sae = SAE.load_from_disk(folder)
    except Exception as error:  # a foreign file can fail in any way
        raise ValueError(f"{name} is not an SAE that SAELens can load: {type(error).__name__}: {error}.") from error
    check_weights(sae, name)
    return folder
