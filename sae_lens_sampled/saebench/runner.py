"""`run_evals`: SAEBench on any SAE, resumable, with nothing written outside the output folder."""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from sae_bench.sae_bench_utils.general_utils import str_to_dtype
from tqdm.auto import tqdm

from sae_lens_sampled.files import NoSpaceError, check_writable, no_space_told, scratch_folder
from sae_lens_sampled.runners.language_model import dtype_of, meaningful_kwargs
from sae_lens_sampled.saebench import patches
from sae_lens_sampled.saebench.bundled import BUNDLED_MODEL, BUNDLED_PROBING_DATASETS, BUNDLED_TEXT, bundled
from sae_lens_sampled.saebench.evals import EVALS, Eval
from sae_lens_sampled.saebench.evals.base import EvalSetup
from sae_lens_sampled.saebench.models import EvalModel, attach, common_model, common_model_kwargs, load_model
from sae_lens_sampled.saebench.network import check_network
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
"""Fingerprints of all that a result depends on, by name of the SAE."""


class EvalError(RuntimeError):
    """Some SAEs have no result of some evals; the message says which and why. The other results are there."""


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
        model_kwargs: arguments of `from_pretrained`, such as `{"revision": "step1000"}`; None for those that the SAEs
            were trained with, by `model_from_pretrained_kwargs` of their metadata.
        device: None for a GPU if there is one.
        dtype: type of model and SAEs, as SAEBench's `llm_dtype`; None for that of `model_kwargs`, or float32.
        seed: of whatever is random.
        offline: use nothing from the network, and where nothing else is given the model, text and data sets that are
            bundled with the repository.
        force_rerun: compute and replace results that are there.
        show_progress: whether to show a bar over (SAE, eval).
        prepare_only: make what later runs use again, absorption's probes, and evaluate nothing.

    Raises:
        ValueError: if an argument is wrong, or a result is there of another SAE, model or configuration.
        ConnectionError: if something must be downloaded and the Hub cannot be reached.
        NoSpaceError: if the disk is full; results that are finished are kept.
        EvalError: at the end, if SAEs could not be evaluated.
    """
    overrides = overrides or {}
    _check_evals(evals, overrides)
    check_writable(Path(output_dir), "output_dir")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be from 0 to 2**32 - 1, as numpy's generator takes it.")
    eval_classes = [eval_class for name, eval_class in EVALS.items() if name in evals]
    # The SAEs, and the model and data to evaluate them on.
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with patches.cache_only() if offline else nullcontext():
        loaded, broken = load_intact_saes(saes, device)
    # What is left out from the beginning, by eval and SAE in words: broken SAEs, and comparisons with them alone.
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
        text = text or bundled(BUNDLED_TEXT)
        probing_datasets = probing_datasets or [bundled(path) for path in BUNDLED_PROBING_DATASETS]
    model = str(model or common_model(loaded))
    model_kwargs = meaningful_kwargs(common_model_kwargs(loaded) if model_kwargs is None else model_kwargs)
    dtype = dtype or dtype_of(model_kwargs) or "float32"
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be of {list(DTYPES)}.")
    text = str(Path(text).resolve()) if text and Path(text).is_dir() else str(text or DEFAULT_TEXT)
    labelled = load_probing_datasets(probing_datasets)
    artifacts = Path(output_dir).resolve() / "artifacts"
    # What is not there is told before any work.
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
        # Refusals of SAEs, and of results that would have to be replaced; comparisons are made again for other SAEs.
        planned = [eval_class(setup, overrides.get(eval_class.name, {})) for eval_class in eval_classes]
        for evaluation in planned:
            evaluation.check(loaded)
        stamps = {evaluation.name: _stamps(evaluation, loaded) for evaluation in planned if not evaluation.compares}
        if not force_rerun:
            _check_results(stamps, loaded, setup)
        if prepare_only:
            with tqdm(total=len(planned), desc="Preparing", disable=not show_progress) as progress:
                for evaluation in planned:
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
    """The error that says what is missing and why, each reason once."""
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
    """Use of the Hub, or of what was downloaded earlier where that is enough; an error where neither does."""
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
    """Results by eval and name of the SAE, and what went wrong, by eval and SAE in words.

    The stamps of comparisons are taken when it is their turn: they depend on the results of other evals.
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
    """Results of one eval, and what went wrong, by name of the SAE. The others go on."""
    setup, name = evaluation.setup, evaluation.name
    results: dict[str, Result] = {}
    failures: dict[str, Exception] = {}
    # Results that are there.
    for sae in saes:
        result = load_result(result_path(setup.output_dir, name, sae))
        if result is not None and not force_rerun and is_same(result, stamps[sae.name]):
            results[sae.name] = result
            progress.update()
    pending = [sae for sae in saes if sae.name not in results]
    if not pending:
        return results, failures
    # Work for all SAEs.
    try:
        with _working_on(evaluation, "language model", progress):
            evaluation.prepare(saes if evaluation.compares else pending)
    except NoSpaceError:  # whatever comes next would not fit either
        raise
    except Exception as error:
        logger.exception("%s failed", name)
        progress.update(len(pending))
        return results, {sae.name: error for sae in pending}
    # Each SAE for itself.
    for sae in pending:
        try:
            with _working_on(evaluation, sae.name, progress):
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
    """What every piece of work needs around it."""
    setup = evaluation.setup
    log = setup.output_dir / "artifacts" / "sae_bench.log"
    with (
        no_space_told(setup.output_dir),
        patches.for_every_eval(setup.model, setup.scratch, setup.seed, log),
        _tokens_shown(setup.model, progress, f"{evaluation.name}: {doing}"),
    ):
        yield


