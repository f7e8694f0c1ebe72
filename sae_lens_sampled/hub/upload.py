"""Upload of exported SAEs to the Hugging Face Hub, several in one repository, with one model card."""

import math
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import HFValidationError, RepositoryNotFoundError, validate_repo_id
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from sae_lens.saes.sae import SAE, TrainingSAE
from sae_lens.training.upload_saes_to_huggingface import upload_saes_to_huggingface

from sae_lens_sampled.files import check_writable
from sae_lens_sampled.folders import read_config
from sae_lens_sampled.hub.card import model_card
from sae_lens_sampled.hub.folder import SAE_FILES, inference_folder
from sae_lens_sampled.signals import interruptible

CARD = "README.md"
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
"""The form of a Hub token."""


class HubError(RuntimeError):
    """The Hub rejected a request, failed or could not be reached."""


@interruptible()
def upload_to_hub(
    saes: Mapping[str, TrainingSAE[Any] | SAE[Any] | str | Path],
    repo_id: str,
    *,
    dry_run_folder: str | Path | None = None,
    force: bool = False,
    private: bool = False,
    evaluation: Mapping[str, Mapping[str, float]] | None = None,
    license_id: str = "mit",
) -> str:
    """Upload SAEs with a model card; plain SAELens loads them with `SAE.from_pretrained(repo_id, sae_id)`.

    Files already on the Hub with the same content are skipped, so an interrupted upload is resumed by running it again.

    Args:
        saes: SAEs by sae_id, which becomes the folder in the repository: a training SAE or the folder of a training
            checkpoint, which are exported first; an inference SAE or the folder of one.
        repo_id: "user/name".
        dry_run_folder: a new or empty folder to write the repository's files to; in that case nothing is uploaded.
        force: replace files of these SAEs, and a model card, that are on the Hub with other content; files that these
            SAEs no longer have are deleted.
        private: create the repository as private. An existing one keeps its visibility; a public one is rejected.
        evaluation: measured numbers by sae_id, such as {"l0": 63.8, "fvu": 0.21, "dead": 12}, for the model card.
        license_id: the Hub's identifier of the license.

    Returns:
        The repository's URL, or the dry run's folder.

    Raises:
        ValueError: for an invalid argument, a folder that holds no SAE, an SAE that should not be published as it is,
            or files on the Hub that would be overwritten. In that case nothing has been uploaded.
        HubError: if the Hub rejects a request, fails or cannot be reached.
    """
    _check_names(saes, repo_id)
    numbers = _check_evaluation(evaluation or {}, saes)
    if dry_run_folder is not None:
        check_writable(Path(dry_run_folder), "dry_run_folder")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {sae_id: inference_folder(sae, Path(scratch) / "saes" / sae_id) for sae_id, sae in saes.items()}
        card = Path(scratch) / CARD
        configs = {sae_id: read_config(folder) for sae_id, folder in folders.items()}
        card.write_bytes(model_card(configs, repo_id, numbers, license_id).encode())
        files = {f"{sae_id}/{name}": folder / name for sae_id, folder in folders.items() for name in SAE_FILES}
        files = {path: file for path, file in {**files, CARD: card}.items() if file.exists()}
        _check_secrets(files)
        if dry_run_folder is not None:
            return _write(files, Path(dry_run_folder))
        return _send(files, folders, repo_id, force, private)


def _check_names(saes: Mapping[str, Any], repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} must have the form 'user/name' and be a valid name: {error}") from error
    if repo_id.count("/") != 1:
        raise ValueError(f"repo_id={repo_id!r} must have the form 'user/name'.")
    if not saes:
        raise ValueError("saes is empty; pass at least one SAE or folder, with its sae_id as key.")
    for sae_id in saes:
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", sae_id):
            raise ValueError(
                f"sae_id={sae_id!r} must be a relative path such as 'layer_6/seed_0': names of letters, digits, '-', "
                "'_' and '.' that begin with a letter, digit or '_', separated by '/'."
            )


