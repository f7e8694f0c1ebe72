"""`run_evals`: resumable SAEBench on any SAE; writes to the output folder, the Hub's cache and temporary files only."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_bench.sae_bench_utils.general_utils import str_to_dtype
from tqdm.auto import tqdm

from sae_lens_sampled.files import NoSpaceError, check_writable, reporting_no_space, scratch_folder
from sae_lens_sampled.runners.language_model import dtype_of, meaningful_kwargs
from sae_lens_sampled.saebench import patches, shown_codes
from sae_lens_sampled.saebench.bundled import BUNDLED_MODEL, BUNDLED_PROBING_DATASETS, BUNDLED_TEXT, bundled
from sae_lens_sampled.saebench.evals import EVALS, Eval
from sae_lens_sampled.saebench.evals.base import EvalSetup
from sae_lens_sampled.saebench.models import EvalModel, attach, common_model, common_model_kwargs, load_model
from sae_lens_sampled.saebench.network import check_network
from sae_lens_sampled.saebench.overrides import check_evals
from sae_lens_sampled.saebench.probing_data import ProbingDataset, load_probing_datasets
from sae_lens_sampled.saebench.results import differences, is_same, load_result, result_path, write_result
from sae_lens_sampled.saebench.sources import EvalSAE, SAESource, fingerprint_tensors, load_intact_saes
from sae_lens_sampled.signals import interruptible

logger = logging.getLogger(__name__)

DEFAULT_EVALS = ("core", "sparse_probing", "absorption")
DTYPES = ("float32", "float64", "float16", "bfloat16")
DEFAULT_TEXT = "Skylion007/openwebtext"
"""The data set that SAEBench's core is run on."""

Result = dict[str, Any]
Stamps = dict[str, dict[str, str]]
"""Fingerprints of the SAE, model and configuration (with data) that results are computed from, by SAE name."""


class EvalError(RuntimeError):
    """Some results are missing; the message says which and why. The other results are kept."""


