"""`run_evals`: SAEBench on any SAE, resumable, with nothing written outside the output folder."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from dataclasses import fields as dataclass_fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_bench.sae_bench_utils.general_utils import str_to_dtype
from tqdm.auto import tqdm

from sae_lens_sampled.saebench import patches
from sae_lens_sampled.saebench.evals import EVALS, Run
from sae_lens_sampled.saebench.models import attach, load_model
from sae_lens_sampled.saebench.network import (
    CARRIED_MODEL,
    CARRIED_PROBING_DATASETS,
    CARRIED_TEXT,
    cache_only,
    carried,
    check_network,
)
from sae_lens_sampled.saebench.probing_data import ProbingDataset, load_probing_dataset
from sae_lens_sampled.saebench.results import differences, is_same, load_result, result_path, write_result
from sae_lens_sampled.saebench.sources import CUSTOM_SAE_ID, EvalSAE, SAESource, fingerprint_tensors, load_saes

logger = logging.getLogger(__name__)

DEFAULT_EVALS = ("core", "sparse_probing", "absorption")
DEFAULT_TEXT = "Skylion007/openwebtext"
"""The data set that SAEBench's core is run on."""

Results = dict[str, dict[str, dict[str, Any]]]


class EvalError(RuntimeError):
    """Some SAEs have no result of some evals; the message says which and why. The other results are there."""


def run_evals(
    saes: Sequence[SAESource],
    evals: Sequence[str] = DEFAULT_EVALS,
    model: str | Path | None = None,
    output_dir: str | Path = "sae_bench_results",
    *,
    probing_datasets: Sequence[ProbingDataset | str | Path] = (),
    text: str | Path | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    device: str | None = None,
    dtype: str = "float32",
    seed: int = 42,
    offline: bool = False,
    force_rerun: bool = False,
    show_progress: bool = True,
) -> Results:
    """Run SAEBench's evals, and MMCS, on SAEs of any architecture; the results by eval and name of the SAE.

    Results are in `<output_dir>/eval_results/<eval>/<release>_<sae_id>_eval_results.json`, in SAEBench's format. Those
    that are there already, of the same SAE, model and configuration, are kept; a run that was killed can be repeated.

    Args:
        saes: what `load_saes` takes: SAEs, training SAEs, folders of either, `(name, SAE)`, `(release, sae_id)`.
        evals: of "core", "sparse_probing", "absorption" and "mmcs".
        model: an official TransformerLens name or a folder in Hugging Face format; None for the one that the first SAE
            was trained on.
        output_dir: for results and caches; nothing is written elsewhere but in the Hub's own cache.
        probing_datasets: for sparse probing instead of SAEBench's eight: files, folders or what `load_probing_dataset`
            gives.
        text: data set of core, a Hub name or a folder; None for SAEBench's openwebtext.
        overrides: fields of SAEBench's configurations, by eval, such as `{"core": {"context_size": 64}}`.
        device: None for a GPU if there is one.
        dtype: of model and SAEs, as SAEBench's `llm_dtype`.
        seed: of whatever is random.
        offline: use nothing from the network, and where nothing else is given the model, text and data sets that the
            repository carries.
        force_rerun: compute and replace results that are there.
        show_progress: whether to show a bar over (SAE, eval).

    Raises:
        ValueError: if an argument is wrong, or a result is there of another SAE, model or configuration.
        ConnectionError: if something must be downloaded and the Hub cannot be reached.
        EvalError: at the end, if SAEs could not be evaluated.
    """
    unknown = [name for name in [*evals, *(overrides or {})] if name not in EVALS]
    if unknown or not evals:
        raise ValueError(f"evals={list(evals)} and the keys of overrides must be of {list(EVALS)}.")
    overrides = overrides or {}
    for name, fields in overrides.items():
        _check_override(name, fields, evals)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with cache_only() if offline else nullcontext():
        loaded = load_saes(saes, device)
    if offline:
        model = model or carried(CARRIED_MODEL)
        text = text or carried(CARRIED_TEXT)
        probing_datasets = probing_datasets or [carried(path) for path in CARRIED_PROBING_DATASETS]
    model = str(model or _common_model(loaded))
    text = str(text or DEFAULT_TEXT)
    text = str(Path(text).resolve()) if Path(text).is_dir() else text
    own_datasets = [one if isinstance(one, ProbingDataset) else load_probing_dataset(one) for one in probing_datasets]
    names = [dataset.name for dataset in own_datasets]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two of probing_datasets have the same name, {names}; load_probing_dataset(path, name) names one."
        )
    default_datasets = "sparse_probing" in evals and not own_datasets
    reachable = check_network(model, text if "core" in evals else None, default_datasets, offline)
    with nullcontext() if reachable else cache_only(), _scratch_folder(output_dir) as scratch:
        llm = load_model(model, device, str_to_dtype(dtype))
        for sae in loaded:
            attach(sae, llm)
            sae.sae.to(dtype=str_to_dtype(dtype))  # as SAEBench does, but before the recording
            if sae.training_sae is not None:
                sae.training_sae.to(dtype=str_to_dtype(dtype))
        d_sae = max(sae.sae.cfg.d_sae for sae in loaded)
        run = Run(llm, scratch.parent.parent, scratch, device, dtype, d_sae, seed, text, own_datasets)
        configs = {
            name: one.config(**(one.defaults(run) | dict(overrides.get(name, {}))))
            for name, one in EVALS.items()
            if name in evals
        }
        for name in configs:
            EVALS[name].check(loaded)
        if not force_rerun:
            _check_results(loaded, configs, run)
        with tqdm(total=len(loaded) * len(configs), desc="SAEBench", disable=not show_progress) as progress:
            failures: dict[str, Exception] = {}
            results = {
                name: _run_one(name, config, loaded, run, force_rerun, progress, failures)
                for name, config in configs.items()
            }
    if failures:
        lines = [f"{what}: {type(error).__name__}: {error}" for what, error in failures.items()]
        raise EvalError(
            f"{len(failures)} of {len(loaded) * len(configs)} results are missing:\n" + "\n".join(lines)
        ) from next(iter(failures.values()))
    return results


