"""Loading of SAEs to evaluate (objects, exported folders, training checkpoints, SAEs on the Hub) into one form."""

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.saes.temporal_sae import TemporalSAE
from torch import Tensor

from sae_lens_sampled.devices import check_device
from sae_lens_sampled.folders import check_folded, is_checkpoint
from sae_lens_sampled.sae.checks import check_weights
from sae_lens_sampled.sae.export import to_jumprelu
from sae_lens_sampled.sae.inference import load_checkpoint
from sae_lens_sampled.sae.training import SampledTopKTrainingSAE
from sae_lens_sampled.signals import interruptible

CUSTOM_SAE_ID = "custom_sae"
"""SAEBench's id for an SAE that is not from the Hub."""


@dataclass(frozen=True)
class EvalSAE:
    """One SAE to evaluate. It holds copies, so an evaluation does not change the caller's objects."""

    release: str
    """Name of the SAE, or the Hub repository or SAELens release that it is from."""
    sae_id: str
    """Id of the SAE in that release; "custom_sae" if there is none, as in SAEBench."""
    sae: SAE[Any]
    """The SAE for inference. Its decoder rows have unit norm, unless SAELens cannot rescale them."""
    training_sae: TrainingSAE[Any] | None
    """The training SAE that `sae` was exported from, if that was given."""
    sae_class: str
    """The architecture that the SAE was trained as, or that of `sae` if unknown; shown in plots."""
    fingerprint: str
    """Hash of weights and configurations, including those of the training SAE."""

    @property
    def name(self) -> str:
        """Name of the SAE in its result files."""
        return _full_name(self.release, self.sae_id)


SAESource: TypeAlias = "SAE[Any] | str | Path | tuple[str, SAE[Any] | Path | str] | EvalSAE"


class BrokenSAEError(ValueError):
    """An SAE has unusable weights or thresholds, or is of an unsuitable kind; other SAEs can still be evaluated."""

    def __init__(self, name: str, reason: ValueError) -> None:
        super().__init__(f"SAE {name!r}: {reason}")
        self.name, self.reason = name, reason


def load_saes(sources: Sequence[SAESource], device: str = "cpu") -> list[EvalSAE]:
    """Load the SAEs of all `sources` onto `device`.

    A source is an SAE or a training SAE; a folder of either, which gives the SAE its name; `(name, SAE)` as in
    SAEBench, or `(name, Path)`; or two strings `(release, sae_id)`: a Hub repository or SAELens release, and the SAE's
    id in it.

    Raises:
        ValueError: if `sources` is empty, two SAEs have the same name, an SAE cannot be loaded, has unusable weights or
            thresholds or unfolded activation normalisation, is Temporal, or `device` is not available.
        ConnectionError: if an SAE must be downloaded and the Hub is not accessible.
        OSError: if the Hub has no such repository or SAE.
    """
    saes, broken = load_intact_saes(sources, device)
    if broken:
        raise broken[0]
    return saes


@interruptible()
def load_intact_saes(sources: Sequence[SAESource], device: str = "cpu") -> tuple[list[EvalSAE], list[BrokenSAEError]]:
    """As `load_saes`, but return the errors of SAEs that are Temporal or have unusable weights or thresholds."""
    check_device(device)
    if not sources:
        raise ValueError("saes is empty; pass at least one SAE, folder or (release, sae_id) pair.")
    saes: list[EvalSAE] = []
    broken: list[BrokenSAEError] = []
    for source in sources:
        try:
            saes.append(_load(source, device))
        except BrokenSAEError as error:  # noqa: PERF203  one SAE among many
            broken.append(error)
    names = [sae.name for sae in saes] + [error.name for error in broken]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(
                f"two SAEs are called {name!r}, so the results of one would replace the other's; "
                "pass (name, SAE or Path) pairs with different names (NAME=FOLDER on the command line), "
                "or leave one out if both are the same SAE."
            )
    return saes, broken


def parse_source(argument: str) -> Path | tuple[str, str | Path]:
    """Parse a command-line source: NAME=FOLDER, RELEASE:SAE_ID, or a folder; an existing path is always a folder."""
    if Path(argument).exists():
        return Path(argument)
    name, _, folder = argument.partition("=")
    if folder:
        return name, Path(folder)
    release, _, sae_id = argument.partition(":")
    return (release, sae_id) if sae_id else Path(argument)


def seed_group(release: str) -> str:
    """The name without its seed: `topk_seed0` and `topk_seed1` are two seeds of one configuration, `topk`."""
    return re.sub(r"(?:^|[_\-/.])seed[_\-]?\d+", "", release)


def fingerprint_tensors(tensors: dict[str, Tensor], *configs: dict[str, Any]) -> str:
    """First 16 hexadecimal digits of a SHA-256 of the tensors' names, dtypes, shapes and bytes, and of `configs`."""
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _full_name(release: str, sae_id: str) -> str:
    return f"{release}_{sae_id}".replace("/", "_")


