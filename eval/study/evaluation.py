"""Stages `evaluate` and `absorption`: the exported SAEs on the language model, with one result per SAE in each."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens.saes.sae import SAE, TrainingSAE
from torch import Tensor

from sae_lens_sampled import SampledTopKTrainingSAE, calibrate_thresholds, load_checkpoint, to_jumprelu
from sae_lens_sampled.metrics import ActivationStatistics
from sae_lens_sampled.sae.checks import check_weights
from sae_lens_sampled.saebench import run_evals
from study.configs import Study
from study.plan import Arm, Unit, arms, sweep
from study.storage import Storage
from study.text import CHUNK, held_out, text_activations
from study.training import model_path, new_sae

DENSITY_EDGES = [edge / 4 for edge in range(-18, 1)]
"""Edges of the histogram, in log10 of the share of tokens a latent fires on."""


def evaluate(storage: Storage, units: Sequence[Unit]) -> list[str]:
    """Run SAEBench on the exports of `units`, and store the results that the report needs.

    Returns the reasons why SAEs with unusable weights, if any, were left out.
    """
    study = storage.study
    calibration, unseen = halves(text_activations(storage)[1])
    folders = {unit.trained: storage.sae(unit) for unit in units}
    trained = {name: load_checkpoint(folder, device=study.device) for name, folder in folders.items()}
    broken = {name: reason for name, sae in trained.items() if (reason := _fault(sae, folders[name]))}
    units = [unit for unit in units if unit.trained not in broken]
    if not units:
        return list(broken.values())
    results = run_evals(
        [(storage.release(unit), _evaluated(study, unit.arm, trained[unit.trained], calibration)) for unit in units],
        list(study.evals),
        model_path(study.model),
        storage.sae_bench,
        text=held_out(storage),
        probing_datasets=study.probing_datasets,
        overrides=study.evals,
        device=study.device,
        dtype=study.dtype,
        show_progress=False,
    )
    for unit in units:
        sae = trained[unit.trained]
        of_unit = {eval_name: by_sae[f"{storage.release(unit)}_custom_sae"] for eval_name, by_sae in results.items()}
        storage.evaluations.append(
            {
                "arm": unit.arm.name,
                "seed": unit.seed,
                "metrics": metrics(of_unit) | in_training(study, unit.arm, sae, unseen),
                **density(of_unit["core"]),
                "thresholds": export_variants(study, unit.arm, sae, calibration, unseen),
                "pools": sae.pool_statistics() if isinstance(sae, SampledTopKTrainingSAE) else {},
                "device": storage.device,
            }
        )
    return list(broken.values())


def evaluate_absorption(storage: Storage, units: Sequence[Unit]) -> None:
    """Run absorption alone on the exports of `units`."""
    study = storage.study
    results = run_evals(
        [(storage.release(unit), load_checkpoint(storage.sae(unit), device=study.device)) for unit in units],
        ["absorption"],
        model_path(study.model),
        storage.sae_bench,
        overrides={"absorption": study.absorption},
        device=study.device,
        dtype=study.dtype,
    )
    for unit in units:
        of_unit = {"absorption": results["absorption"][f"{storage.release(unit)}_custom_sae"]}
        result = {"arm": unit.arm.name, "seed": unit.seed, "metrics": metrics(of_unit), "device": storage.device}
        storage.absorption.append(result)


def train_probes(storage: Storage, settings: dict[str, Any]) -> None:
    """Train absorption's probes, which depend on no SAE and serve all of them."""
    study = storage.study
    untrained = new_sae(study, Unit(arms(study)[0], study.first_seed))
    untrained.cfg.metadata.hook_name = study.hook
    run_evals(
        [("untrained", untrained)],
        ["absorption"],
        model_path(study.model),
        storage.sae_bench,
        overrides={"absorption": settings},
        device=study.device,
        dtype=study.dtype,
        prepare_only=True,
    )


def _fault(sae: TrainingSAE[Any], folder: Path) -> str | None:
    """Why an SAE cannot be evaluated; None if it can."""
    try:
        check_weights(sae, repr(str(folder)))
    except ValueError as error:
        return str(error)
    return None