@contextmanager
def _tokens_shown(model: EvalModel, progress: tqdm, doing: str) -> Iterator[None]:
    """Shows beside the bar what is being done, and how many tokens the language model has read for it."""
    n_tokens, shown_at = 0, time.monotonic()

    def count(n: int) -> None:
        nonlocal n_tokens, shown_at
        n_tokens += n
        if time.monotonic() > shown_at + 1:  # a terminal is slow
            shown_at = time.monotonic()
            progress.set_postfix_str(f"{doing}, {n_tokens:,} tokens")

    progress.set_postfix_str(doing)
    with patches.tokens_counted(model.hooked, count):
        yield


def _stamps(evaluation: Eval, saes: Sequence[EvalSAE]) -> Stamps:
    """Fingerprints for the results of one eval. All but the SAE's own is taken once, however many SAEs there are."""
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
                    f"{path} holds the result of another {differences(result, by_sae[sae.name])}; "
                    "choose another output_dir, or pass force_rerun=True to replace it."
                )


def _check_evals(evals: Sequence[str], overrides: Mapping[str, Mapping[str, Any]]) -> None:
    if not evals or not {*evals, *overrides} <= EVALS.keys():
        raise ValueError(f"evals={list(evals)} and the keys of overrides must be of {list(EVALS)}.")
    arguments = {"model_name": "model", "llm_dtype": "dtype", "dataset": "text"}
    for name, settings in overrides.items():
        known = sorted(field.name for field in fields(EVALS[name].config_class))
        for field in settings:
            if field in arguments:
                raise ValueError(f"overrides[{name!r}] sets {field!r}; pass {arguments[field]}=... instead.")
            if field not in known:
                raise ValueError(
                    f"overrides[{name!r}] sets {field!r}, which its configuration has not: {sorted(known)}."
                )
        _check_numbers(name, settings)
        if name not in evals:
            raise ValueError(f"overrides has {name!r}, which is not among evals={list(evals)}.")


def _check_numbers(eval_name: str, settings: Mapping[str, Any]) -> None:
    """Refuse sizes and counts that are none; a seed and a position of a token may be 0 or negative."""
    defaults = asdict(EVALS[eval_name].config_class(model_name=""))
    for field, value in settings.items():
        usual = defaults[field]
        is_count = isinstance(usual, int) and not isinstance(usual, bool) and usual > 0 and "seed" not in field
        if is_count and not (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            raise ValueError(f"{eval_name}.{field}={value!r} must be a whole number above 0.")
        if isinstance(usual, float) and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"{eval_name}.{field}={value!r} must be a finite number.")


def _attach(saes: Sequence[EvalSAE], setup: EvalSetup) -> None:
    """Make the SAEs ones of the setup's model, and of its type as SAEBench does, but before the recording."""
    for sae in saes:
        attach(sae, setup.model)
        sae.sae.to(dtype=str_to_dtype(setup.dtype))
        if sae.training_sae is not None:
            sae.training_sae.to(dtype=str_to_dtype(setup.dtype))
