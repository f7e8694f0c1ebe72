"""The folders that go to the Hub: an SAE for inference in each, which plain SAELens loads."""

import json
import shutil
from pathlib import Path
from typing import Any

from sae_lens.constants import RUNNER_CFG_FILENAME, SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME
from sae_lens.saes.sae import SAE, TrainingSAE

from sae_lens_sampled.export import to_jumprelu
from sae_lens_sampled.inference import load_checkpoint
from sae_lens_sampled.input_checks import check_weights
from sae_lens_sampled.normalisation import check_folded
from sae_lens_sampled.sae_folder import is_checkpoint, read_config
from sae_lens_sampled.training import SampledTopKTrainingSAE

SAE_FILES = (SAE_CFG_FILENAME, SAE_WEIGHTS_FILENAME, SPARSITY_FILENAME, RUNNER_CFG_FILENAME)


def inference_folder(sae: TrainingSAE[Any] | SAE[Any] | str | Path, target: Path) -> Path:
    """The folder of the inference SAE: `sae` itself if it is one, else `target`, to which it is exported.

    Raises:
        ValueError: if there is no SAE in the folder, or it should not be published as it is.
    """
    name = f"this {type(sae).__name__}"
    if isinstance(sae, (str, Path)):
        source = Path(sae)
        if not is_checkpoint(source):
            return _checked(source, repr(str(source)))
        sae, name = load_checkpoint(source), repr(str(source))
        target.mkdir(parents=True)
        for file in (SPARSITY_FILENAME, RUNNER_CFG_FILENAME):
            if (source / file).exists():
                shutil.copy(source / file, target / file)
    if not isinstance(sae, SAE):
        raise ValueError(f"a {type(sae).__name__} cannot be uploaded; pass an SAELens SAE or a folder.")  # noqa: TRY004
    if isinstance(sae, TrainingSAE):
        if isinstance(sae, SampledTopKTrainingSAE):
            _exported(sae, name).save_model(target)
        else:
            sae.save_inference_model(target)
    else:
        sae.save_model(target)
    # SAELens writes the fields in the order of a set, which would make every run's file another one.
    (target / SAE_CFG_FILENAME).write_text(json.dumps(read_config(target), indent=2, sort_keys=True), encoding="utf-8")
    return _checked(target, name)


def _exported(sae: TrainingSAE[Any], name: str) -> SAE[Any]:
    try:
        return to_jumprelu(sae)
    except ValueError as error:
        raise ValueError(f"{name} cannot be exported: {error}") from error


def _checked(folder: Path, name: str) -> Path:
    """`folder`, if plain SAELens loads an SAE from it that works on activations as they are."""
    cfg = read_config(folder)
    if cfg.get("architecture") == "sampled_topk":
        raise ValueError(
            f"{name} has the weights of training and loads only with sae_lens_sampled; upload the training SAE or its "
            "checkpoint instead, which are exported as JumpReLU."
        )
    check_folded(cfg.get("normalize_activations"), name)
    try:
        sae = SAE.load_from_disk(folder)
    except Exception as error:  # a foreign file can fail in any way
        raise ValueError(f"{name} is not an SAE that SAELens can load ({type(error).__name__}).") from error
    check_weights(sae, name)
    return folder