def metrics(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """SAEBench's metrics, and those that this package adds to its core, under this study's names."""
    by_name: dict[str, Any] = {}
    if "core" in results:
        core, ours = results["core"]["eval_result_metrics"], results["core"]["eval_result_unstructured"]
        by_name |= {
            "fvu": ours["exported"]["fvu"],
            "l0": core["sparsity"]["l0"],
            "loss_recovered": ours["exported"]["ce_loss_score"],  # in core's own, bfloat16 is rounded to 1/32
            "dead": ours["exported"]["dead_share"],
            "gini": ours["exported"]["gini"],
        }
        if selected := ours.get("in_training"):  # the same tokens with the selection of training
            by_name |= {"fvu_of_selection": selected["fvu"], "l0_of_selection": selected["l0"]}
    if "sparse_probing" in results:
        probing = results["sparse_probing"]
        names = {k: f"sae_top_{k}_test_accuracy" for k in sorted(probing["eval_config"]["k_values"])}
        by_name |= {f"probing_{k}": probing["eval_result_metrics"]["sae"][name] for k, name in names.items()}
        by_name["probing_sets"] = {  # in the order of k
            of_set["dataset_name"]: [of_set[name] for name in names.values()]
            for of_set in probing["eval_result_details"]
        }
    if "absorption" in results:
        absorption = results["absorption"]["eval_result_metrics"]["mean"]
        by_name["absorption_fraction"] = absorption["mean_absorption_fraction_score"]
        by_name["absorption_full"] = absorption["mean_full_absorption_score"]
        by_name |= letters(results["absorption"])
    return by_name


def letters(result: dict[str, Any]) -> dict[str, Any]:
    """Absorption by letter, and means over letters."""
    recall = (result.get("eval_result_unstructured") or {}).get("letters", {})
    by_letter = {
        detail["first_letter"]: {
            "full": detail["full_absorption_rate"],
            "fraction": detail["mean_absorption_fraction"],
            "n_splits": detail["num_split_features"],
            **recall.get(detail["first_letter"], {}),
        }
        for detail in result["eval_result_details"]
    }
    means = {
        f"absorption_{name}": statistics.fmean(of_letter[name] for of_letter in by_letter.values())
        for name in ("n_splits", "recall_probe", "recall_best_latent")
    }
    return means | {"absorption_letters": len(by_letter), "absorption_by_letter": by_letter}


def density(core: dict[str, Any]) -> dict[str, Any]:
    """Histogram of how often the latents fire, without those that never do."""
    log_density = torch.tensor(
        [math.log10(latent["feature_density"]) for latent in core["eval_result_details"] if latent["feature_density"]],
        dtype=torch.double,
    )
    lowest, *_ = edges = torch.tensor(DENSITY_EDGES, dtype=torch.double)
    counts = torch.histogram(log_density.clamp(min=lowest), edges).hist
    return {"density_edges": DENSITY_EDGES, "density_counts": counts.long().tolist()}


def halves(x: Tensor, n_tokens: int = 1024) -> tuple[Tensor, Tensor]:
    """Split a text into two parts of alternating stretches of `n_tokens` tokens, so that both come from all over it."""
    stretches = x.split(n_tokens)
    return torch.cat(stretches[::2]), torch.cat(stretches[1::2])


def batches_of_training(study: Study, arm: Arm, x: Tensor) -> list[Tensor]:
    """Batches like those the arm was trained on: of shuffled or of consecutive tokens."""
    if arm.shuffled:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)]
    return list(x.split(study.batch_size))


def in_training(study: Study, arm: Arm, sae: TrainingSAE[Any], unseen: Tensor) -> dict[str, float]:
    """L0 and FVU of the SAE with its selection of training, on batches like those of training."""
    of_batches = l0_and_fvu(sae, batches_of_training(study, arm, unseen))
    return {f"{name}_in_training": value for name, value in of_batches.items()}


def export_variants(
    study: Study, arm: Arm, sae: TrainingSAE[Any], calibration: Tensor, unseen: Tensor
) -> dict[str, dict[str, float]]:
    """L0 and FVU of exports that differ only in their thresholds; empty for arms outside the sweep."""
    if not isinstance(sae, SampledTopKTrainingSAE) or arm not in sweep(study):
        return {}
    variants: dict[str, SAE[Any]] = {"per_latent": to_jumprelu(sae)}
    sae.cfg.inference_threshold = "global"
    variants["global"] = to_jumprelu(sae)
    sae.cfg.inference_threshold = "per_latent"
    for mode in ("per_latent", "global"):
        variants[f"{mode}_at_equal_l0"] = _calibrated(study, arm, sae, calibration, mode)
    return {name: l0_and_fvu(export, unseen.split(CHUNK)) for name, export in variants.items()}


@torch.no_grad()
def l0_and_fvu(sae: SAE[Any], batches: Iterable[Tensor]) -> dict[str, float]:
    """L0 and FVU over batches of shape (n_tokens, d_in); a sampled pool is drawn anew for each."""
    statistics = ActivationStatistics(sae.cfg.d_in, sae.cfg.d_sae, sae.device)
    for i, batch in enumerate(batches):
        acts = sae.select(batch, draw=i) if isinstance(sae, SampledTopKTrainingSAE) else sae.encode(batch)
        statistics.update(batch, acts, sae.decode(acts))
    summary = statistics.summary()
    return {name: summary[name] for name in ("l0", "fvu")}


def _evaluated(study: Study, arm: Arm, sae: TrainingSAE[Any], calibration: Tensor) -> SAE[Any]:
    """The SAE passed to SAEBench: the training SAE, which `run_evals` exports, or the arm's own export."""
    return sae if arm.exported_from is None else _calibrated(study, arm, sae, calibration, "global")


def _calibrated(study: Study, arm: Arm, sae: TrainingSAE[Any], x: Tensor, mode: str) -> SAE[Any]:
    batches = batches_of_training(study, arm, x)
    return calibrate_thresholds(sae, batches, mode, target_l0=study.k, show_progress=False)[0]