def _check_evaluation(
    evaluation: Mapping[str, Mapping[str, float]], saes: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Check `evaluation`, and return its numbers as int or float, which YAML can write."""
    for sae_id, numbers in evaluation.items():
        if sae_id not in saes:
            raise ValueError(f"evaluation has {sae_id!r}, which is not among the SAEs: {', '.join(saes)}.")
        for name, value in numbers.items():
            if not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"evaluation[{sae_id!r}][{name!r}]={value!r} must be a finite number.")
    return {
        sae_id: {name: int(value) if isinstance(value, Integral) else float(value) for name, value in numbers.items()}
        for sae_id, numbers in evaluation.items()
    }


def _check_secrets(files: Mapping[str, Path]) -> None:
    for path, file in files.items():
        if file.suffix != ".safetensors" and SECRET.search(file.read_text(encoding="utf-8")):
            raise ValueError(
                f"{path} would publish what looks like a Hub token; remove it first (see model_from_pretrained_kwargs)."
            )


def _write(files: Mapping[str, Path], target: Path) -> str:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"dry_run_folder={str(target)!r} is not an empty folder; choose a new one.")
    for path, file in files.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / path)
    return str(target)


def _send(files: Mapping[str, Path], folders: Mapping[str, Path], repo_id: str, force: bool, private: bool) -> str:
    api = HfApi()
    possible = [f"{sae_id}/{name}" for sae_id in folders for name in SAE_FILES] + [CARD]
    with _one_sentence(repo_id):
        try:
            info = api.repo_info(repo_id)
        except RepositoryNotFoundError:
            info = None
        present = api.get_paths_info(repo_id, possible) if info else []
    if private and info and not info.private:
        raise ValueError(
            f"{repo_id!r} exists and is public; make it private in its settings, or upload without private=True "
            "(--private)."
        )
    remote = {file.path: file for file in present if isinstance(file, RepoFile)}
    same = {path for path, file in remote.items() if path in files and _is_same(file, files[path])}
    other = [path for path in remote if path not in same]
    if other and not force:
        raise ValueError(
            f"{repo_id!r} has different content in {', '.join(other)}; nothing was uploaded. Choose another "
            "repository, or overwrite with force (force=True, --force)."
        )
    missing = {i: folder for i, folder in folders.items() if any(f"{i}/{n}" in files.keys() - same for n in SAE_FILES)}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationDelete(path) for path in other if path not in files
    ]
    if CARD not in same:
        operations.append(CommitOperationAdd(CARD, files[CARD]))
    with _one_sentence(repo_id):
        if info is None:
            api.create_repo(repo_id, private=private or None)
        if missing:
            upload_saes_to_huggingface(dict(missing), repo_id, add_default_readme=False)
        if operations:
            api.create_commit(repo_id, operations, commit_message="Write the model card")
    return f"{api.endpoint}/{repo_id}"


def _is_same(remote: RepoFile, local: Path) -> bool:
    if remote.size != local.stat().st_size:
        return False
    with local.open("rb") as stream:
        if remote.lfs is not None:
            return sha_fileobj(stream).hex() == remote.lfs.sha256
        return git_hash(stream.read()) == remote.blob_id


@contextmanager
def _one_sentence(repo_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # errors of the client, of httpx and of hf_xet share no base class
        raise HubError(
            f"{_reason(error, repo_id)}; local files are unchanged, and running this again sends only what is missing."
        ) from error


def _reason(error: BaseException, repo_id: str) -> str:
    root, status, said = error, None, None
    for cause in _causes(error):
        root, status = cause, status or getattr(getattr(cause, "response", None), "status_code", None)
        said = said or getattr(cause, "server_message", None)
    quoted = f", {str(said).partition(chr(10))[0].rstrip('.')!r}" if said else ""
    if status == 401:
        return "the Hub got no token or does not accept it (401): log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return (
            f"the Hub does not let you write to {repo_id!r} (403{quoted}): unless it gives another reason, your token "
            "needs write permission for that user or organisation"
        )
    if status == 409:
        return (
            f"{repo_id!r} exists but you cannot see it, or someone else is changing it (409): check its name, or wait"
        )
    if status is not None:
        way_out = (
            "a server error: try again later" if status >= 500 else "too many requests: wait" if status == 429 else ""
        )
        return ", ".join(filter(None, [f"the Hub answered with HTTP status {status}{quoted}", way_out]))
    message = str(root).partition("\n")[0].rstrip(".")
    return f"the exchange with the Hub failed ({type(root).__name__}: {message})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
