"""Stage `evaluate`: what the exported SAEs do on the language model, one result for each."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from torch import Tensor

from sae_lens_sampled import SampledTopKTrainingSAE, calibrate_thresholds, load_checkpoint, to_jumprelu
from sae_lens_sampled.activation_statistics import ActivationStatistics
from sae_lens_sampled.saebench import run_evals
from sae_lens_sampled.saebench.sources import SAESource
from studies.configs import Study
from studies.plan import Arm, Unit, sweep
from studies.storage import Storage
from studies.text import held_out, text_activations

DENSITY_EDGES = [edge / 4 for edge in range(-18, 1)]
"""Of the histogram, in log10 of the share of tokens a latent fires on."""


def evaluate(storage: Storage, units: Sequence[Unit]) -> None:
    """Run SAEBench on the exports of `units`, and keep what the report needs."""
    study = storage.study
    calibration, unseen = halves(text_activations(storage)[1])
    thresholds = {unit.name: export_variants(storage, unit, calibration, unseen) for unit in units}
    results = run_evals(
        [_source(storage, unit, calibration) for unit in units],
        list(study.evals),
        study.model,
        storage.cache / "sae_bench",
        text=held_out(storage),
        probing_datasets=study.probing_datasets,
        overrides=study.evals,
        device=study.device,
        show_progress=False,
    )
    for unit in units:
        found = {name: one[f"{unit.name}_custom_sae"] for name, one in results.items()}
        of_training = in_training(storage, unit, unseen)
        result = {"arm": unit.arm.name, "seed": unit.seed, "metrics": metrics(found) | of_training}
        result |= density(found["core"]) | {"thresholds": thresholds[unit.name], "pools": pools(storage, unit)}
        storage.save(storage.on_model(unit), result)


def metrics(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The numbers of SAEBench, and of core what we add to it, by our names for them."""
    core, ours = results["core"]["eval_result_metrics"], results["core"]["eval_result_unstructured"]
    found = {
        "fvu": ours["exported"]["fvu"],
        "l0": core["sparsity"]["l0"],
        "loss_recovered": core["model_performance_preservation"]["ce_loss_score"],
        "dead": ours["exported"]["dead_share"],
        "gini": ours["exported"]["gini"],
    }
    if "sparse_probing" in results:
        probing = results["sparse_probing"]["eval_result_metrics"]["sae"]
        found |= {f"probing_{k}": probing[f"sae_top_{k}_test_accuracy"] for k in (1, 2, 5)}
        found["probing_sets"] = {
            one["dataset_name"]: [one[f"sae_top_{k}_test_accuracy"] for k in (1, 2, 5)]
            for one in results["sparse_probing"]["eval_result_details"]
        }
    if "absorption" in results:
        absorption = results["absorption"]["eval_result_metrics"]["mean"]
        found["absorption_fraction"] = absorption["mean_absorption_fraction_score"]
        found["absorption_full"] = absorption["mean_full_absorption_score"]
        found["absorption_letters"] = len(results["absorption"]["eval_result_details"])
    return found


def density(core: dict[str, Any]) -> dict[str, Any]:
    """How often the latents fire, as a histogram."""
    log_density = torch.tensor(
        [math.log10(one["feature_density"]) for one in core["eval_result_details"] if one["feature_density"] > 0],
        dtype=torch.double,
    )
    lowest, *_ = edges = torch.tensor(DENSITY_EDGES, dtype=torch.double)
    counts = torch.histogram(log_density.clamp(min=lowest), edges).hist
    return {"density_edges": DENSITY_EDGES, "density_counts": counts.long().tolist()}


def halves(x: Tensor, n_tokens: int = 1024) -> tuple[Tensor, Tensor]:
    """Two parts of a text that run through all of it: stretches of `n_tokens` tokens in turns."""
    stretches = x.split(n_tokens)
    return torch.cat(stretches[::2]), torch.cat(stretches[1::2])


def batches_of_training(study: Study, arm: Arm, x: Tensor) -> list[Tensor]:
    """Batches as the arm was trained on: of shuffled tokens, or of consecutive ones."""
    if arm.shuffled:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)]
    return list(x.split(study.batch_size))


@torch.no_grad()
def in_training(storage: Storage, unit: Unit, unseen: Tensor) -> dict[str, float]:
    """L0 and FVU of the selection of training; a sampled pool is drawn anew for every batch."""
    sae = load_checkpoint(storage.sae(unit), device=storage.study.device)
    statistics = ActivationStatistics(sae.cfg.d_in, sae.cfg.d_sae, unseen.device)
    for i, batch in enumerate(batches_of_training(storage.study, unit.arm, unseen)):
        acts = sae.select(batch, draw=i) if isinstance(sae, SampledTopKTrainingSAE) else sae.encode(batch)
        statistics.update(batch, acts, sae.decode(acts))
    summary = statistics.summary()
    return {"l0_in_training": summary["l0"], "fvu_in_training": summary["fvu"]}


def export_variants(storage: Storage, unit: Unit, calibration: Tensor, unseen: Tensor) -> dict[str, Any]:
    """L0 and FVU of exports that differ in the thresholds alone; empty for arms that are not of the sweep."""
    sae = load_checkpoint(storage.sae(unit), device=storage.study.device)
    if not isinstance(sae, SampledTopKTrainingSAE) or unit.arm not in sweep(storage.study):
        return {}
    variants: dict[str, SAE[Any]] = {"per_latent": to_jumprelu(sae)}
    sae.cfg.inference_threshold = "global"
    variants["global"] = to_jumprelu(sae)
    sae.cfg.inference_threshold = "per_latent"
    for mode in ("per_latent", "global"):
        variants[f"{mode}_at_equal_l0"] = _calibrated(sae, unit.arm, calibration, mode, storage.study)
    return {name: l0_and_fvu(one, unseen) for name, one in variants.items()}


@torch.no_grad()
def l0_and_fvu(sae: SAE[Any], x: Tensor) -> dict[str, float]:
    statistics = ActivationStatistics(sae.cfg.d_in, sae.cfg.d_sae, x.device)
    for part in x.split(4096):
        acts = sae.encode(part)
        statistics.update(part, acts, sae.decode(acts))
    summary = statistics.summary()
    return {name: summary[name] for name in ("l0", "fvu")}


def pools(storage: Storage, unit: Unit) -> dict[str, float]:
    """What the SAE remembers of its pools; empty for other architectures."""
    sae = load_checkpoint(storage.sae(unit))
    return sae.pool_statistics() if isinstance(sae, SampledTopKTrainingSAE) else {}


def _source(storage: Storage, unit: Unit, calibration: Tensor) -> SAESource:
    if unit.arm.exported_from is None:
        return unit.name, storage.sae(unit)
    sae = load_checkpoint(storage.sae(unit), device=storage.study.device)
    return unit.name, _calibrated(sae, unit.arm, calibration, "global", storage.study)


def _calibrated(sae: SampledTopKTrainingSAE, arm: Arm, x: Tensor, mode: str, study: Study) -> SAE[Any]:
    batches = batches_of_training(study, arm, x)
    return calibrate_thresholds(sae, batches, mode, target_l0=study.k, show_progress=False)[0]