@interruptible()
def run_evals(
    saes: Sequence[SAESource],
    evals: Sequence[str] = DEFAULT_EVALS,
    model: str | Path | None = None,
    output_dir: str | Path = "sae_bench_results",
    *,
    probing_datasets: Sequence[ProbingDataset | str | Path] = (),
    text: str | Path | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 42,
    offline: bool = False,
    force_rerun: bool = False,
    show_progress: bool = True,
    prepare_only: bool = False,
) -> dict[str, dict[str, Result]]:
    """Run SAEBench's evals and MMCS on SAEs of any architecture but Temporal; return the results by eval and SAE name.

    Results are written to `<output_dir>/eval_results/<eval>/<release>_<sae_id>_eval_results.json` in SAEBench's format
    ("/" in names becomes "_"). Existing results of the same SAE, model and configuration are kept, so repeating an
    interrupted run resumes it.

    Args:
        saes: sources as in `load_saes`: SAEs, training SAEs, folders of either, `(name, SAE or Path)`, or
            `(release, sae_id)`.
        evals: any of "core", "sparse_probing", "absorption" and "mmcs".
        model: an official TransformerLens name or a folder in Hugging Face format; None for the model that all SAEs
            were trained on.
        output_dir: folder for results and caches; only temporary files and the Hub's cache are written elsewhere.
        probing_datasets: data sets that replace SAEBench's eight in sparse probing: files, folders or results of
            `load_probing_dataset`.
        text: data set for core, as Hub name or folder; None for SAEBench's openwebtext.
        overrides: fields of SAEBench's configurations, by eval, such as `{"core": {"context_size": 64}}`.
        model_kwargs: arguments of `from_pretrained`, such as `{"revision": "step1000"}`; None for those of the training
            runs (`model_from_pretrained_kwargs` in the SAEs' metadata).
        device: device to run on; None for a GPU if there is one.
        dtype: dtype of model and SAEs, like SAEBench's `llm_dtype`; None for that in `model_kwargs`, or else float32.
        seed: seed for random draws; core's text is always shuffled with seed 42, as in SAEBench.
        offline: do not use the network. If model, text or probing data sets are not given, take those bundled with the
            repository.
        force_rerun: recompute and replace existing results.
        show_progress: show a progress bar over pairs of SAE and eval.
        prepare_only: only do the work that SAEs share, and return no results; later runs reuse absorption's probes.

    Raises:
        ValueError: if an argument is invalid, an SAE does not fit the model or an eval, or an existing result in
            `output_dir` is for another SAE, model or configuration and `force_rerun` is not set (MMCS's is replaced).
        ConnectionError: if something must be downloaded, but the Hub cannot be reached or `offline` is set.
        OSError: if the Hub has no such SAE.
        NoSpaceError: if the disk is full; finished results are kept.
        EvalError: if some SAEs could not be evaluated, at the end, or at once if none can be; the results of the others
            are kept.
    """
    overrides = overrides or {}
    check_evals(evals, overrides)
    check_writable(Path(output_dir), "output_dir")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be from 0 to 2**32 - 1, the range of numpy's generator.")
    eval_classes = [eval_class for name, eval_class in EVALS.items() if name in evals]
    # The SAEs, and the model and data to evaluate them on.
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with patches.cache_only() if offline else nullcontext():
        loaded, broken = load_intact_saes(saes, device)
    # Failures known from the start, by eval and SAE: broken SAEs, and comparisons that have only broken partners.
    n_wanted = len(eval_classes) * len(saes)
    failures: dict[str, Exception] = {f"{e.name} of {sae.name}": sae.reason for sae in broken for e in eval_classes}
    if broken and len(loaded) == 1:
        reason = ValueError("the SAEs to compare it with are broken")
        failures |= {f"{e.name} of {loaded[0].name}": reason for e in eval_classes if e.compares}
        eval_classes = [eval_class for eval_class in eval_classes if not eval_class.compares]
    if not loaded or not eval_classes:
        raise _missing(failures, n_wanted)
    if offline:
        model = model or bundled(BUNDLED_MODEL)
        if any(eval_class.reads_text for eval_class in eval_classes):
            text = text or bundled(BUNDLED_TEXT)
        if any(eval_class.reads_probing_datasets for eval_class in eval_classes):
            probing_datasets = probing_datasets or [bundled(path) for path in BUNDLED_PROBING_DATASETS]
    model = str(model or common_model(loaded))
    model_kwargs = meaningful_kwargs(common_model_kwargs(loaded) if model_kwargs is None else model_kwargs)
    dtype = dtype or dtype_of(model_kwargs) or "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {list(DTYPES)}.")
    text = str(Path(text).resolve()) if text and Path(text).is_dir() else str(text or DEFAULT_TEXT)
    with patches.cache_only() if offline else nullcontext():  # datasets would ask a server about local files
        labelled = load_probing_datasets(probing_datasets)
    artifacts = Path(output_dir).resolve() / "artifacts"
    # Report anything missing before doing any work.
    network = _network(eval_classes, model, model_kwargs, text, labelled, offline)
    with network, scratch_folder(artifacts) as scratch:
        setup = EvalSetup(
            model=load_model(model, device, str_to_dtype(dtype), model_kwargs),
            output_dir=Path(output_dir).resolve(),
            scratch=scratch,
            device=device,
            dtype=dtype,
            d_sae=max(sae.sae.cfg.d_sae for sae in loaded),
            seed=seed,
            text=text,
            probing_datasets=labelled,
        )
        _attach(loaded, setup)
        # Reject unsuitable SAEs, and existing results of other SAEs or settings. Such comparisons are replaced instead.
        planned = [eval_class(setup, overrides.get(eval_class.name, {})) for eval_class in eval_classes]
        for evaluation in planned:
            evaluation.check(loaded)
        stamps = {evaluation.name: _stamps(evaluation, loaded) for evaluation in planned if not evaluation.compares}
        if not force_rerun:
            _check_results(stamps, loaded, setup)
        if prepare_only:
            kept = [evaluation for evaluation in planned if not evaluation.compares]  # comparisons keep nothing
            with tqdm(total=len(kept), desc="Preparing", disable=not show_progress) as progress:
                for evaluation in kept:
                    with _working_on(evaluation, "preparing", progress):
                        evaluation.prepare(loaded)
                    progress.update()
            return {}
        # One eval after the other, each on all SAEs.
        results, failed = _evaluate_in_turn(planned, loaded, stamps, force_rerun, show_progress)
    if failures := failures | failed:
        raise _missing(failures, n_wanted)
    return results


def _missing(failures: Mapping[str, Exception], n_wanted: int) -> EvalError:
    """The error that lists the missing results, grouped by reason."""
    names: dict[Exception, list[str]] = {}
    for name, error in failures.items():
        names.setdefault(error, []).append(name)
    lines = [f"{', '.join(of_error)}: {type(error).__name__}: {error}" for error, of_error in names.items()]
    result = EvalError(f"{len(failures)} of {n_wanted} results are missing:\n" + "\n".join(lines))
    result.__cause__ = next(iter(names))
    return result


def _network(
    eval_classes: Sequence[type[Eval]],
    model: str,
    model_kwargs: Mapping[str, Any],
    text: str,
    probing_datasets: Sequence[ProbingDataset],
    offline: bool,
) -> AbstractContextManager[None]:
    """Context that uses the Hub, or only its cache if the Hub is unavailable; raises if that cache lacks something."""
    needed_text = text if any(eval_class.reads_text for eval_class in eval_classes) else None
    reads_labelled_texts = any(eval_class.reads_probing_datasets for eval_class in eval_classes)
    default_datasets = reads_labelled_texts and not probing_datasets
    reachable = check_network(model, needed_text, default_datasets, offline, model_kwargs)
    return nullcontext() if reachable else patches.cache_only()


