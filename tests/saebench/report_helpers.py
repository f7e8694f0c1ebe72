"""Result files with made-up numbers, in the form that SAEBench and `run_evals` write."""

import json
from pathlib import Path

NAMES = ["topk_seed0", "topk_seed1", "wide_seed0", "wide_seed1"]
FVUS = dict(zip(NAMES, (0.20, 0.26, 0.31, 0.33), strict=True))
TOP_1S = dict(zip(NAMES, (0.61, 0.64, 0.72, 0.79), strict=True))


def write(folder, eval_name, release, metrics, details=(), extra=None, architecture="topk", **fields):
    result = {
        "eval_type_id": {"absorption": "absorption_first_letter"}.get(eval_name, eval_name),
        "eval_config": {"model_name": "small_lm"},
        "datetime_epoch_millis": 1_700_000_000_000,
        "eval_result_metrics": metrics,
        "eval_result_details": list(details),
        "eval_result_unstructured": extra,
        "sae_lens_id": "custom_sae",
        "sae_lens_release_id": release,
        "sae_cfg_dict": {"architecture": architecture, "metadata": {"hook_name": "blocks.3.hook_resid_post"}},
    }
    path = Path(folder) / "eval_results" / eval_name / f"{release.replace('/', '_')}_custom_sae_eval_results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result | fields))
    return path


def write_core(folder, release, fvu=0.2, contexts=(), ours=True, ce_loss_score=0.97, **fields):
    metrics = {
        "sparsity": {"l0": 12.5},
        "reconstruction_quality": {"explained_variance": 0.85, "explained_variance_legacy": 0.81},
        "model_performance_preservation": {"ce_loss_score": ce_loss_score},
        "model_behavior_preservation": {"kl_div_score": 0.96},
        "misc_metrics": {"frac_alive": 0.75},
    }
    details = [{"index": i, "feature_density": density} for i, density in enumerate([0.0, 0.003, 0.02, 0.4])]
    statistics = {"fvu": fvu, "l0": 12.5, "dead_share": 0.3, "gini": 0.6, "mass_by_density_decile": [0.05] * 9 + [0.55]}
    extra = {"exported": statistics, "in_training": {"fvu": 0.19, "l0": 12.0}, "top_contexts": list(contexts)}
    return write(folder, "core", release, metrics, details, extra if ours else None, **fields)


def write_probing(folder, release, top_1=0.7, all_latents=0.9, **fields):
    sae = {f"sae_top_{k}_test_accuracy": top_1 + k / 100 - 0.01 for k in (1, 2, 5)} | {"sae_test_accuracy": all_latents}
    metrics = {"llm": {"llm_top_1_test_accuracy": 0.66}, "sae": sae}
    return write(folder, "sparse_probing", release, metrics, **fields)


def write_absorption(folder, release, fraction=0.3, **fields):
    metrics = {"mean": {"mean_absorption_fraction_score": fraction, "mean_full_absorption_score": 0.1}}
    return write(folder, "absorption", release, metrics, **fields)


def write_mmcs(folder, release, others, **fields):
    similar = {"mmcs": 0.512, "baseline": 0.2571}
    details = [
        {"partner": f"{other}_custom_sae", "same_group": True, "decoder": similar, "encoder": similar}
        for other in others
        if other != release
    ]
    metrics = {"decoder": similar, "encoder": similar, "partners": {"partners_of_same_group": True}}
    return write(folder, "mmcs", release, metrics, details, **fields)


def write_all(folder, names=NAMES, **fields):
    for name in names:
        write_core(folder, name, FVUS.get(name, 0.2), **fields)
        write_probing(folder, name, TOP_1S.get(name, 0.7))
        write_absorption(folder, name)
        write_mmcs(folder, name, names)
    return folder