def _run_one(
    name: str,
    config: Any,
    saes: list[EvalSAE],
    run: Run,
    force_rerun: bool,
    progress: tqdm,
    failures: dict[str, Exception],
) -> dict[str, dict[str, Any]]:
    """One eval on all SAEs; the results by name. What goes wrong is added to `failures`, and the others go on."""
    results, pending = {}, []
    for sae in saes:
        result = load_result(result_path(run.output_dir, name, sae))
        if result is not None and not force_rerun and is_same(result, _stamp(name, config, sae, saes, run)):
            results[sae.name] = result
            progress.update()
        else:
            pending.append(sae)
    if not pending:
        return results
    log = run.output_dir / "artifacts" / "sae_bench.log"
    with patches.everywhere(run.model, run.scratch, run.seed, log):
        progress.set_postfix_str(f"{name}: language model")
        try:
            EVALS[name].prepare(config, saes if EVALS[name].compares else pending, run)
        except Exception as error:
            logger.exception("%s failed", name)
            failures |= {f"{name} of {sae.name}": error for sae in pending}
            progress.update(len(pending))
            return results
    for sae in pending:
        progress.set_postfix_str(f"{name}: {sae.name}")
        try:
            with patches.everywhere(run.model, run.scratch, run.seed, log):
                extra = EVALS[name].run(config, sae, run, run.scratch / "results" / name)
            written = run.scratch / "results" / name / f"{sae.name}_{CUSTOM_SAE_ID}_eval_results.json"
            path = result_path(run.output_dir, name, sae)
            stamp = _stamp(name, config, sae, saes, run)
            results[sae.name] = write_result(path, json.loads(written.read_text()), sae, stamp, extra)
        except Exception as error:
            logger.exception("%s of %s failed", name, sae.name)
            failures[f"{name} of {sae.name}"] = error
        progress.update()
    return results


def _stamp(name: str, config: Any, sae: EvalSAE, saes: list[EvalSAE], run: Run) -> dict[str, str]:
    """Fingerprints of all that a result depends on."""
    inputs: dict[str, Any] = {"config": asdict(config), "sae_bench": version("sae-bench")}
    if name == "core" and Path(config.dataset).is_dir():
        inputs["config"]["dataset"] = _fingerprint_files(Path(config.dataset))  # what it says, not where it lies
    if name == "sparse_probing":
        inputs["probing_datasets"] = [asdict(dataset) for dataset in run.probing_datasets]
    if EVALS[name].compares:
        inputs["saes"] = {one.name: one.fingerprint for one in saes}
        inputs["densities"] = {one.name: run.density(one) for one in saes}
    return {"sae": sae.fingerprint, "model": run.model.fingerprint, "config": fingerprint_tensors({}, inputs)}


def _check_results(saes: list[EvalSAE], configs: dict[str, Any], run: Run) -> None:
    """Refuse before any work where a result would have to be replaced. Comparisons follow the SAEs that are given."""
    for name in configs:
        for sae in saes:
            path = result_path(run.output_dir, name, sae)
            result = load_result(path)
            if result is None or EVALS[name].compares:
                continue
            stamp = _stamp(name, configs[name], sae, saes, run)
            if not is_same(result, stamp):
                raise ValueError(
                    f"{path} holds the result of another {differences(result, stamp)}; "
                    "choose another output_dir, or pass force_rerun=True to replace it."
                )


def _check_override(name: str, fields: Mapping[str, Any], evals: Sequence[str]) -> None:
    known = {field.name for field in dataclass_fields(EVALS[name].config)}
    arguments = {"model_name": "model", "llm_dtype": "dtype", "dataset": "text"}
    for field in fields:
        if field in arguments:
            raise ValueError(f"overrides[{name!r}] sets {field!r}; pass {arguments[field]}=... instead.")
        if field not in known:
            raise ValueError(f"overrides[{name!r}] sets {field!r}, which its configuration has not: {sorted(known)}.")
    if name not in evals:
        raise ValueError(f"overrides has {name!r}, which is not among evals={list(evals)}.")


def _common_model(saes: list[EvalSAE]) -> str:
    names = {sae.name: sae.sae.cfg.metadata.model_name for sae in saes}
    if len(set(names.values())) > 1 or None in names.values():
        raise ValueError(f"the metadata of the SAEs do not name one model, {names}; pass model=...")
    return str(next(iter(names.values())))


def _fingerprint_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _scratch_folder(output_dir: str | Path) -> Iterator[Path]:
    """An empty folder in the output folder, deleted at the end. Those that killed runs left are deleted first."""
    artifacts = Path(output_dir).resolve() / "artifacts"
    for left in artifacts.glob("unfinished_*"):
        if not _is_running(int(left.name.removeprefix("unfinished_"))):
            shutil.rmtree(left, ignore_errors=True)
    scratch = artifacts / f"unfinished_{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return pid != os.getpid()