def _evaluate_in_turn(
    planned: Sequence[Eval],
    saes: Sequence[EvalSAE],
    stamps: Mapping[str, Stamps],
    force_rerun: bool,
    show_progress: bool,
) -> tuple[dict[str, dict[str, Result]], dict[str, Exception]]:
    """Run the evals in turn; return results by eval and SAE name, and errors by "<eval> of <SAE>".

    Comparisons are stamped only when they run, because their stamps depend on the results of other evals.
    """
    results: dict[str, dict[str, Result]] = {}
    failures: dict[str, Exception] = {}
    with tqdm(total=len(saes) * len(planned), desc="SAEBench", disable=not show_progress) as progress:
        for evaluation in planned:
            name = evaluation.name
            own_stamps = stamps.get(name) or _stamps(evaluation, saes)
            results[name], failed = _evaluate_all(evaluation, saes, own_stamps, force_rerun, progress)
            failures |= {f"{name} of {sae_name}": error for sae_name, error in failed.items()}
    return results, failures


def _evaluate_all(
    evaluation: Eval, saes: Sequence[EvalSAE], stamps: Stamps, force_rerun: bool, progress: tqdm
) -> tuple[dict[str, Result], dict[str, Exception]]:
    """Run one eval; return results and errors by SAE name. If one SAE fails, the others are still evaluated."""
    setup, name = evaluation.setup, evaluation.name
    results: dict[str, Result] = {}
    failures: dict[str, Exception] = {}
    # Existing results.
    for sae in saes:
        result = load_result(result_path(setup.output_dir, name, sae))
        if result is not None and not force_rerun and is_same(result, stamps[sae.name]):
            results[sae.name] = result
            progress.update()
    pending = [sae for sae in saes if sae.name not in results]
    if not pending:
        return results, failures
    # Work shared by all SAEs.
    try:
        with _working_on(evaluation, "language model", progress):
            evaluation.prepare(saes if evaluation.compares else pending)
    except NoSpaceError:  # later results would not fit either
        raise
    except Exception as error:
        logger.exception("%s failed", name)
        progress.update(len(pending))
        return results, {sae.name: error for sae in pending}
    # Each SAE by itself.
    for sae in pending:
        try:
            with _working_on(evaluation, sae.name, progress), shown_codes.unit_rows(sae.sae):
                result = evaluation.run(sae)
            path = result_path(setup.output_dir, name, sae)
            results[sae.name] = write_result(path, result, sae, stamps[sae.name])
        except NoSpaceError:
            raise
        except Exception as error:
            logger.exception("%s of %s failed", name, sae.name)
            failures[sae.name] = error
        progress.update()
    return results, failures


@contextmanager
def _working_on(evaluation: Eval, doing: str, progress: tqdm) -> Iterator[None]:
    """Patch SAEBench, show progress and report a full disk while one unit of work runs."""
    setup = evaluation.setup
    log = setup.output_dir / "artifacts" / "sae_bench.log"
    with (
        reporting_no_space(setup.output_dir),
        patches.for_every_eval(setup.model, setup.scratch, setup.seed, log),
        _tokens_shown(setup.model, progress, f"{evaluation.name}: {doing}"),
    ):
        yield


@contextmanager
def _tokens_shown(model: EvalModel, progress: tqdm, doing: str) -> Iterator[None]:
    """Show beside the progress bar the current work and how many tokens the language model has read for it."""
    n_tokens, shown_at = 0, time.monotonic()

    def count(n: int) -> None:
        nonlocal n_tokens, shown_at
        n_tokens += n
        if time.monotonic() > shown_at + 1:  # writing to a terminal is slow
            shown_at = time.monotonic()
            progress.set_postfix_str(f"{doing}, {n_tokens:,} tokens")

    progress.set_postfix_str(doing)
    with patches.tokens_counted(model.hooked, count):
        yield


def _stamps(evaluation: Eval, saes: Sequence[EvalSAE]) -> Stamps:
    """Fingerprints for the results of one eval, by SAE name; those of model and configuration are computed once."""
    inputs = {"config": asdict(evaluation.config), "sae_bench": version("sae-bench")} | evaluation.inputs(saes)
    shared = {"model": evaluation.setup.model.fingerprint, "config": fingerprint_tensors({}, inputs)}
    return {sae.name: {"sae": sae.fingerprint, **shared} for sae in saes}


def _check_results(stamps: Mapping[str, Stamps], saes: Sequence[EvalSAE], setup: EvalSetup) -> None:
    for name, by_sae in stamps.items():
        for sae in saes:
            path = result_path(setup.output_dir, name, sae)
            result = load_result(path)
            if result is not None and not is_same(result, by_sae[sae.name]):
                raise ValueError(
                    f"{path} holds a result that does not match this {differences(result, by_sae[sae.name])}; "
                    "choose another output_dir, or pass force_rerun=True (--force-rerun) to replace it."
                )


def _attach(saes: Sequence[EvalSAE], setup: EvalSetup) -> None:
    """Attach the SAEs to the setup's model and cast them to its dtype: SAEBench would cast only after the recording."""
    for sae in saes:
        attach(sae, setup.model)
        sae.sae.to(dtype=str_to_dtype(setup.dtype))
        if sae.training_sae is not None:
            sae.training_sae.to(dtype=str_to_dtype(setup.dtype))
