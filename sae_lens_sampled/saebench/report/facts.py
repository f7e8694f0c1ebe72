"""Facts about the evaluation, and warnings for readers who compare the numbers."""

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sae_lens_sampled.runners.language_model import defining_kwargs
from sae_lens_sampled.saebench.report.metrics import groups_of
from sae_lens_sampled.saebench.report.results import SAEResults, evals_of
from sae_lens_sampled.saebench.results import STAMP


def facts(saes: Sequence[SAEResults]) -> dict[str, str]:
    """Model, hook, data and dates by displayed name, as far as the results contain them."""
    evals = evals_of(saes)
    counts = {name: sum(name in sae.results for sae in saes) for name in evals}
    models = {_model(result) for sae in saes for result in sae.results.values()}
    fields = ("hook_name", "hook_name_out")
    hooks = {hook for name in evals for f in fields for hook in _distinct(saes, name, "sae_cfg_dict", "metadata", f)}
    n_tokens = _distinct(saes, "core", "eval_result_metrics", "token_stats", "total_tokens_eval_sparsity_variance")
    labelled = [name for names in _distinct(saes, "sparse_probing", "eval_config", "dataset_names") for name in names]
    times = [time for sae in saes for name in evals if (time := sae.number(name, "datetime_epoch_millis"))]
    days = sorted({datetime.fromtimestamp(time / 1000, timezone.utc).date().isoformat() for time in times})
    described = {
        "Model": ", ".join(sorted(filter(None, models))),
        "Hook": ", ".join(sorted(hooks)),
        "SAEs": f"{len(saes)} in {len(groups_of(saes))} groups",
        "Evals": ", ".join(f"{name} ({n} SAEs)" for name, n in counts.items()),
        "Core text": ", ".join(_short(text) for text in _distinct(saes, "core", "eval_config", "dataset")),
        "Core tokens": ", ".join(f"{int(n):,}" for n in n_tokens) + (", " + _core_tokens(saes) if n_tokens else ""),
        "Training tokens": _tokens_of_training(saes),
        "Probing data": ", ".join(dict.fromkeys(map(_short, labelled))),
        "Date": " to ".join(dict.fromkeys([days[0], days[-1]])) if days else "",
    }
    return {name: value for name, value in described.items() if value}


def notes(saes: Sequence[SAEResults], unreadable: Sequence[str] = ()) -> list[str]:
    """Reasons why numbers are missing or not comparable, one sentence each; `unreadable` are files left out."""
    remarks = [
        f"{name} is truncated or not a result, so it is left out: run that eval again, which replaces the file, or "
        "delete it."
        for name in unreadable
    ]
    for name in evals_of(saes):
        missing = [sae.label for sae in saes if name not in sae.results]
        if missing:
            remarks.append(f"{name} is missing for {_listed(missing)}.")
        settings = {json.dumps(sae.get(name, "eval_config"), sort_keys=True) for sae in saes if name in sae.results}
        if len(settings) > 1:
            remarks.append(
                f"{name} was run with {len(settings)} different configurations, so SAEs may not be comparable."
            )
    models = {model for sae in saes for model in _stamps(sae, "model")}
    if len(models) > 1:
        remarks.append(
            f"By their fingerprints the results are from {len(models)} different models, or versions or dtypes of one."
        )
    mixed = [sae.label for sae in saes if len(_stamps(sae, "sae")) > 1]
    if mixed:
        remarks.append(f"The evals of {_listed(mixed)} were run on different weights or configs.")
    path = ("mmcs", "eval_result_metrics", "partners", "partners_of_same_group")
    alone = [sae.label for sae in saes if sae.get(*path) is False]
    if alone:
        remarks.append(
            f"MMCS of {_listed(alone)} is with SAEs of other configurations, because no second seed was compared."
        )
    return remarks


def _model(result: dict[str, Any]) -> str | None:
    """The model's name, with the arguments of `from_pretrained` that change which model the name denotes."""
    name = (result.get("eval_config") or {}).get("model_name")
    metadata = (result.get("sae_cfg_dict") or {}).get("metadata") or {}
    kwargs = defining_kwargs(metadata.get("model_from_pretrained_kwargs") or {})
    shown = ", ".join(f"{key}={value!r}" for key, value in kwargs.items())
    return f"{name} ({shown})" if name and shown else name


def _core_tokens(saes: Sequence[SAEResults]) -> str:
    """Which tokens core reads and which it leaves out, whatever training read."""
    contexts = _distinct(saes, "core", "eval_config", "context_size")
    excluded = _distinct(saes, "core", "eval_config", "exclude_special_tokens_from_reconstruction")
    of_losses = "" if excluded == [True] else "; for the losses, these are reconstructed too"
    return f"in contexts of {', '.join(map(str, contexts))}; pad, bos and eos tokens are left out{of_losses}"


def _tokens_of_training(saes: Sequence[SAEResults]) -> str:
    """Which tokens the SAEs were trained on, as far as their metadata say; core's may be others."""
    described = []
    for sae in saes:
        metadata = sae.get("core", "sae_cfg_dict", "metadata") or {}
        excluded = metadata.get("exclude_special_tokens")
        special = {None: "special tokens unknown", False: "all tokens", True: "without special tokens"}
        text = f"without tokens {excluded}" if isinstance(excluded, list) else special[excluded]
        context, positions = metadata.get("context_size"), metadata.get("seqpos_slice") or [None]
        text += f", contexts of {context}" if context else ""
        described.append(text + (f", positions {positions}" if any(positions) else ""))
    return "; ".join(dict.fromkeys(described))


def _distinct(saes: Sequence[SAEResults], *path: str) -> list[Any]:
    """The distinct values at `path`, in order of appearance."""
    values: list[Any] = []
    for sae in saes:
        value = sae.get(*path)
        if value is not None and value not in values:
            values.append(value)
    return values


def _short(name: str) -> str:
    """The last two parts of an absolute path; a Hub name unchanged."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def _stamps(sae: SAEResults, what: str) -> set[str]:
    stamps = (sae.get(name, "sae_cfg_dict", STAMP, what) for name in sae.results)
    return {stamp for stamp in stamps if stamp}


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