def _load(source: SAESource, device: str) -> EvalSAE:
    if isinstance(source, EvalSAE):
        copied = copy.deepcopy(source)
        for sae in filter(None, (copied.sae, copied.training_sae)):
            sae.to(device=device)
        return copied
    if isinstance(source, (str, Path)):
        return _from_folder(Path(source).resolve().name, Path(source), device)
    if not isinstance(source, tuple):
        return _from_object(None, source, device)
    name, where = source
    if isinstance(where, Path):
        return _from_folder(name, where, device)
    if isinstance(where, str):
        try:
            return _describe(name, where, SAE.from_pretrained(name, where, device=device), None)
        except LocalEntryNotFoundError as error:
            raise ConnectionError(
                f"SAE {where!r} of {name!r} must be downloaded, but the Hub cannot be reached or offline is set; pass "
                "a local folder."
            ) from error
    return _from_object(name, where, device)


def _from_folder(name: str, folder: Path, device: str) -> EvalSAE:
    if not folder.is_dir():
        raise ValueError(
            f"{str(folder)!r} in saes is not a folder; for an SAE on the Hub pass the pair (repository, sae_id), or "
            "RELEASE:SAE_ID on the command line."
        )
    if is_checkpoint(folder):
        return _from_object(name, load_checkpoint(folder, device=device), device)
    try:
        sae = SAE.load_from_disk(folder, device=device)
    except Exception as error:  # a foreign file can fail in any way
        raise ValueError(f"{str(folder)!r} in saes is not an SAE that SAELens can load: {error}") from error
    return _describe(name, CUSTOM_SAE_ID, sae, None)


def _from_object(name: str | None, sae: SAE[Any], device: str) -> EvalSAE:
    sae = copy.deepcopy(sae).to(device=device)
    if not isinstance(sae, TrainingSAE):
        return _describe(name, CUSTOM_SAE_ID, sae, None)
    check_folded(sae.cfg.normalize_activations, "an SAE in saes")
    with _named(name, CUSTOM_SAE_ID, sae):
        exported = _exported(sae)
    return _describe(name, CUSTOM_SAE_ID, exported.to(device=device), sae)


@contextmanager
def _named(name: str | None, sae_id: str, sae: SAE[Any]) -> Iterator[None]:
    """Convert a `ValueError` about weights or thresholds into a `BrokenSAEError` that names the SAE."""
    try:
        yield
    except ValueError as error:
        name = name or f"{sae.cfg.architecture()}_{fingerprint_tensors(dict(sae.state_dict()))[:8]}"
        raise BrokenSAEError(_full_name(name, sae_id), error) from error


def _exported(sae: TrainingSAE[Any]) -> SAE[Any]:
    """Export `sae` to the inference SAE that its users load."""
    if isinstance(sae, SampledTopKTrainingSAE):
        return to_jumprelu(sae)
    with TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        return SAE.load_from_disk(folder)


def _describe(name: str | None, sae_id: str, sae: SAE[Any], training_sae: TrainingSAE[Any] | None) -> EvalSAE:
    check_folded(sae.cfg.normalize_activations, "an SAE in saes")
    with _named(name, sae_id, sae):
        check_weights(sae)
        _check_kind(sae)
    _fold_decoder_norm(sae)
    both = [sae] if training_sae is None else [sae, training_sae]
    tensors = {f"{i}.{key}": value for i, each in enumerate(both) for key, value in each.state_dict().items()}
    # Without the device, which changes no results and may be all that differs between SAEs that were trained alike.
    configs = [{key: value for key, value in each.cfg.to_dict().items() if key != "device"} for each in both]
    fingerprint = fingerprint_tensors(tensors, *configs)
    trained_as = training_sae.cfg.architecture() if training_sae is not None else None
    sae_class = trained_as or sae.cfg.metadata.training_architecture or sae.cfg.architecture()
    return EvalSAE(name or f"{sae_class}_{fingerprint[:8]}", sae_id, sae, training_sae, sae_class, fingerprint)


def _check_kind(sae: SAE[Any]) -> None:
    if isinstance(sae, TemporalSAE):
        raise ValueError(  # noqa: TRY004  as for every other unsuitable SAE
            "a TemporalSAE predicts a part of its codes from earlier tokens, which `decode`, and so every eval, leaves "
            "out; it cannot be evaluated here."
        )


@torch.no_grad()
def _fold_decoder_norm(sae: SAE[Any]) -> None:
    """Scale decoder rows to unit norm: SAEBench does so for SAEs from the Hub, and expects it of SAE objects."""
    norms = sae.W_dec.norm(dim=-1)
    if torch.allclose(norms, torch.ones_like(norms), atol=1e-5):
        return
    try:
        sae.fold_W_dec_norm()
    except NotImplementedError:
        return  # folding would change what TopK and matching pursuit select; see `shown_codes.unit_rows`
