"""The model card of a Hub repository, generated from the SAEs' configs and measured numbers."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tabulate import tabulate
from transformer_lens.loading_from_pretrained import get_official_model_name

from sae_lens_sampled.hub.folder import without_folders

Number = int | float

POOL_FIELDS = ("pool_factor", "pool_steps", "score", "pool_sampling", "pool_group_size")
COMPARED = ("d_sae", "k", *POOL_FIELDS, "inference_threshold")
LABELS = {"l0": "L0", "fvu": "FVU", "dead": "dead latents"}
IN_TRAINING = {"l0": "L0", "num_dead_features": "dead latents"}
"""Entries of the SAE's metadata, each with the column that it fills where nothing was measured."""

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

Sparse autoencoders{% if metadata.hook_name_out %} or transcoders{% endif %}, trained with
[SAELens](https://github.com/decoderesearch/SAELens) and stored for inference; plain SAELens loads them.
{%- if sampled %} Those
trained as `sampled_topk` (or its transcoder) are Sampled-SAEs ([arXiv 2508.21324](https://arxiv.org/abs/2508.21324)):
in training, BatchTopK selects among `k * pool_factor` latents, chosen by their scores in the batch or in groups of its
tokens, or among all latents without a `pool_factor`
{%- if pools_end %} or after `pool_steps` steps{% endif %}.
{%- endif %}

## Use

```python
from sae_lens import SAE

sae = SAE.from_pretrained("{{ repo_id }}", "{{ sae_id }}")
```

`sae.encode(activations)` takes activations of shape `(..., {{ d_in }})`
{%- if metadata.hook_name %} from `{{ metadata.hook_name }}`{% endif %}
{%- if metadata.hook_name_out %}; `sae(activations)` reconstructs `{{ metadata.hook_name_out }}`{% endif %}.

## The SAEs

{{ comparison }}
{% if notes %}
{{ notes | join(" ") }}
{% endif %}
## Config

{{ config }}

## Provenance

{{ provenance }}

"""


def model_card(
    configs: Mapping[str, dict[str, Any]],
    repo_id: str,
    evaluation: Mapping[str, Mapping[str, Number]] | None = None,
    license_id: str = "mit",
) -> str:
    """Generate a README.md with YAML metadata. In the same environment, the same arguments give the same text.

    Args:
        configs: the `cfg.json` of each SAE, by sae_id.
        repo_id: "user/name" on the Hub.
        evaluation: measured numbers of each SAE, by sae_id. The names become columns; "l0", "fvu" and "dead" are
            written "L0", "FVU" and "dead latents". The numbers are also written to the metadata's `model-index`.
        license_id: the Hub's identifier of a license.
    """
    evaluation = evaluation or {}
    name = repo_id.split("/")[-1]
    sampled = any(_trained_as(cfg).startswith("sampled_topk") for cfg in configs.values())
    metadata = [_metadata(cfg) for cfg in configs.values()]
    data = ModelCardData(
        library_name="saelens",
        license=license_id,
        base_model=_unique(_base_model(entry.get("model_name")) for entry in metadata) or None,
        datasets=_unique(_dataset(entry.get("dataset_path")) for entry in metadata) or None,
        tags=["sparse-autoencoder", "saelens", *(["sampled-sae", "arxiv:2508.21324"] if sampled else [])],
        model_name=name,
        eval_results=[result for sae_id in evaluation for result in _results(sae_id, configs, evaluation)] or None,
    )
    rows = [_compare(sae_id, cfg, evaluation.get(sae_id, {})) for sae_id, cfg in configs.items()]
    sae_id, cfg = next(iter(configs.items()))
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        sampled=sampled,
        pools_end=any(_details(cfg).get("pool_steps") for cfg in configs.values()),
        repo_id=repo_id,
        sae_id=sae_id,
        d_in=cfg.get("d_in"),
        metadata=metadata[0],
        comparison=_table(rows),
        notes=_notes(rows),
        config=_table(_fields([{**cfg, **_details(cfg)} for cfg in configs.values()])),
        provenance=_table(_provenance(metadata)),
    )
    return str(card)


def _metadata(cfg: dict[str, Any]) -> dict[str, Any]:
    return cfg.get("metadata") or {}


def _trained_as(cfg: dict[str, Any]) -> str:
    return _metadata(cfg).get("training_architecture") or ""


def _details(cfg: dict[str, Any]) -> dict[str, Any]:
    """The training-only fields, which SAELens keeps in the metadata of an exported SAE."""
    return _metadata(cfg).get("training_architecture_details") or {}


def _compare(sae_id: str, cfg: dict[str, Any], measured: Mapping[str, Number]) -> dict[str, Any]:
    metadata, fields = _metadata(cfg), {**cfg, **_details(cfg)}
    results = {LABELS.get(name, name): value for name, value in measured.items()}
    in_training = {
        f"{label} (training)": metadata.get(name) for name, label in IN_TRAINING.items() if label not in results
    }
    return {
        "SAE": f"`{sae_id}`",
        "trained as": _trained_as(cfg) or None,
        **{field: fields.get(field) for field in COMPARED},
        "d_sae before pruning": metadata.get("unpruned_d_sae"),
        **results,
        **in_training,
    }


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    columns = {column for row in rows for column, value in row.items() if value is not None}
    notes = []
    if "FVU" in columns:
        notes.append("FVU is the fraction of variance unexplained; lower is better.")
    if any(column.endswith("(training)") for column in columns):
        notes.append('Columns marked "training" are from the training run; they were not measured on the stored SAE.')
    return notes


def _fields(configs: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One row per config field, with all distinct values in order where the SAEs differ."""
    names = _unique(name for cfg in configs for name in cfg if name not in ("metadata", "device"))
    values = {name: _unique(_shown(cfg[name]) for cfg in configs if name in cfg) for name in names}
    return [{"field": f"`{name}`", "value": ", ".join(shown) or "none"} for name, shown in values.items()]


def _provenance(metadata: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    def each(name: str) -> str:
        return ", ".join(_unique(_shown(without_folders(entry.get(name))) for entry in metadata))

    rows = {
        "model": each("model_name"),
        "hook": each("hook_name"),
        "output hook": each("hook_name_out"),
        "dataset": each("dataset_path"),
        "context size": each("context_size"),
        "trained with SAELens": each("sae_lens_training_version"),
        "uploaded with": ", ".join(f"{name} {version(name)}" for name in ("sae-lens-sampled", "sae-lens", "torch")),
    }
    return [{"what": name, "value": value} for name, value in rows.items() if value]


def _results(
    sae_id: str, configs: Mapping[str, dict[str, Any]], evaluation: Mapping[str, Mapping[str, Number]]
) -> list[EvalResult]:
    dataset = _dataset(_metadata(configs[sae_id]).get("dataset_path"))
    return [
        EvalResult(
            task_type="feature-extraction",
            task_name="Sparse reconstruction of activations",
            dataset_type=dataset or "activations",
            dataset_name=dataset or "activations",
            metric_type=name,
            metric_name=f"{LABELS.get(name, name)} ({sae_id})",
            metric_value=value,
        )
        for name, value in evaluation[sae_id].items()
    ]


def _base_model(name: str | None) -> str | None:
    """Hub name of a model, also for TransformerLens' aliases such as "pythia-160m-deduped"; None for any other name."""
    if name is None or Path(name).exists():
        return None
    with suppress(ValueError):
        return get_official_model_name(name)
    return _dataset(name)


def _dataset(name: str | None) -> str | None:
    """`name` if it has the form "user/name" and is not a local path, else None."""
    if name is None or Path(name).exists():
        return None
    return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) else None


def _unique(values: Any) -> list[Any]:
    return [value for value in dict.fromkeys(values) if value not in (None, "")]


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown table with a column for every key that has a value in any row."""
    columns = _unique(column for row in rows for column, value in row.items() if value is not None)
    cells = [[_shown(row.get(column)) for column in columns] for row in rows]
    return tabulate(cells, columns, tablefmt="github", stralign=None, disable_numparse=True)
